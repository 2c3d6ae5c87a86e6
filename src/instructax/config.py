"""The vocabulary of settings: frozen dataclasses, one field per decision, each with its symbol and source.

Papers are cited as: GPT-1/2/3 (Radford 2018, 2019; Brown 2020), Ziegler (2019), Stiennon (2020),
InstructGPT (Ouyang 2022). "Not stated" marks what InstructGPT leaves open; the default is then argued.
Loading, overriding, validating and dumping a config is in :mod:`instructax.resolve`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

Remat = Literal["none", "wide", "block", "offload"]
ShardOver = Literal["fsdp", "data+fsdp"]


class UserError(Exception):
    """Bad input: one line that says what, where and what to do. The CLI prints it and exits with 2."""

    def line(self) -> str:
        """As it is printed: one line, whatever the message quotes."""
        return f"instructax: {' '.join(str(self).split())}"


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer; typed fields cover GPT-1, GPT-2, GPT-3 and the Llama family."""

    num_layers: int = 12
    """Number of blocks."""
    d_model: int = 768
    """Width of the residual stream."""
    num_heads: int = 12
    """Query heads."""
    num_kv_heads: int | None = None
    """Key-value heads (grouped-query attention); none means one per query head."""
    d_head: int | None = None
    """Width of a head; none means d_model / num_heads."""
    d_ff: int | None = None
    """Hidden width of the MLP; none means 4 * d_model (GPT-1/2/3)."""
    vocab_size: int = 50257
    """Real vocabulary entries; the tokenizer must agree."""
    vocab_multiple: int = 128
    """The embedding is padded to this multiple so that a mesh divides it; padded ids are never scored or sampled."""
    context_length: int = 1024
    """Largest number of positions."""
    norm: Literal["layer", "rms"] = "layer"
    """LayerNorm (GPT) or RMSNorm (Llama)."""
    norm_position: Literal["pre", "post"] = "pre"
    """pre: at each sub-block's input plus one final norm (GPT-2/3, Llama); post: after each residual sum (GPT-1)."""
    norm_eps: float = 1e-5
    """Epsilon inside the norm (1e-5 in the released GPT-2 code)."""
    positions: Literal["learned", "rope"] = "learned"
    """Learned absolute positions (GPT) or rotary embeddings (Llama)."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rope_pairing: Literal["half", "interleaved"] = "half"
    """Which components of a head rotate together: (i, i + C/2) or (2i, 2i + 1)."""
    activation: Literal["gelu_tanh", "gelu_sigmoid", "gelu_erf", "swiglu"] = "gelu_tanh"
    """MLP non-linearity: tanh-GELU (GPT-2 code), x*sigmoid(1.702x), exact GELU, or gated SiLU (Llama)."""
    use_bias: bool = True
    """Biases in projections and norms (GPT yes, Llama no)."""
    qk_norm: bool = False
    """RMSNorm on queries and keys before attention."""
    tie_embeddings: bool = True
    """Unembedding = transposed token embedding (GPT-2)."""
    attention_pattern: tuple[Literal["dense", "banded"], ...] = ("dense",)
    """Layer pattern, repeated; GPT-3 alternates dense and locally banded layers."""
    band_width: int = 256
    """Positions a banded layer looks back, itself included. Not stated by GPT-3: a field."""
    dropout: float = 0.0
    """Residual dropout, in steps of 1/65,536; used only where a step passes a dropout key (SFT), never in PPO (trap T7)."""
    init_std: float = 0.02
    """Standard deviation of all kernels and embeddings (GPT-2); position embeddings take half of it."""
    scale_residual_init: bool = True
    """Divide the two residual-output kernels by sqrt(2 * num_layers) (GPT-2 paper; its released code does not)."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of activations; parameters, heads, losses and softmax over the vocabulary stay float32."""
    remat: Remat = "block"
    """What the backward pass computes again: nothing; what is wide (attention, the MLP's hidden layer); all of a block;
    or all but queries, keys and values, which wait in the host's memory together with each block's input."""
    scan_unroll: int = 1
    """Periods of the layer pattern in one step of the scan over layers. All of them is faster where layers are small
    (on CPU a step of a scan stores and fetches what the backward pass needs), and longer to compile."""
    shard_over: ShardOver = "fsdp"
    """Mesh axes that share out parameters and optimizer state, beside model. With data too a large reward.model, which is
    the value network's as well, needs no more fsdp than a small policy does; and a policy is trained in more shares than it
    decodes in, since the rollout copy lies over fsdp alone. Between several TPU slices weights would cross the slow network."""

    @property
    def head_width(self) -> int:
        return self.d_model // self.num_heads if self.d_head is None else self.d_head

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def mlp_width(self) -> int:
        return 4 * self.d_model if self.d_ff is None else self.d_ff

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


