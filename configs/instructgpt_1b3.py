"""InstructGPT 1.3B with a 6B reward model and value network: the paper's recipe (Ouyang et al. 2022, appendix C).

    instructax run --config configs/instructgpt_1b3.py

Planned for 8 v5p chips, never run (docs/plan.md):

    JAX_PLATFORMS=cpu launch/local.sh --flags tpu -- plan --config configs/instructgpt_1b3.py --topology v5p:2x2x2 --only ppo

- Largest program: the update, 74.4 of 95 GiB a chip, in two parts; sampling 59.2, scoring 52.5.
- PPO, an iteration of 512 episodes at full length: 74 s (prefill 1, decode 8, score 10, update 56); the update at 63% MFU,
  decoding at 56% of its bandwidth bound.
- As `--mesh.data 1` gradients are summed whole, which moves a third more bytes over more links (docs/plan.md): 44.5 GiB, 73 s.
- On 16 v6e (`--topology v6e:4x4 --mesh.data 1`): sampling 22.0 of 31.25 GiB, the update 23.2, scoring 16.5; an iteration
  38 s (decode 8, score 4, update 26). On 8 the update needed 31.9 in eight parts, before kernels travelled once a pass.
- 0.97 PF/s-days of the model's FLOPs.
- SFT (`--only sft/step`): 306 ms a step, 53% MFU, 12.2 GiB; as `--mesh.data 1` 292 ms, 55%, 8.8 GiB.
- The 6B reward model (`--only reward/step`): 2.82 s for 64 rankings of 9 in rows of 2,048, 51% MFU, 39.6 GiB.
- Evaluation (`--only evaluate`): 64 prompts are sampled in 2.3 s and scored in .6 s; 12.1 GiB.

Where the paper is silent: reward rows of 2,048 slots (a prompt whose responses need more is left out and counted), bands of 256
positions in every second layer, lambda .95, value clip .2, no whitening of rewards, no clip of gradients. Weights, tokenizer and data
are named below and not part of this repository.
"""

from instructax.config import (
    Arm,
    Config,
    DataConfig,
    EvaluateConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    PpoConfig,
    Remat,
    RewardConfig,
    SampleConfig,
    SftConfig,
    ShardOver,
    TokenizerConfig,
    replace,
)
from instructax.models.presets import PRESETS


def network(name: str, shard_over: ShardOver) -> ModelConfig:
    """A row of GPT-3's table. The paper computes in float16; bfloat16 needs no scaling of the loss."""
    return replace(
        PRESETS[name], compute_dtype="bfloat16", vocab_multiple=1024, shard_over=shard_over
    )


def recipe(
    name: str,
    *,
    policy: str,
    mesh: MeshConfig,
    sft: tuple[float, int],
    init: tuple[float, int],
    sft_remat: Remat,
    policy_rate: float,
    value_rate: float,
    grad_accumulation: int,
    shard_over: ShardOver = "fsdp",
) -> Config:
    """Every setting of the paper; learning rates and (SFT, init) batches differ by size."""

    def ppo_rate(peak: float) -> OptimizerConfig:
        # Constant after 10 iterations of warm-up, 8 updates each, from a tenth of the peak.
        return OptimizerConfig(
            learning_rate=peak,
            schedule="constant",
            warmup_steps=80,
            warmup_from=0.1,
            max_grad_norm=None,
        )

    def cosine(peak: float) -> OptimizerConfig:
        return OptimizerConfig(learning_rate=peak, final_fraction=0.1, max_grad_norm=None)

    weights = f"weights/{policy}.safetensors"
    return Config(
        name=name,
        mesh=mesh,
        tokenizer=TokenizerConfig(path="weights/tokenizer.model", vocab_size=50257),
        data=DataConfig(
            pretrain=("data/pretrain/*.jsonl",),
            pretrain_validation=("data/pretrain_validation.jsonl",),
            demonstrations=("data/demonstrations.jsonl",),
            comparisons=("data/comparisons.jsonl",),
            prompts=("data/prompts.jsonl",),
            prompts_validation=("data/prompts_validation.jsonl",),
            prompts_evaluation=("data/prompts_evaluation.jsonl",),
            max_prompt_tokens=1024,
            max_response_tokens=1024,
        ),
        model=network(policy, shard_over),
        sft=SftConfig(
            optimizer=cosine(sft[0]),
            batch_size=sft[1],
            row_length=2048,
            epochs=16,
            dropout=0.2,
            # There is more room than in PPO, which has five networks.
            remat=sft_remat,
            init_from=weights,
        ),
        reward=RewardConfig(
            # One 6B reward model for every policy, from GPT-3 fine-tuned on public NLP tasks.
            model=network("gpt3-6.7b", shard_over),
            optimizer=cosine(9e-6),
            batch_size=64,
            row_length=2048,
            epochs=1,
            max_responses=9,
            init_from="weights/gpt3-6.7b-nlp.safetensors",
        ),
        init=SftConfig(
            optimizer=cosine(init[0]),
            batch_size=init[1],
            row_length=2048,
            epochs=2,
            dropout=0.2,
            remat=sft_remat,
            pretrain_mix=0.1,
            select_by="last",
            init_from=weights,
        ),
        ppo=PpoConfig(
            kl_coef=0.02,
            ptx_coef=27.8,
            episodes=256_000,
            batch_size=512,
            minibatch_size=64,
            grad_accumulation=grad_accumulation,
            inner_epochs=1,
            policy_optimizer=ppo_rate(policy_rate),
            value_optimizer=ppo_rate(value_rate),
            clip_range=0.2,
            ema_decay=0.992,
            ptx_examples_per_episode=8,
            ptx_row_length=2048,
            prompt_length=1024,
            response_length=1024,
            # Responses to the same prompts over time; rows of a mesh divide them.
            log_prompts=64,
        ),
        arms=(Arm("ppo_ptx"),),
        sample=SampleConfig(batch_size=64),
        evaluate=EvaluateConfig(policies=("sft", "init", "ppo_ptx"), batch_size=64),
    )


def config() -> Config:
    return recipe(
        "instructgpt_1b3",
        policy="gpt3-1.3b",
        # fsdp within the planes of 2x2x2: the compiler sums gradients into parts there (docs/plan.md).
        mesh=MeshConfig(data=2, fsdp=-1, model=1),
        sft=(9.65e-6, 32),
        init=(5e-6, 32),
        sft_remat="wide",
        # The final value is not printed; without ptx every run above 8.05e-6 diverged.
        policy_rate=8.05e-6,
        value_rate=9e-6,
        grad_accumulation=2,
    )
