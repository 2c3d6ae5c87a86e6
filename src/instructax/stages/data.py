"""`instructax data`: bring a run's records together, curate them, and write them where stages look.

Every later stage reads ``run/data/<name>.jsonl`` through :func:`records`. This is also the one door
to the embedded world: other stages ask here for gold grades and simulated labelers.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from instructax.config import Config, UserError
from instructax.data import curation
from instructax.data.sources import load_records
from instructax.records import PROMPT_SOURCES, Record, prompt_text
from instructax.runtime.distributed import on_main, wait_for
from instructax.stages.context import run_folder, write_json

KINDS = {
    "pretrain": "text",
    "pretrain_validation": "text",
    "demonstrations": "demonstration",
    "demonstrations_validation": "demonstration",
    "comparisons": "comparison",
    "comparisons_validation": "comparison",
    "prompts": "prompt",
    "prompts_validation": "prompt",
    "prompts_evaluation": "prompt",
    # Prompts whose samples are to be ranked: the embedded world's, or the user's own.
    "prompts_reward": "prompt",
    "prompts_reward_validation": "prompt",
}
_OF_WORLD = {
    "pretrain": "pretrain_texts",
    "pretrain_validation": "pretrain_heldout",
    "demonstrations": "demonstrations",
    "demonstrations_validation": "demonstrations_validation",
    "prompts_validation": "prompts_validation",
    "prompts_evaluation": "prompts_evaluation",
    "prompts_reward": "prompts_reward",
    "prompts_reward_validation": "prompts_reward_validation",
}


def run(config: Config) -> None:
    """Write the records that the run trains and is judged on, and ``curation.json``."""
    on_main(lambda: _make(config))


def _make(config: Config) -> None:
    folder = data_folder(config)
    sets, report = _from_world(config) if config.data.world else _from_files(config)
    for name, rows in sets.items():
        _write_lines(folder / f"{name}.jsonl", rows)
    write_json(folder / "curation.json", report)
    sizes = ", ".join(f"{name} {len(rows)}" for name, rows in sets.items())
    print(f"data: {sizes}; {folder}")


def data_folder(config: Config) -> Path:
    """Seeds of one run share their data: it lies beside their folders."""
    own = run_folder(config) / "data"
    shared = run_folder(config).parent / "data"
    has_own = (own / "curation.json").is_file()
    return shared if not has_own and (shared / "curation.json").is_file() else own


def records(config: Config, name: str) -> Sequence[Record]:
    """The records called ``name``: collected for this run, else curated, made now if need be.

    Raises:
      UserError: the config names no such data.
    """
    if name not in KINDS:
        raise ValueError(f"no data set is called {name!r}, known: {sorted(KINDS)}")
    path, stamp = on_main(lambda: _found(config, name))
    wait_for(Path(path))
    return _load(str(Path(path).resolve()), KINDS[name], stamp)


def _found(config: Config, name: str) -> tuple[str, int]:
    """The file of records, and when it was written."""
    path = place(config, name)
    return str(path), path.stat().st_mtime_ns


def place(config: Config, name: str) -> Path:
    """The file of records, curated now if need be (main process only).

    Raises:
      UserError: the config names no such data.
    """
    own = run_folder(config) / "data" / f"{name}.jsonl"
    path = own if own.is_file() else data_folder(config) / f"{name}.jsonl"
    if not path.is_file() and not (data_folder(config) / "curation.json").is_file():
        _make(config)
        path = data_folder(config) / f"{name}.jsonl"
    if not path.is_file():
        raise UserError(f"this stage needs {name}; name files with --data.{name.replace('_', '-')}")
    return path


@functools.lru_cache(maxsize=32)
def _load(path: str, kind: str, stamp: int) -> Sequence[Record]:
    return list(load_records(kind, path))


def exists(config: Config, name: str) -> bool:
    """Whether the run has such records; makes the run's data if that has not been done."""
    return on_main(lambda: _exists(config, name))


def _exists(config: Config, name: str) -> bool:
    if not (data_folder(config) / "curation.json").is_file():
        _make(config)
    places = (run_folder(config) / "data", data_folder(config))
    return any((place / f"{name}.jsonl").is_file() for place in places)


def add_records(config: Config, name: str, rows: Sequence[Record]) -> None:
    """Records that a run makes itself (comparisons from its own samples); main process only."""
    _write_lines(run_folder(config) / "data" / f"{name}.jsonl", rows)


def all_texts(config: Config) -> Iterator[str]:
    """Everything that the tokenizer should know: pretraining text, demonstrations, prompts."""
    for name in ("pretrain", "demonstrations", "prompts"):
        if not exists(config, name):
            continue
        for record in records(config, name):
            if "text" in record:
                yield record["text"]
                continue
            yield from (m["content"] for m in record.get("messages", ()))
            if "prompt" in record:
                yield record["prompt"]
            if "response" in record:
                yield record["response"]


def grader(config: Config) -> Callable[[Record, str, bool], dict[str, float]] | None:
    """(prompt record, response, finished) -> gold {helpful, truthful, harmless, total}, where there is gold."""
    if config.data.world is None:
        return None
    world = _world(config.data.world)

    def grade(record: Record, response: str, finished: bool) -> dict[str, float]:
        return dataclasses.asdict(world.grade(record, response, finished))

    return grade


