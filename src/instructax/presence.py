"""Rules of a config that look at the disk: sources are named in a readable way, and are there.

Like :mod:`instructax.consistency`, a generator of problems. Only what a verb reads is looked for.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator

from instructax.config import Config
from instructax.consistency import STAGE_NAMES, Problem, uses

TFDS = re.compile(r"tfds:[^@#]+@[^#]+(#.*)?", re.DOTALL)
SOURCES = (
    "data.pretrain",
    "data.pretrain_validation",
    "data.demonstrations",
    "data.demonstrations_validation",
    "data.comparisons",
    "data.comparisons_validation",
    "data.prompts",
    "data.prompts_validation",
    "data.prompts_evaluation",
)


def source_rules(config: Config) -> Iterator[Problem]:
    """What can be said of the names alone."""
    for path in (*SOURCES, "tokenizer.train_paths", "sample.prompts"):
        for i, source in enumerate(_get(config, path)):
            if not source:
                yield f"{path}[{i}]", source, "is an empty path", "name a file, or leave it out"
            if source.startswith("tfds:") and not TFDS.fullmatch(source):
                yield (
                    f"{path}[{i}]",
                    source,
                    "is no TFDS source",
                    "write tfds:NAME@FOLDER or tfds:NAME@FOLDER#SPLIT",
                )
    for path in SOURCES:
        if config.data.world is not None and _get(config, path):
            yield (
                path,
                _get(config, path),
                "names files, but data.world generates all data",
                "leave one of the two out",
            )


def file_rules(config: Config, verb: str) -> Iterator[Problem]:
    """What the verb cannot do without is named; what it reads is there."""
    world = config.data.world is not None
    curated = _curated(config) and verb != "data"
    for path, needed in _read(config, verb):
        sources, of_data = _get(config, path), path.startswith("data.")
        if curated and of_data:
            continue
        if needed and not sources and not (world and of_data):
            yield (
                path,
                sources,
                f"names nothing, but `{verb}` needs it",
                "name files, or set data.world",
            )
        for i, source in enumerate(sources):
            yield from _missing(f"{path}[{i}]", source)
    if config.tokenizer.path:
        yield from _missing("tokenizer.path", config.tokenizer.path)
    # A stage or an arm of this run may be named before it has been trained.
    of_this_run = (*STAGE_NAMES, "ppo", *(arm.name for arm in config.arms))
    for path in _weights(verb):
        source = _get(config, path)
        in_run = os.path.join(config.run_dir, config.name, source)
        if source and source not in of_this_run and not os.path.exists(in_run):
            yield from _missing(path, source, folder=True)


def _get(config: Config, path: str):
    section, field = path.split(".")
    return getattr(getattr(config, section), field)


def _curated(config: Config) -> bool:
    """Whether the run, or the run whose seed it is, has its data; the sources are then not read again."""
    folder = os.path.join(config.run_dir, config.name)
    places = (folder, os.path.dirname(folder))
    return any(os.path.isfile(os.path.join(place, "data", "curation.json")) for place in places)


def _read(config: Config, verb: str) -> Iterator[tuple[str, bool]]:
    """(field, whether the verb cannot do without it). The first verb that needs data curates all of it."""
    ppo = config.ppo
    needed = {
        "data": {"data.demonstrations"}
        if not any(_get(config, path) for path in SOURCES)
        else set(),
        "pretrain": {"data.pretrain"},
        "sft": {"data.demonstrations"}
        | ({"data.pretrain"} if config.sft.pretrain_mix > 0 else set()),
        "init": {"data.demonstrations"}
        | ({"data.pretrain"} if config.init.pretrain_mix > 0 else set()),
        "reward": {"data.comparisons"},
        "ppo": {"data.prompts"},
        "evaluate": set() if config.data.prompts else {"data.prompts_evaluation"},
    }
    if config.reward.center_on_demonstrations:
        needed["reward"].add("data.demonstrations")
    if ppo.ptx_coef != 0 or ppo.ptx_at_zero == "measure":
        needed["ppo"].add("data.pretrain")
    texts = ("data.pretrain", "data.demonstrations", "data.prompts", "tokenizer.train_paths")
    trains_tokenizer = verb in ("run", "tokenizer") and not config.tokenizer.path
    needed["run"] = set().union(*needed.values())
    needed["tokenizer"] = set() if any(_get(config, path) for path in texts) else {"data.pretrain"}
    if verb == "sample" and config.sample.prompts:
        yield "sample.prompts", True
        return
    needed["sample"] = needed["evaluate"]
    if trains_tokenizer:
        yield "tokenizer.train_paths", False
    if verb != "tokenizer" or not config.tokenizer.train_paths:
        yield from ((path, path in needed[verb]) for path in SOURCES)


def _weights(verb: str) -> Iterator[str]:
    for section in sorted(uses(verb) & {"pretrain", "sft", "init", "reward", "ppo"}):
        yield f"{section}.init_from"
    if verb in ("run", "ppo"):
        yield "ppo.reward_from"
    if verb == "sample":
        yield "sample.checkpoint"


def _missing(path: str, source: str, folder: bool = False) -> Iterator[Problem]:
    """Folders are what weights and TFDS data sets lie in; elsewhere they are a mistake."""
    where = source
    if source.startswith("tfds:"):
        where, folder = source.partition("#")[0].partition("@")[2], True
    if "://" in where:  # a bucket: only the stage that reads it can tell
        return
    where = os.path.expanduser(where)
    try:
        found = [where] if os.path.exists(where) else glob.glob(where, recursive=True)
    except ValueError:  # a name that no file system can hold
        found = []
    if not found:
        yield path, source, f"is not there, seen from {os.getcwd()}", "correct the path"
    elif not folder and any(map(os.path.isdir, found)):
        yield path, source, "is or holds a folder", "name its files, for example FOLDER/*.jsonl"
