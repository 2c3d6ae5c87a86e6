"""`instructax sample`: prompt records with K responses each, ready to be ranked into comparisons."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import jax

from instructax.config import Config, UserError
from instructax.data.curation import expand_few_shot
from instructax.data.sources import load_records
from instructax.runtime.distributed import on_main
from instructax.stages import data
from instructax.stages.context import Run, load_params, open_run
from instructax.stages.sampling import Sample, Sampler


def run(config: Config) -> None:
    """Write one record a prompt: its own fields, ``responses`` and ``finished``."""
    run, c = open_run(config), config.sample
    if c.prompts:
        records, _ = expand_few_shot(load_records("prompt", c.prompts))
    else:
        records = list(data.records(config, "prompts_evaluation"))
    sampler = Sampler(
        run,
        records,
        batch_size=min(c.batch_size, len(records) * c.samples_per_prompt),
        temperature=c.temperature,
        top_k=c.top_k,
        top_p=c.top_p,
    )
    source = c.checkpoint or on_main(lambda: _newest(run.folder))
    with jax.set_mesh(run.mesh):
        params = load_params(run, source, config.model, "lm")
        key = run.key("sample")
        keys = [jax.random.fold_in(key, k) for k in range(c.samples_per_prompt)]
        rounds = sampler.rounds(params, keys)
    on_main(lambda: _write(run, sampler, rounds, source))


def _write(run: Run, sampler: Sampler, rounds: Sequence[Sequence[Sample]], source: str) -> None:
    path = Path(run.config.sample.output or run.folder / "samples" / "samples.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for i, record in enumerate(sampler.records):
            drawn = [samples[i] for samples in rounds]
            row = {
                **record,
                "responses": [sample.text for sample in drawn],
                "finished": [sample.finished for sample in drawn],
                "sampled_from": source,
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    left_out = sum(sampler.dropped.values())
    print(f"sample: {len(sampler.records)} prompts x {len(rounds)} from {source}, "
          f"{left_out} too long; {path}")  # fmt: skip


def _newest(folder: Path) -> str:
    """The stage of the run whose policy was saved last."""
    found = [
        path.parent
        for path in folder.glob("*/checkpoints")
        if path.parent.name != "reward" and any(path.iterdir())
    ]
    if not found:
        raise UserError(f"{folder} holds no policy yet; train one or give --sample.checkpoint")
    return max(found, key=lambda stage: (stage / "checkpoints").stat().st_mtime).name
