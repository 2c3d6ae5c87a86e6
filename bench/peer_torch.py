"""The peer in plain torch and transformers: SFT, K forwards of a ranking, generation."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

from bench import cases
from bench.cases import Case, Shape

PACKAGES = ("torch", "transformers")
PAD = 0
PRODUCTS = "matrix products"
PRODUCT = re.compile(r"aten::(mm|addmm|bmm|baddbmm|_scaled_dot_product_flash_attention\w*)")


def config(shape: Shape) -> GPT2Config:
    return GPT2Config(
        vocab_size=shape.vocab_size,
        n_positions=shape.context_length,
        n_embd=shape.d_model,
        n_layer=shape.num_layers,
        n_head=shape.num_heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=PAD,
        num_labels=1,
    )


def where(device: str) -> torch.device:
    return torch.device("cuda" if device == "gpu" else "cpu")


def compute(shape: Shape, device: str):
    """bfloat16 compute over float32 parameters, as on our side, or float32 alone."""
    if shape.dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(where(device).type, torch.bfloat16)


def build(case: Case, device: str, compiled: bool = False) -> Callable[[], Any]:
    """One unit of the case's work; it is done when it returns."""
    torch.manual_seed(0)
    once = {"sft": _sft, "reward": _reward, "generate": _generate}[case.work.kind](
        case, device, compiled
    )

    def done():
        once()
        if device == "gpu":
            torch.cuda.synchronize()

    return done


def _model(kind, case: Case, device: str, compiled: bool):
    model = kind(config(case.shape)).to(where(device))
    if case.recompute:
        model.gradient_checkpointing_enable()
    return (torch.compile(model) if compiled else model), model


def _optimizer(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.01, fused=True)


def _sft(case: Case, device: str, compiled: bool) -> Callable[[], None]:
    forward, model = _model(GPT2LMHeadModel, case, device, compiled)
    optimizer = _optimizer(model.train())
    token, response = (torch.tensor(x).to(where(device)).long() for x in cases.texts(case))
    label = torch.where(response.bool(), token, -100)

    def once():
        with compute(case.shape, device):
            loss = forward(input_ids=token, labels=label, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return once


def _reward(case: Case, device: str, compiled: bool) -> Callable[[], None]:
    """Every response behind its own prompt; all pairs of a prompt in one loss."""
    forward, model = _model(GPT2ForSequenceClassification, case, device, compiled)
    optimizer = _optimizer(model.train())
    ways = case.work.ways
    token = torch.tensor(cases.sequences(case)).long().flatten(0, 1).to(where(device))
    order = torch.tensor(cases.rankings(case)[2]).long().argsort(1).to(where(device))
    better, worse = torch.triu_indices(ways, ways, 1, device=where(device))

    def once():
        with compute(case.shape, device):
            score = forward(input_ids=token, use_cache=False).logits
        best_first = score.float().view(-1, ways).gather(1, order)
        difference = best_first[:, better] - best_first[:, worse]
        loss = -torch.nn.functional.logsigmoid(difference).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return once


def _generate(case: Case, device: str, compiled: bool) -> Callable[[], Any]:
    _, model = _model(GPT2LMHeadModel, case, device, compiled)
    model.eval()
    if case.shape.dtype == "bfloat16":
        model.bfloat16()
    token = torch.tensor(cases.prompts(case)).long().to(where(device))
    # A batch goes on until its longest response ends.
    batches = token.split(case.work.slots or len(token))
    longest = [int(x.max()) for x in torch.tensor(cases.lengths(case)).split(len(batches[0]))]

    def once():
        for batch, length in zip(batches, longest, strict=True):
            out = model.generate(
                input_ids=batch,
                attention_mask=torch.ones_like(batch),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=length,
                pad_token_id=PAD,
            )
            if (made := out.shape[1] - batch.shape[1]) != length:
                raise RuntimeError(f"generated {made} tokens, not {length}")

    return once


def went(once: Callable[[], Any]) -> dict[str, float]:
    """Seconds of ``once`` under the profiler: all, and those of matrix products, attention's kernel among them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        began = time.perf_counter()
        once()
        found = {"all": time.perf_counter() - began}
    operations = [op for op in trace.key_averages() if PRODUCT.fullmatch(op.key)]
    if not operations:
        raise RuntimeError(f"the trace has no operation called {PRODUCT.pattern}")
    return found | {PRODUCTS: sum(op.self_cpu_time_total for op in operations) / 1e6}


def rates(device: str) -> tuple[float, float]:
    """(FLOP/s of a large matrix product in the device's dtype, bytes/s of a copy), best of several."""
    size, dtype = (8192, torch.bfloat16) if device == "gpu" else (3072, torch.float32)
    x = torch.randn(size, size, dtype=dtype, device=where(device))
    line = torch.zeros(2**27, device=where(device))
    out = torch.empty_like(line)
    return (
        2 * size**3 / _best(lambda: x @ x, device),
        2 * line.nbytes / _best(lambda: torch.add(line, 1.0, out=out), device),
    )


def _best(function: Callable[[], Any], device: str, times: int = 5) -> float:
    def whole():
        function()
        if device == "gpu":
            torch.cuda.synchronize()

    whole()
    found = []
    for _ in range(times):
        began = time.perf_counter()
        whole()
        found.append(time.perf_counter() - began)
    return min(found)
