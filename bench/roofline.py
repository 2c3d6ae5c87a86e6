"""The least time that the machine allows for a case's work: its FLOPs at the matrix rate, its bytes at the bandwidth.

Counted for the real tokens, each once: a prompt once however many responses it has, attention over
what a token sees, logits where a loss or a sampler needs them. Nothing is recomputed.
"""

from __future__ import annotations

from bench import cases
from bench.cases import Case
from bench.ours import model_config
from instructax.config import ModelConfig
from instructax.plan import model_flops


def _forward(m: ModelConfig, first: float, tokens: float, unembedded: float) -> float:
    """One sequence's tokens, the first of which sees ``first`` tokens and itself."""
    return model_flops.forward(m, tokens, first + (tokens + 1) / 2, unembedded=unembedded)


def reading(case: Case, unembedded: float, ways: int = 1) -> float:
    """The least floating-point operations of one network's look at prompts and ``ways`` responses each."""
    w, m = case.work, model_config(case.shape)
    prompt = _forward(m, 0, w.prompt, 0.0)
    return w.rows * (prompt + ways * _forward(m, w.prompt, w.response, unembedded))


def flops(case: Case) -> float:
    """The least floating-point operations."""
    w = case.work
    if w.kind == "sft":
        return 3 * reading(case, w.response)
    if w.kind == "reward":
        return 3 * reading(case, 0.0, w.ways)
    if w.kind == "generate":
        m, lengths = model_config(case.shape), cases.lengths(case).tolist()
        prompts = w.rows * _forward(m, 0, w.prompt, 0.0)
        return prompts + sum(_forward(m, w.prompt, tokens, tokens) for tokens in lengths)
    sampled = reading(case, w.response)
    # Old log-probabilities are the sampler's; the reference reads the words, value and reward a scalar.
    scored = sampled + 2 * reading(case, 0.0)
    updated = 3 * (sampled + reading(case, 0.0))
    return sampled + scored + w.epochs * updated


def decoded_bytes(case: Case) -> float:
    """What decoding must read: every weight once a step of full slots, and the cache as far as it is filled."""
    w, m = case.work, model_config(case.shape)
    width = 2 if case.shape.dtype == "bfloat16" else 4
    weights = (model_flops.matrix_parameters(m) + m.vocab_size * m.d_model) * width
    cache = 2 * m.num_layers * m.kv_heads * m.head_width * width
    length_B = cases.lengths(case)
    steps = length_B.sum() / (w.slots or w.rows)
    return float(steps * weights + (length_B * (w.prompt + length_B / 2)).sum() * cache)


def seconds(case: Case, flop_rate: float, bandwidth: float) -> float:
    """The least time of one unit of work."""
    at_rate = flops(case) / flop_rate
    if case.work.kind != "generate":
        return at_rate
    return max(at_rate, decoded_bytes(case) / bandwidth)


def other_ways(case: Case) -> dict[str, float]:
    """What a peer's ways of doing the same work cost, in multiples of the least floating-point operations."""
    w, m = case.work, model_config(case.shape)
    if w.kind == "reward":
        sequences = 3 * w.rows * w.ways * _forward(m, 0, w.prompt + w.response, 0.0)
        in_multiples = sequences / flops(case)
        return {"K sequences": in_multiples, "pairs": (w.ways - 1) * in_multiples}
    if w.kind == "generate" and w.mean:
        lengths = cases.lengths(case).tolist()
        longest = [max(lengths[i : i + w.slots]) for i in range(0, w.rows, w.slots)]
        prompts = w.rows * _forward(m, 0, w.prompt, 0.0)
        responses = w.slots * sum(_forward(m, w.prompt, tokens, tokens) for tokens in longest)
        return {"batches until the longest ends": (prompts + responses) / flops(case)}
    return {}


def main() -> None:
    for case in cases.cpu_cases():
        if case.form in ("", "shared"):
            for way, multiple in other_ways(case).items():
                print(f"{case.name}, {case.size}: {way} take {multiple:.2f} times the least FLOPs")


if __name__ == "__main__":
    main()