AS_RUN = ("remat", "scan_unroll", "shard_over")
"""Fields of ModelConfig that say how it is computed, not what."""


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam with decoupled weight decay, global-norm clipping and a learning-rate schedule."""

    learning_rate: float = 1e-4
    """Peak learning rate."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """Shape after the warm-up."""
    final_fraction: float = 0.1
    """Learning rate at the end as a fraction of the peak (InstructGPT: cosine to 10%)."""
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up (InstructGPT: none for SFT and reward, 10 iterations for PPO)."""
    warmup_from: float = 0.0
    """Where the warm-up starts, as a fraction of the peak (InstructGPT PPO: 0.1)."""
    b1: float = 0.9
    """Adam beta1."""
    b2: float = 0.95
    """Adam beta2 (InstructGPT, GPT-3)."""
    eps: float = 1e-8
    """Adam epsilon (GPT-3; not stated by InstructGPT)."""
    eps_inside_correction: bool = False
    """True adds eps to the uncorrected sqrt(v), as TensorFlow 1 did in the 2019 code (trap T18)."""
    weight_decay: float = 0.0
    """Decoupled weight decay on matrices (GPT-3: 0.1; not stated by InstructGPT)."""
    max_grad_norm: float | None = 1.0
    """Global-norm clip (GPT-3: 1.0; not stated by InstructGPT); none means no clip."""


@dataclass(frozen=True)
class MeshConfig:
    """Device mesh data x fsdp x model; -1 infers one axis from the number of devices."""

    data: int = -1
    """Batch parallelism with parameters replicated, unless a network's shard_over says otherwise; what lies between several
    TPU slices, and only that."""
    fsdp: int = 1
    """Batch parallelism with sharded parameters and optimizer state."""
    model: int = 1
    """Tensor parallelism."""


@dataclass(frozen=True)
class TokenizerConfig:
    """SentencePiece model: where it lies, and how to train one."""

    path: str = ""
    """An existing .model file; empty means the run's own, trained by the tokenizer verb."""
    vocab_size: int = 32000
    """Pieces to train, special tokens included."""
    kind: Literal["bpe", "unigram"] = "bpe"
    """Segmentation algorithm."""
    train_paths: tuple[str, ...] = ()
    """Text to train on: .jsonl text records or .txt files; empty means the pretraining paths."""


@dataclass(frozen=True)
class WorldConfig:
    """Sizes and tastes of the embedded world (instructax.worlds). Shares are probabilities, sizes are counts of records."""

    seed: int = 0
    """Everything is drawn from it; another seed is another world with other facts."""
    num_entities: int = 32
    """Animals, 8..40."""
    num_attributes: int = 4
    """Ordinary attributes, 2..5; the forbidden one comes on top."""
    pretrain_documents: int = 36000
    """Training texts."""
    pretrain_heldout_documents: int = 1200
    """Held-out texts, of the same topics."""
    train_demonstrations: int = 6000
    """Demonstrations on training content."""
    validation_demonstrations: int = 400
    """Demonstrations on validation content."""
    comparison_prompts: int = 2400
    """Prompts whose samples are to be ranked for reward training."""
    comparison_validation_prompts: int = 600
    """The same, held out."""
    ppo_prompts: int = 4000
    """Customers' prompts for PPO, before curation."""
    validation_prompts: int = 300
    """For choosing checkpoints and tuning; content of its own."""
    eval_prompts: int = 1000
    """For reported figures; content of its own."""
    kind_floor: float = 0.1
    """Training demonstrations and ranked prompts have kinds of tasks in proportion to max(share, this). InstructGPT's labelers wrote
    prompts for diversity; of the customers' own the rarest kind has 1.9%, too few to be learnt in so small a world."""
    forbidden_share: float = 0.12
    """Of the tasks of the kinds in which something forbidden can be asked."""
    sound_alike_share: float = 0.06
    """Of the same: allowed, but sounding forbidden."""
    filler: float = 0.45
    """Demonstrations that talk before the answer."""
    chatter: float = 0.45
    """Demonstrations that talk after it."""
    courtesy: float = 0.15
    """Demonstrations with a courtesy, which is no fault."""
    sloppy: float = 0.4
    """Demonstrations that break their constraint."""
    comply: float = 0.5
    """Forbidden requests that demonstrators complied with."""
    labelers: int = 12
    """Simulated labelers of the training comparisons."""
    heldout_labelers: int = 5
    """Simulated labelers who judge held-out pairs only."""
    labeler_noise: float = 0.59
    """Standard deviation of a labeler's noise, in gold points; sets how far two agree."""
    courtesy_liking: float = 0.2
    """Mean liking for each courtesy, in gold points."""
    length_liking: float = 0.02
    """Mean liking for each word, in gold points."""
    tie_width: float = 0.5
    """Utilities within one step of this width are ties."""
    user_cap: int = 200
    """Most prompts that one customer has in the clean lists."""
    dirty_share: float = 0.02
    """Planted dirt of each sort in the raw prompts, by the clean prompts' number."""
    heavy_prompts: int = 220
    """Prompts that one customer sent on top of all others in the raw prompts."""


