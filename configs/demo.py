"""The whole recipe on the embedded world, on a laptop."""

from instructax.config import (
    Arm,
    Config,
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    OptimizerConfig,
    PpoConfig,
    PretrainConfig,
    RewardConfig,
    SftConfig,
    TokenizerConfig,
    WorldConfig,
)

VOCABULARY = 960
PROMPT, RESPONSE = 52, 30


def config() -> Config:
    model = ModelConfig(
        num_layers=3,
        d_model=96,
        num_heads=4,
        vocab_size=VOCABULARY,
        vocab_multiple=64,
        context_length=96,
        init_std=0.08,
        remat="none",
    )
    rate = OptimizerConfig(learning_rate=1e-3, schedule="constant", warmup_steps=8, warmup_from=0.1)
    return Config(
        name="demo",
        tokenizer=TokenizerConfig(vocab_size=VOCABULARY, kind="bpe"),
        data=DataConfig(
            world=WorldConfig(seed=7),
            dedup_prefix_chars=96,
            max_prompt_tokens=PROMPT,
            max_response_tokens=RESPONSE,
        ),
        model=model,
        pretrain=PretrainConfig(
            optimizer=OptimizerConfig(learning_rate=2e-3, weight_decay=0.1, warmup_steps=100),
            batch_size=8,
            row_length=64,
            steps=3200,
            checkpoint_every=800,
            evaluate_every=800,
        ),
        sft=SftConfig(
            optimizer=OptimizerConfig(learning_rate=7e-4),
            batch_size=8,
            row_length=96,
            epochs=3,
            dropout=0.0,
            pretrain_mix=0.3,
        ),
        init=SftConfig(
            optimizer=OptimizerConfig(learning_rate=7e-4),
            batch_size=8,
            row_length=96,
            epochs=2,
            dropout=0.0,
            pretrain_mix=0.1,
            select_by="last",
        ),
        reward=RewardConfig(
            optimizer=OptimizerConfig(learning_rate=5e-4, warmup_steps=10),
            batch_size=16,
            row_length=256,
            epochs=2,
        ),
        ppo=PpoConfig(
            kl_coef=0.2,
            ptx_coef=1.0,
            episodes=60 * 96,
            batch_size=96,
            minibatch_size=24,
            policy_optimizer=OptimizerConfig(
                learning_rate=3e-4, schedule="constant", warmup_steps=8, warmup_from=0.1
            ),
            value_optimizer=rate,
            ema_decay=0.92,
            normalize_reward=True,
            ptx_examples_per_episode=1,
            ptx_row_length=64,
            prompt_length=PROMPT,
            response_length=RESPONSE,
            checkpoint_every=20,
            sample_every=15,
        ),
        arms=(
            Arm("ppo_ptx"),
            Arm("ppo", (("ptx_coef", 0.0),)),
            Arm("shuffled", (("score_control", "shuffled"), ("ptx_coef", 0.0))),
            Arm("ptx_only", (("rl_coef", 0.0),)),
        ),
        evaluate=EvaluateConfig(
            policies=("sft", "init", "ppo", "ppo_ptx", "shuffled", "ptx_only"),
            best_of=8,
            batch_size=256,
        ),
    )
