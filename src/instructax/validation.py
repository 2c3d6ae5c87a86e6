"""One validator over the resolved config, wherever a value came from: file, flag, JSON or an arm.

First the type of every field against its annotation and its range against :mod:`instructax.ranges`, then the
rules of :mod:`instructax.consistency` and :mod:`instructax.presence`, which may then rely on both.
The first problem is raised as one line: field, value, what is wrong, what to do.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal, Union

from instructax import consistency, presence
from instructax.config import Config, PpoConfig, UserError
from instructax.consistency import STAGE_NAMES, Problem, suggestion
from instructax.ranges import ANY, RANGES

LARGEST = 2**63 - 1
FOLDER_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=-]*")
RUN_NAME = re.compile(
    rf"{FOLDER_NAME.pattern}(/{FOLDER_NAME.pattern})*"
)  # run/seed0 is one seed of a run


def validate(config: Config, verb: str | None = None) -> None:
    """Refuse a config that cannot be meant.

    ``verb`` says what is about to run: files are looked for, and sections held against the model
    and the mesh, only where that verb uses them. None checks everything but files.

    Raises:
      UserError: the first problem, in one line.
    """
    check_fields(config)
    _raise_first(_problems(config, verb))


def check_fields(config: Config) -> None:
    """The first half of :func:`validate`: type and range of each field for itself."""
    _raise_first(_misfits(config, Config, ""))


def _raise_first(problems: Iterator[Problem]) -> None:
    for path, value, wrong, remedy in problems:
        raise UserError(f"{path} = {shown(value)}: {wrong}; {remedy}")


def _problems(config: Config, verb: str | None) -> Iterator[Problem]:
    yield from _names(config)
    yield from _sections(config)
    known = hints(PpoConfig)
    for i, arm in enumerate(config.arms):
        seen = set()
        for name, value in arm.changes:
            path = f"arms[{i}].changes"
            if name not in known:
                yield path, name, "is no field of PpoConfig", suggestion(name, known)
            if name in seen:
                yield path, name, "is changed twice", "change it once"
            seen.add(name)
            yield from _misfits(value, known[name], f"{path}.{name}")
            yield from _out_of_range(PpoConfig, name, value, f"{path}.{name}")
        ppo = dataclasses.replace(config.ppo, **dict(typing.cast(Any, arm.changes)))
        # Flags of another verb change the ppo section without a thought of the arms.
        if verb in ("run", None):
            yield from consistency.ppo_rules(f"arms[{i}].ppo", ppo)
            yield from consistency.model_fit_rules(dataclasses.replace(config, ppo=ppo), verb)
    yield from consistency.model_fit_rules(config, verb)
    yield from consistency.mesh_rules(config, verb)
    yield from consistency.policy_rules(config, verb)
    yield from presence.source_rules(config)
    if verb not in (None, "report"):
        yield from presence.file_rules(config, verb)


# Beside the stages: what `instructax run` does and what it measures.
_OF_THE_RUN = (
    "comparisons", "comparisons_validation", "baselines", "evaluate", "best_of_n", "base",
)  # fmt: skip


def _names(config: Config) -> Iterator[Problem]:
    arms = [arm.name for arm in config.arms]
    if not RUN_NAME.fullmatch(config.name):
        yield "name", config.name, "cannot name a folder", "use letters, digits, _ . + = -"
    for i, name in enumerate(arms):
        if not FOLDER_NAME.fullmatch(name):
            yield f"arms[{i}].name", name, "cannot name a folder", "use letters, digits, _ . + = -"
        if name in (*STAGE_NAMES, *_OF_THE_RUN):
            yield f"arms[{i}].name", name, "is a name of the run's own", "give the arm another"
        if name in arms[:i]:
            yield f"arms[{i}].name", name, "names two arms", "give each arm its own name"
    if not config.run_dir:
        yield "run_dir", config.run_dir, "is empty", "name a folder, '.' for this one"
    for path, texts in (
        ("ppo.stop_texts", config.ppo.stop_texts),
        ("data.names", config.data.names),
    ):
        if "" in texts:
            yield path, texts, "holds an empty text", "leave it out"


def _sections(config: Config) -> Iterator[Problem]:
    """The rules within one section."""
    yield from consistency.model_rules("model", config.model)
    if config.reward.model is not None:
        yield from consistency.model_rules("reward.model", config.reward.model)
    pretrain = config.pretrain
    yield from consistency.warmup_rule("pretrain.optimizer", pretrain.optimizer, pretrain.steps)
    for name in ("pretrain", "sft", "init", "reward"):
        section = getattr(config, name)
        yield from consistency.accumulation_rule(
            name, section.grad_accumulation, "batch_size", section.batch_size
        )
    yield from consistency.ppo_rules("ppo", config.ppo)
    yield from consistency.sample_rules("sample", config.sample)
    yield from consistency.evaluate_rules("evaluate", config.evaluate)


def hints(cls: type) -> dict[str, Any]:
    """Field -> resolved annotation."""
    resolved = typing.get_type_hints(cls)
    return {f.name: resolved[f.name] for f in dataclasses.fields(cls)}


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The members of a union; of any other annotation, itself."""
    union = typing.get_origin(hint) in (Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def is_section(hint: Any) -> bool:
    """Whether an annotation is one of the config's dataclasses."""
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def describe(hint: Any) -> str:
    """An annotation in words: ``an integer``, ``none or a number``, ``one of 'a', 'b'``."""
    members = alternatives(hint)
    if len(members) > 1:
        return " or ".join(sorted((describe(m) for m in members), key=lambda d: d != "none"))
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        members = typing.get_args(hint)
        if members[-1] is Ellipsis:
            return f"a tuple, each {describe(members[0])}"
        return f"a tuple of {len(members)} ({'; '.join(map(describe, members))})"
    words = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
    return words.get(hint) or ("none" if hint is type(None) else f"a {hint.__name__}")


def shown(value: object) -> str:
    """``repr`` on one line, cut short; some objects have none."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # noqa: BLE001 - an integer of 5,000 digits, an object whose repr is broken
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 80 else text[:77] + "..."


def _misfits(value: Any, hint: Any, path: str) -> Iterator[Problem]:
    """Where a value, or a part of it, is not what its annotation says."""
    members = alternatives(hint)
    if len(members) > 1:
        if any(not any(_misfits(value, member, path)) for member in members):
            return
        # A container of the right kind: say which part of it is wrong.
        members = tuple(m for m in members if type(value) is (typing.get_origin(m) or m))
        if len(members) == 1 and not isinstance(value, (int, float, str)):
            yield from _misfits(value, members[0], path)
        else:
            yield path, value, f"must be {describe(hint)}", _where_to_set(path)
    elif is_section(hint):
        if type(value) is not hint:
            yield path or "config", value, f"must be {describe(hint)}", "build one"
        for name, inner in hints(hint).items() if type(value) is hint else ():
            at = f"{path}.{name}" if path else name
            yield from _misfits(getattr(value, name), inner, at)
            yield from _out_of_range(hint, name, getattr(value, name), at)
    elif typing.get_origin(hint) is tuple:
        items = typing.get_args(hint)
        endless = items[-1] is Ellipsis
        fits = type(value) is tuple and (endless or len(items) == len(value))
        if not fits:
            yield path, value, f"must be {describe(hint)}", "write a tuple, (a,) for one"
        for i, part in enumerate(value if fits else ()):
            yield from _misfits(part, items[0] if endless else items[i], f"{path}[{i}]")
    elif not _is_scalar(value, hint):
        yield path, value, f"must be {describe(hint)}", _where_to_set(path)


def _is_scalar(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) is Literal:
        return any(type(value) is type(c) and value == c for c in typing.get_args(hint))
    if isinstance(value, bool) or hint is bool:
        return hint is bool and isinstance(value, bool)
    if hint is str:
        return isinstance(value, str) and "\0" not in value
    if isinstance(value, int):
        return hint in (int, float) and abs(value) <= LARGEST
    return isinstance(value, hint) and (hint is not float or math.isfinite(value))


def _out_of_range(cls: type, name: str, value: Any, path: str) -> Iterator[Problem]:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        allowed = RANGES[cls].get(name, ANY)
        if value not in allowed:
            yield path, value, f"must be {allowed}", _where_to_set(path)


def _where_to_set(path: str) -> str:
    if "[" in path:
        return "correct it in the config file"
    return f"correct it in the config file, or give --{path.replace('_', '-')}"