@dataclass(frozen=True)
class DataConfig:
    """Records: JSON Lines files (globs allowed) or tfds:NAME@FOLDER sources, per kind."""

    world: WorldConfig | None = None
    """Generate the embedded demo world instead of reading files; none means files."""
    pretrain: tuple[str, ...] = ()
    """Text records."""
    pretrain_validation: tuple[str, ...] = ()
    """Held-out text records, by topic where the field is there."""
    demonstrations: tuple[str, ...] = ()
    """Demonstration records."""
    demonstrations_validation: tuple[str, ...] = ()
    """Held-out demonstrations; empty means validation_fraction of the users of the training ones."""
    comparisons: tuple[str, ...] = ()
    """Comparison records, K from 2 to 9 responses."""
    comparisons_validation: tuple[str, ...] = ()
    """Held-out comparisons; empty means validation_fraction of the training ones by prompt."""
    prompts: tuple[str, ...] = ()
    """Prompt records for PPO."""
    prompts_validation: tuple[str, ...] = ()
    """Held-out prompts for checkpoint selection and samples over time."""
    prompts_evaluation: tuple[str, ...] = ()
    """Held-out prompts for the final evaluation."""
    validation_fraction: float = 0.1
    """Share split off by user id (or by prompt where no id is given) where no validation files are named."""
    on_bad_record: Literal["refuse", "quarantine"] = "refuse"
    """refuse stops at the first bad line; quarantine sets it aside in a file and counts it."""
    max_prompts_per_user: int = 200
    """Cap by user id (InstructGPT: 200)."""
    dedup_prefix_chars: int = 64
    """Prompts that share a prefix this long are one prompt (InstructGPT: 'a long common prefix'; length not stated)."""
    remove_personal_data: bool = True
    """Drop training prompts with e-mail, phone, card or address numbers or listed names (InstructGPT filters the training split)."""
    names: tuple[str, ...] = ()
    """Personal names to filter, where a list is given."""
    max_prompt_tokens: int = 1024
    """Longer prompts are filtered and counted (InstructGPT: 1k)."""
    max_response_tokens: int = 1024
    """A prompt with a response may have this many tokens more (InstructGPT: 1k); longer ones are left out and counted."""
    chat_template: Literal["plain", "roles"] = "plain"
    """How a plain prompt is framed: as text with an answer mark behind it, or as a user turn with role tokens."""


