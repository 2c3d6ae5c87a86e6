"""Rules that tie several fields of a config together; the second half of :mod:`instructax.validation`.

Each rule is a generator of problems ``(path, value, what is wrong, what to do)`` over values whose
types and ranges already hold. Rules within one section always apply; those that tie a section to
the model, to the mesh or to files on disk apply to the verbs that use the section, so that somebody
who trains a reward model need not first make the PPO settings fit.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from instructax.config import (
    AS_RUN,
    Config,
    EvaluateConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    PpoConfig,
    SampleConfig,
    replace,
)

Problem = tuple[str, object, str, str]

SECTIONS = ("pretrain", "sft", "init", "reward", "ppo", "sample", "evaluate")
TRAINED = ("pretrain", "sft", "init", "reward", "ppo")
"""Those that take optimizer steps."""
STAGE_NAMES = ("data", "pretrain", "sft", "init", "reward")
"""Folders of a run that no arm may take the name of."""


def uses(verb: str | None) -> frozenset[str]:
    """Sections that a verb reads; ``run`` and None (no verb in sight) stand for all."""
    return frozenset(SECTIONS if verb in (None, "run") else {verb} & set(SECTIONS))


def model_rules(path: str, m: ModelConfig) -> Iterator[Problem]:
    heads = f"{path}.num_heads"
    if m.d_head is None and m.d_model % m.num_heads:
        yield (
            heads,
            m.num_heads,
            f"does not divide d_model = {m.d_model}",
            "change one of them, or give the width of a head as d_head",
        )
    if m.num_heads % m.kv_heads:
        yield (
            f"{path}.num_kv_heads",
            m.kv_heads,
            f"does not divide num_heads = {m.num_heads}",
            "use a divisor, or none for one per query head",
        )
    if m.positions == "rope" and m.head_width % 2:
        yield (
            f"{path}.positions",
            m.positions,
            f"rotates pairs, but a head is {m.head_width} wide",
            "make d_head (or d_model / num_heads) even",
        )
    pattern = m.attention_pattern
    if not pattern:
        yield f"{path}.attention_pattern", pattern, "names no layer", "use dense, or dense banded"
    elif m.num_layers % len(pattern):
        yield (
            f"{path}.attention_pattern",
            pattern,
            f"has {len(pattern)} layers, which do not divide num_layers = {m.num_layers}",
            "change num_layers or the pattern so that whole patterns fit",
        )
    if "banded" in pattern and m.band_width > m.context_length:
        yield (
            f"{path}.band_width",
            m.band_width,
            f"exceeds context_length = {m.context_length}, so that a banded layer would be dense",
            "narrow the band, or use dense layers alone",
        )
    if m.norm_position == "post" and m.norm == "rms":
        yield (
            f"{path}.norm",
            m.norm,
            "does not go with norm_position = 'post' (GPT-1 is LayerNorm)",
            "use norm = 'layer', or norm_position = 'pre'",
        )


def warmup_rule(path: str, optimizer: OptimizerConfig, steps: int) -> Iterator[Problem]:
    if optimizer.warmup_steps >= steps:
        yield (
            f"{path}.warmup_steps",
            optimizer.warmup_steps,
            f"leaves no step at the peak: there are {steps} steps in all",
            f"warm up for fewer than {steps}, or train longer",
        )


def accumulation_rule(path: str, parts: int, field: str, size: int) -> Iterator[Problem]:
    if size % parts:
        yield (
            f"{path}.grad_accumulation",
            parts,
            f"does not divide {field} = {size} into equal microbatches",
            "use a divisor",
        )


def ppo_rules(path: str, p: PpoConfig) -> Iterator[Problem]:
    if p.batch_size % p.minibatch_size:
        yield (
            f"{path}.minibatch_size",
            p.minibatch_size,
            f"does not divide batch_size = {p.batch_size}",
            "use a divisor, so that every episode is in one update of each inner epoch",
        )
    yield from accumulation_rule(path, p.grad_accumulation, "minibatch_size", p.minibatch_size)
    if p.episodes % p.batch_size:
        below = p.episodes // p.batch_size * p.batch_size
        near = [str(n) for n in (below, below + p.batch_size) if n]
        yield (
            f"{path}.episodes",
            p.episodes,
            f"is not a whole number of iterations of batch_size = {p.batch_size}",
            f"use {' or '.join(near)}",
        )
    if p.rl_coef == 0 and p.ptx_coef == 0:
        yield (
            f"{path}.rl_coef",
            p.rl_coef,
            "and ptx_coef are both 0: no gradient is left",
            "set one",
        )
    # Integer arithmetic: both counts may be large.
    iterations = p.episodes // p.batch_size
    updates = iterations * (p.batch_size // p.minibatch_size) * p.inner_epochs
    yield from warmup_rule(f"{path}.policy_optimizer", p.policy_optimizer, updates)
    yield from warmup_rule(f"{path}.value_optimizer", p.value_optimizer, updates)
    if p.kl_controller == "adaptive":
        if p.kl_coef == 0:
            yield (
                f"{path}.kl_coef",
                p.kl_coef,
                "stays 0 under the adaptive controller, which scales it",
                "start above 0, or use kl_controller = 'fixed'",
            )
        if p.batch_size >= 5 * p.kl_horizon:
            yield (
                f"{path}.kl_horizon",
                p.kl_horizon,
                f"lets one iteration of {p.batch_size} episodes take kl_coef to 0 or below",
                f"use more than {p.batch_size // 5}: kl_coef changes by up to 0.2 * batch_size / kl_horizon",
            )
    value, field = p.missing_eos_value, f"{path}.missing_eos_value"
    if value is not None:
        if p.missing_eos == "none":
            yield field, value, "has no effect with missing_eos = 'none'", "leave it none"
        if p.missing_eos == "replace" and value > 0:
            yield (
                field,
                value,
                "would reward a response without an end",
                "use 0 or less (default -1)",
            )
        if p.missing_eos == "subtract" and value < 0:
            yield field, value, "subtracted would raise the score", "use 0 or more (default 1)"


def sample_rules(path: str, s: SampleConfig) -> Iterator[Problem]:
    if s.temperature == 0 and s.samples_per_prompt > 1:
        yield (
            f"{path}.samples_per_prompt",
            s.samples_per_prompt,
            "would be copies of one greedy response",
            "use a temperature above 0, or 1 sample",
        )


def evaluate_rules(path: str, e: EvaluateConfig) -> Iterator[Problem]:
    if e.temperature == 0 and e.best_of > 1:
        yield (
            f"{path}.best_of",
            e.best_of,
            "would choose among copies of one greedy response",
            "use a temperature above 0, or best_of = 1",
        )
    for i, name in enumerate(e.policies):
        if name in e.policies[:i]:
            yield f"{path}.policies[{i}]", name, "is named twice", "name it once"


def policy_rules(config: Config, verb: str | None) -> Iterator[Problem]:
    """What the evaluation compares is trained by this run."""
    known = dict.fromkeys(("pretrain", "sft", "init", "ppo", *(arm.name for arm in config.arms)))
    for i, name in enumerate(config.evaluate.policies if "evaluate" in uses(verb) else ()):
        if name not in known:
            yield (
                f"evaluate.policies[{i}]",
                name,
                "is no policy of this run",
                suggestion(name, known, "use one of"),
            )


def suggestion(word: str, known, otherwise: str = "known are") -> str:
    """``did you mean ...?``, or the whole list where nothing is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else f"{otherwise} {', '.join(map(str, known))}"