def labelers(config: Config):
    """(training labeler ids, held-out ids, rank) of the embedded world; rank as in ``World.rank``."""
    if config.data.world is None:
        raise UserError(
            "comparisons are collected from simulated labelers, which only the embedded world has; "
            "have people rank the samples and name the files with --data.comparisons"
        )
    world = _world(config.data.world)
    return world.labeler_ids, world.heldout_labeler_ids, world.rank


@functools.lru_cache(maxsize=2)
def _world(world_config):
    from instructax.worlds.world import make_world

    return make_world(world_config)


def _from_world(config: Config) -> tuple[dict[str, list[Record]], dict[str, Any]]:
    """The world's own sets; its raw customer prompts are curated into the PPO prompts."""
    world = _world(config.data.world)
    sets = {name: list(getattr(world, field)) for name, field in _OF_WORLD.items()}
    sent = [r for r in world.prompts_raw if r["split"] == "train"]
    sets["prompts"], steps = _curate(config, sent)
    _, held_out = _curate(config, [r for r in world.prompts_raw if r["split"] != "train"])
    report = {"prompts": steps, "held_out_prompts": held_out, "overlap": _overlap(config, sets)}
    return sets, report


def _from_files(config: Config) -> tuple[dict[str, list[Record]], dict[str, Any]]:
    c, folder = config.data, run_folder(config) / "data"
    sets: dict[str, list[Record]] = {}
    report: dict[str, Any] = {"quarantined": {}}
    for name, kind in KINDS.items():
        paths = getattr(c, name, ())
        if not paths:
            continue
        loaded = load_records(
            kind,
            paths,
            on_bad_record=c.on_bad_record,
            quarantine=folder / "quarantine" / f"{name}.jsonl"
            if c.on_bad_record == "quarantine"
            else None,
            max_responses=config.reward.max_responses,
        )
        bad = {path: count for path, count in loaded.quarantined.items() if count}
        if bad:
            report["quarantined"][name] = bad
        sets[name] = list(loaded)
    for name in ("demonstrations", "prompts"):
        if name in sets:
            sets[name], report[name] = _curate(config, sets[name])
    for name in ("pretrain", "demonstrations", "comparisons", "prompts"):
        held_out = f"{name}_validation"
        if name in sets and held_out not in sets:
            sets[name], sets[held_out] = _split(config, sets[name])
    for name in [name for name in sets if KINDS[name] in ("demonstration", "prompt")]:
        sets[name], expanded = curation.expand_few_shot(sets[name])
        if expanded.counts["records"]:
            report.setdefault("few_shot", {})[name] = dataclasses.asdict(expanded)
    if "prompts" not in sets and "demonstrations" in sets:
        for suffix in ("", "_validation"):
            sets[f"prompts{suffix}"] = [_as_prompt(r) for r in sets[f"demonstrations{suffix}"]]
    if "prompts_validation" in sets:
        sets.setdefault("prompts_evaluation", sets["prompts_validation"])
    report["overlap"] = _overlap(config, sets)
    return {name: rows for name, rows in sets.items() if rows}, report


def _as_prompt(record: Record) -> Record:
    """A demonstration's ``source`` may be anything, a prompt's is one of four kinds."""
    gone = {"response"} if record.get("source") in PROMPT_SOURCES else {"response", "source"}
    return {key: value for key, value in record.items() if key not in gone}


def _curate(config: Config, rows: Sequence[Record]) -> tuple[list[Record], list[dict[str, Any]]]:
    """InstructGPT section 3.2 and appendix A: personal data out, duplicates out, at most 200 a user."""
    c = config.data
    steps = []
    kept = list(rows)
    if c.remove_personal_data:
        kept, report = curation.remove_personal_data(kept, c.names)
        steps.append(report)
    kept, report = curation.deduplicate(kept, c.dedup_prefix_chars)
    steps.append(report)
    kept, report = curation.cap_per_user(kept, c.max_prompts_per_user)
    steps.append(report)
    return kept, [dataclasses.asdict(step) for step in steps]


def _split(config: Config, rows: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """By user, or by prompt where there is no user id; long texts, which have neither, by their end."""
    share = config.data.validation_fraction
    if rows and "text" in rows[0]:
        train, held_out = [], []
        for record in rows:
            cut = int(len(record["text"]) * (1 - share))
            train.append({**record, "text": record["text"][:cut]})
            held_out.append({**record, "text": record["text"][cut:]})
        return train, [record for record in held_out if record["text"].strip()]
    splits, _ = curation.split_by_user(rows, {"train": 1 - share, "validation": share})
    if not splits["train"] or not splits["validation"]:
        raise UserError(
            f"{len(rows)} records cannot be split into training and validation by user; "
            "name validation files in the config"
        )
    return splits["train"], splits["validation"]


def _overlap(config: Config, sets: Mapping[str, Sequence[Record]]) -> dict[str, Any]:
    training = [r for name in ("demonstrations", "prompts") for r in sets.get(name, ())]
    evaluation = sets.get("prompts_evaluation", ())
    if not training or not evaluation:
        return {}
    found = curation.prompt_overlap(training, evaluation, config.data.dedup_prefix_chars)
    return {k: v for k, v in dataclasses.asdict(found).items() if k != "indices"}


def _write_lines(path: Path, rows: Sequence[Record]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    temporary.replace(path)


def content_key(record: Record) -> str:
    """What bootstrap intervals resample: the content a prompt is about, or the prompt itself."""
    return str(record.get("content_key", prompt_text(record)))