@dataclass(frozen=True)
class PretrainConfig:
    """Language-model training on text (GPT-3 recipe)."""

    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            learning_rate=6e-4, weight_decay=0.1, warmup_steps=100
        )
    )
    """Adam .9/.95, weight decay .1, clip 1, warm-up, cosine to 10% (GPT-3)."""
    batch_size: int = 512
    """Rows of a global batch."""
    grad_accumulation: int = 1
    """Microbatches whose gradients are summed before one optimizer step; divides batch_size.
    The update and the metrics are those of the whole batch up to rounding, the memory that of one
    part."""
    row_length: int = 1024
    """Tokens of a row."""
    steps: int = 1000
    """Optimizer steps."""
    cross_document_mask: bool = False
    """True keeps packed documents from seeing each other; GPT-3 does not mask."""
    init_from: str = ""
    """Parameters to start from (a checkpoint folder or safetensors file); empty means random."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    evaluate_every: int = 100
    """Steps between held-out losses."""


@dataclass(frozen=True)
class SftConfig:
    """Supervised fine-tuning on demonstrations (InstructGPT section 3.5, appendix C.1)."""

    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(learning_rate=9.65e-6, max_grad_norm=None)
    )
    """InstructGPT 1.3B and 6B: 9.65e-6, cosine to 10%, no warm-up; clip not stated."""
    batch_size: int = 32
    """Demonstrations of a global batch when padded, rows when packed."""
    grad_accumulation: int = 1
    """Microbatches whose gradients are summed before one optimizer step; divides batch_size.
    The update and the metrics are those of the whole batch up to rounding, the memory that of one
    part. With dropout, another number draws other masks."""
    row_length: int = 2048
    """Slots of a model row."""
    packed: bool = True
    """Several demonstrations in a row, none seeing another."""
    epochs: int = 16
    """Passes over the demonstrations (16; the RL init 2)."""
    dropout: float = 0.2
    """Residual dropout (0.2)."""
    remat: Remat | Literal["model"] = "model"
    """What the backward pass computes again here; "model" is model.remat, which PPO's larger states may need."""
    prompt_loss_weight: float = 0.0
    """Weight of prompt tokens in the loss. Not stated: 0 trains what the labeler wrote, response and EOS."""
    pretrain_mix: float = 0.0
    """Share of pretraining rows in each batch (the RL init: 0.1)."""
    select_by: Literal["auto", "reward", "loss", "last"] = "auto"
    """Which epoch's checkpoint is final: by reward-model score on validation prompts where there is one, else by validation loss."""
    select_samples: int = 1
    """Samples of each validation prompt behind the reward-model choice; more make it less noisy."""
    init_from: str = ""
    """Parameters to start from; empty means the run's pretrained model."""


@dataclass(frozen=True)
class RewardConfig:
    """Reward model on K-way rankings (InstructGPT section 3.5, appendix C.2)."""

    model: ModelConfig | None = None
    """Its architecture; none means the policy's. Another size needs its own init_from."""
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(learning_rate=9e-6, max_grad_norm=None)
    )
    """9e-6, cosine to 10% (InstructGPT); warm-up and clip not stated."""
    batch_size: int = 64
    """Prompts of a global batch, all pairs of a prompt together (up to 64 * 36 pairs)."""
    grad_accumulation: int = 1
    """Microbatches whose gradients are summed before one optimizer step; divides batch_size.
    The update and the metrics are those of the whole batch up to rounding, the memory that of one
    part. With dropout, another number draws other masks."""
    row_length: int = 2048
    """Slots of a model row: one prompt, its responses behind it, several prompts where they fit."""
    packed: bool = True
    """Several prompts with their responses in a row where they fit; false gives each prompt a row."""
    epochs: int = 1
    """Passes; more overfit quickly (InstructGPT)."""
    loss: Literal["pairwise", "best_of_k"] = "pairwise"
    """-log sigmoid(r_w - r_l) over all pairs (InstructGPT eq. 1), or Ziegler's softmax over the best response."""
    dropout: float = 0.0
    """Residual dropout. Not stated."""
    max_responses: int = 9
    """Largest K."""
    evaluations: int = 10
    """Held-out accuracy measured this many times during training; the last time is at the end."""
    center_on_demonstrations: bool = True
    """After training, store the bias that gives demonstrations mean score 0."""
    init_from: str = ""
    """Parameters to start from; empty means the run's chosen SFT model."""