def model_fit_rules(config: Config, verb: str | None) -> Iterator[Problem]:
    """What the sections that a verb uses ask of the model: positions, vocabulary."""
    sections, model, data = uses(verb), config.model, config.data
    if not sections:
        return
    pieces = config.tokenizer.vocab_size
    if verb is not None and not config.tokenizer.path and pieces != model.vocab_size:
        yield (
            "model.vocab_size",
            model.vocab_size,
            f"is not tokenizer.vocab_size = {pieces}",
            "give both the same, or name a trained tokenizer as tokenizer.path",
        )
    other = config.reward.model
    if sections & {"reward", "ppo"} and other is not None and other.vocab_size != model.vocab_size:
        yield (
            "reward.model.vocab_size",
            other.vocab_size,
            f"is not model.vocab_size = {model.vocab_size}: policy and reward model share a tokenizer",
            "give both the same",
        )
    alike = other is None or replace(other, **{f: getattr(model, f) for f in AS_RUN}) == model
    if "reward" in sections and not alike and not config.reward.init_from:
        yield (
            "reward.init_from",
            "",
            "is empty, but the reward model differs from the SFT model",
            "name parameters of its own shape, or set reward.model to none",
        )
    for name in sorted(sections & {"pretrain", "ppo"}):
        field = "row_length" if name == "pretrain" else "ptx_row_length"
        length = getattr(getattr(config, name), field)
        restarts = name == "pretrain" and config.pretrain.cross_document_mask
        if length > model.context_length and not restarts:
            yield (
                f"{name}.{field}",
                length,
                f"exceeds the model's context_length = {model.context_length}",
                "shorten the rows, or lengthen the context",
            )
    longest = data.max_prompt_tokens + data.max_response_tokens
    for name in sorted(sections & {"sft", "init", "reward"}):
        where = other if name == "reward" and other is not None else model
        if longest > where.context_length:
            yield (
                "data.max_prompt_tokens",
                data.max_prompt_tokens,
                f"and data.max_response_tokens = {data.max_response_tokens} exceed the "
                + f"context_length = {where.context_length} of the model in {name}",
                "shorten them, or lengthen the context",
            )
        row = getattr(config, name).row_length
        if longest > row:
            yield (
                f"{name}.row_length",
                row,
                f"does not hold data.max_prompt_tokens + data.max_response_tokens = {longest} tokens",
                "lengthen the rows, or shorten the limits",
            )
    if sections & {"ppo", "sample", "evaluate"}:
        ppo = config.ppo
        total = ppo.prompt_length + ppo.response_length
        for role, where in (("policy", model), ("reward model", other or model)):
            if total > where.context_length:
                yield (
                    "ppo.response_length",
                    ppo.response_length,
                    f"and ppo.prompt_length = {ppo.prompt_length} exceed the {role}'s "
                    + f"context_length = {where.context_length}",
                    "shorten them, or lengthen the context",
                )