@dataclass(frozen=True)
class PpoConfig:
    """PPO and PPO-ptx (InstructGPT section 3.5, appendix C.3-C.4)."""

    kl_coef: float = 0.02
    """beta: weight of the KL penalty in the reward, applied once, at rollout."""
    ptx_coef: float = 27.8
    """gamma: weight of the pretraining gradient in the sum; 0 is plain PPO."""
    rl_coef: float = 1.0
    """Weight of the PPO gradient in the sum; 0 leaves the pretraining gradient alone (a control arm)."""
    episodes: int = 256_000
    """Total episodes."""
    batch_size: int = 512
    """Episodes of an iteration."""
    minibatch_size: int = 64
    """Episodes of one update."""
    grad_accumulation: int = 1
    """Microbatches whose gradients are summed before one optimizer step; divides minibatch_size.
    The update and the metrics are those of the whole minibatch up to rounding, the memory that of
    one part. The pretraining rows beside it are cut alike."""
    packed: bool = True
    """Several episodes in a row for scoring, updates and evaluation, none seeing another; false pads each to its own row."""
    inner_epochs: int = 1
    """Passes over the episodes of an iteration (Ziegler: 4)."""
    policy_optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            learning_rate=9.65e-6,
            schedule="constant",
            warmup_steps=80,
            warmup_from=0.1,
            max_grad_norm=None,
        )
    )
    """Constant after a warm-up of 10 iterations (80 updates) from a tenth of the peak. The final peak is
    not printed; 2.55e-6 to 2.55e-5 was swept and every run above 8.05e-6 without ptx diverged."""
    value_optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            learning_rate=9e-6,
            schedule="constant",
            warmup_steps=80,
            warmup_from=0.1,
            max_grad_norm=None,
        )
    )
    """9e-6 for 1.3B and 6B policies, 5e-6 for 175B (InstructGPT)."""
    clip_range: float = 0.2
    """epsilon of the clipped surrogate."""
    value_clip_range: float | None = 0.2
    """Clip of the value update. Not stated: Ziegler's 0.2; none means unclipped."""
    discount: float = 1.0
    """Discount of the return (1: none). Not gamma."""
    gae_lambda: float = 0.95
    """lambda of GAE. Not stated: 0.95 as in Ziegler and Stiennon."""
    whiten_rewards: bool = False
    """Divide rewards by their standard deviation, keeping the mean. Not stated: on in Ziegler's code, off in its descendants."""
    whiten_advantages: bool = True
    """Whiten advantages over all real tokens of the iteration's global batch, after the returns."""
    temperature: float = 1.0
    """Sampling temperature, the same in rollout, reference and update (trap T6)."""
    kl_estimator: Literal["k1", "k2", "k3", "abs", "max0"] = "k1"
    """Per-token estimate of the KL in the reward; k1 = log pi - log pi_ref is the paper's (trap T8)."""
    kl_controller: Literal["fixed", "adaptive"] = "fixed"
    """Fixed beta (InstructGPT) or Ziegler's proportional controller."""
    kl_target: float = 6.0
    """Target of the controller: KL in nats summed over a sequence (trap T9)."""
    kl_horizon: int = 10_000
    """Horizon of the controller, in episodes."""
    missing_eos: Literal["replace", "subtract", "none"] = "replace"
    """What a response without end gets: the score replaced by missing_eos_value (Ziegler), that much subtracted, or nothing."""
    missing_eos_value: float | None = None
    """Replacement score (default -1) or penalty to subtract (default 1)."""
    normalize_reward: bool = False
    """Before RL, fix gain = 1/std and bias = -mean * gain of the scores of the initial policy's samples (Ziegler). Off in InstructGPT, whose
    shift to demonstrations is stored in the reward model."""
    normalize_samples: int = 256
    """Samples behind that gain and bias."""
    score_control: Literal["none", "shuffled"] = "none"
    """shuffled permutes the scores of an iteration over its responses, and starts the value network from 0: a control arm that must not win."""
    ema_decay: float = 0.992
    """Decay of the exponential average of the policy."""
    ema_every: Literal["iteration", "update"] = "iteration"
    """When the average moves. Not stated."""
    ptx_examples_per_episode: int = 8
    """Pretraining rows per episode (8: 512 rows beside a minibatch of 64)."""
    ptx_row_length: int = 2048
    """Tokens of a pretraining row."""
    ptx_loss: Literal["mean", "sum"] = "mean"
    """Mean over tokens, or sum over a row and mean over rows. The paper does not say; docs/gamma.md says what gamma means under both."""
    ptx_at_zero: Literal["measure", "skip"] = "measure"
    """At gamma = 0 the pretraining loss is still measured, or not."""
    old_logp_from: Literal["rescore", "sampler"] = "rescore"
    """Old log-probabilities: the training program's, or the sampler's own. Their gap is always logged."""
    prompt_length: int = 1024
    """Slots for prompts (left-padded)."""
    response_length: int = 1024
    """Longest response in tokens."""
    rollout_slots: int | None = None
    """Rows that decode at a time, in rollouts and in every other sampling: where a response ends, the next prompt takes its
    slot, so that none waits for the longest. None gives every response of a batch a row. The responses are the same.
    Every shard of the batch then samples by itself and holds the policy's weights whole: for models that fit one chip."""
    cache_dtype: Literal["bfloat16", "int8"] | None = None
    """Dtype of keys and values while sampling; int8 has a scale for every token and head, and none is model.compute_dtype.
    What it costs in exactness is logged as val/sampler_gap_mean and _max."""
    stop_texts: tuple[str, ...] = ()
    """Single tokens besides EOS that end a response."""
    frozen_memory: Literal["device", "host"] = "device"
    """Where the parameters of the reference and of the reward model lie between uses. host: in the memory of the hosts, pinned; they
    are copied to the devices for scoring and dropped after it."""
    init_from: str = ""
    """Policy and KL reference; empty means the run's RL init."""
    reward_from: str = ""
    """Reward model; empty means the run's."""
    checkpoint_every: int = 10
    """Iterations between checkpoints."""
    sample_every: int = 10
    """Iterations between samples of the same validation prompts."""
    log_prompts: int = 8
    """How many of those prompts."""


@dataclass(frozen=True)
class SampleConfig:
    """Sampling outside PPO."""

    checkpoint: str = ""
    """Parameters to sample from; empty means the run's newest policy."""
    prompts: tuple[str, ...] = ()
    """Prompt records; empty means the evaluation prompts."""
    output: str = ""
    """File to write; empty means samples.jsonl in the run's sample folder."""
    samples_per_prompt: int = 1
    """K samples of each prompt, ready to be ranked."""
    temperature: float = 1.0
    """0 is greedy."""
    top_k: int | None = None
    """Keep the k likeliest tokens; none means all."""
    top_p: float | None = None
    """Keep the likeliest tokens up to this mass; none means all."""
    batch_size: int = 64
    """Responses of a batch; several of one prompt share its reading."""


@dataclass(frozen=True)
class EvaluateConfig:
    """What the evaluation compares, and on what."""

    policies: tuple[str, ...] = ("sft", "init", "ppo", "ppo_ptx")
    """Names of policies of the run."""
    best_of: int = 16
    """n of best-of-n sampling with the reward model; 1 leaves it out."""
    temperature: float = 1.0
    """Sampling temperature."""
    use_ema: bool = True
    """Judge the averaged PPO weights, or the raw ones; the report says which."""
    bootstrap: int = 1000
    """Resamples behind intervals."""
    batch_size: int = 64
    """Responses of a batch; several of one prompt share its reading."""


@dataclass(frozen=True)
class Arm:
    """One named variant of the PPO stage: changes to PpoConfig, by field name."""

    name: str = "ppo_ptx"
    """Folder and row of the figures."""
    changes: tuple[tuple[str, float | int | str | bool | None], ...] = ()
    """(field of PpoConfig, value) pairs."""


@dataclass(frozen=True)
class Config:
    """A whole experiment."""

    name: str = "run"
    """Name of the run; its folder is run_dir/name."""
    run_dir: str = "runs"
    """Where runs lie."""
    seed: int = 0
    """The one random seed; everything else folds in from it by purpose."""
    seeds: int = 1
    """`run` repeats the recipe for this many seeds, seed, seed + 1, ..."""
    workers: int = 1
    """Processes of `run` side by side, each on its share of the cores; CPU alone: for small models, which leave
    cores idle. Whatever does not wait for another's results is done beside it: arms, the RL init, seeds."""
    profile: bool = False
    """Trace the third to fifth step of every training loop; profile/profile.md in the stage's folder says where their time went."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=lambda: ModelConfig(context_length=2048))
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    init: SftConfig = field(
        default_factory=lambda: SftConfig(
            optimizer=OptimizerConfig(learning_rate=5e-6, max_grad_norm=None),
            epochs=2,
            pretrain_mix=0.1,
            select_by="last",
        )
    )
    """The RL init: 2 epochs on demonstrations with 10% pretraining text (InstructGPT appendix C.3)."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    ppo: PpoConfig = field(default_factory=PpoConfig)
    arms: tuple[Arm, ...] = (Arm(),)
    """Variants of PPO that `run` trains, each in its own folder."""
    sample: SampleConfig = field(default_factory=SampleConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


def replace(config, **changes):
    """dataclasses.replace, with a clear refusal of an unknown field."""
    known = {f.name for f in dataclasses.fields(config)}
    for name in changes:
        if name not in known:
            raise ValueError(f"{type(config).__name__} has no field {name!r}")
    return dataclasses.replace(config, **changes)