def _splits(mesh: MeshConfig, model: ModelConfig, name: str) -> Iterator[Problem]:
    """What instructax.partitioning splits of a network, and by how much; an inferred axis counts as 1 here."""
    tensor, shares, last = max(mesh.model, 1), max(mesh.fsdp, 1), "fsdp"
    if model.shard_over == "data+fsdp" and mesh.data > 1:
        shares, last = shares * mesh.data, "data"
    for axis, parts, field, size in (
        ("model", tensor, "num_heads", model.num_heads),
        ("model", tensor, "kv_heads", model.kv_heads),
        ("model", tensor, "mlp_width", model.mlp_width),
        (last, shares, "d_model", model.d_model),
        ("model", tensor * shares, "padded_vocab_size", model.padded_vocab_size),
    ):
        if size > 1 and size % parts:
            yield (
                f"mesh.{axis}",
                getattr(mesh, axis),
                f"does not split {name}'s {field} = {size} into {parts}",
                "use a divisor, or change the model",
            )


def mesh_rules(config: Config, verb: str | None) -> Iterator[Problem]:
    mesh, model = config.mesh, config.model
    axes = {"data": mesh.data, "fsdp": mesh.fsdp, "model": mesh.model}
    for name, size in axes.items():
        if size == 0:
            yield f"mesh.{name}", size, "must be -1 or at least 1", "use -1 to infer it"
    inferred = [name for name, size in axes.items() if size == -1]
    if len(inferred) > 1:
        yield (
            f"mesh.{inferred[1]}",
            -1,
            f"and mesh.{inferred[0]} cannot both be inferred",
            "give all axes but one",
        )
    yield from _splits(mesh, model, "the model")
    other = config.reward.model
    if uses(verb) & {"reward", "ppo", "evaluate"} and other is not None:
        yield from _splits(mesh, other, "the reward model")
    shards = mesh.data * mesh.fsdp
    if inferred and inferred != ["model"]:
        return
    slots = config.ppo.rollout_slots
    if uses(verb) & {"sft", "init", "ppo", "sample", "evaluate"} and slots and slots % shards:
        yield (
            "ppo.rollout_slots",
            slots,
            f"is not divided by the {shards} batch shards of mesh.data * mesh.fsdp",
            f"use a multiple of {shards}, or none",
        )
    for name in sorted(uses(verb) - {"reward"}):
        field = "minibatch_size" if name == "ppo" else "batch_size"
        section = getattr(config, name)
        size = getattr(section, field)
        parts = section.grad_accumulation if name in TRAINED else 1
        if size % (shards * parts):
            of_each = f" for each of {parts} microbatches" if parts > 1 else ""
            yield (
                f"{name}.{field}",
                size,
                f"is not divided by the {shards} batch shards of mesh.data * mesh.fsdp{of_each}",
                f"use a multiple of {shards * parts}",
            )
