"""Where a config comes from and how it is written down: Python files, flags, JSON, arms.

Checking it is :mod:`instructax.validation`'s; nothing here looks at more than names.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import re
import sys
import traceback
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from instructax.config import Arm, Config, ModelConfig, PpoConfig, UserError, replace
from instructax.consistency import suggestion
from instructax.validation import alternatives, check_fields, describe, hints, is_section, shown


def load_config(path: str | Path) -> Config:
    """The config that the function ``config()`` of a Python file returns.

    Raises:
      UserError: no such file, no ``config()``, an error inside, or something else than a Config.
    """
    name = str(path)
    try:
        code = compile(Path(path).read_bytes(), name, "exec")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{name}: cannot be read ({reason}); give --config a Python file") from None
    except SyntaxError as error:
        raise UserError(f"{name}:{error.lineno}: {error.msg}; correct the config file") from None
    module = types.ModuleType(f"instructax_config_{Path(path).stem}")
    module.__file__ = name
    sys.modules[module.__name__] = module  # where dataclasses of the file look up their annotations
    try:
        exec(code, module.__dict__)  # noqa: S102 - a config file is a program of the user's own
        build = getattr(module, "config", None)
        if not callable(build):
            raise UserError(f"{name}: has no function config(); add `def config() -> Config`")
        config = build()
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == name]
        where = f"{name}:{lines[-1]}" if lines else name
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{where}: {text}; correct the config file") from error
    if not isinstance(config, Config):
        raise UserError(
            f"{name}: config() returned {shown(config)}, not a Config; return instructax.config.Config(...)"
        )
    return config


def parse(argv: Sequence[str], default: Config, *, prog: str = "instructax") -> Config:
    """``default`` with the flags of ``argv`` (``--ppo.ptx-coef 0``) written over it.

    ``none`` is a value wherever a field may be none. A section that is none is opened by a flag of
    its own (``--reward.model.num-layers 2`` starts from the policy's architecture) and closed by
    ``none`` (``--reward.model none``). ``--help`` explains every field and exits with 0.

    Raises:
      UserError: a flag that no field has, a value of the wrong type, or a default that is not well
        typed itself; one line.
    """
    if not argv:
        return default
    check_fields(default)  # tyro reads the defaults of its flags from it
    import tyro

    wants_help = any(token in ("-h", "--help") for token in argv)
    default, opened, rest = _sections_to_open(argv, default, wants_help)
    flags = _flags(default)
    rest = _checked(rest, flags)

    def run(start: Config) -> Config:
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                config, left = tyro.cli(
                    Config,
                    prog=prog,
                    description=Config.__doc__,
                    default=start,
                    args=rest,
                    config=(tyro.conf.AvoidSubcommands,),
                    return_unknown_args=True,
                )
        except SystemExit as stop:
            if stop.code in (0, None):
                raise
            raise UserError(_one_line(said.getvalue(), rest, flags)) from None
        if left:
            raise UserError(
                f"{' '.join(left)}: belongs to no flag; write --section.field VALUE "
                "(true and false: --section.field or --section.no-field)"
            )
        return config

    config = run(default)
    if opened.get("reward.model") is ModelConfig:
        # "The policy's, but ..." means the policy as the other flags leave it.
        start = replace(default, reward=replace(default.reward, model=config.model))
        config = run(start)
    return replace(config, arms=tuple(map(_with_field_types, config.arms)))


def _sections_to_open(
    argv: Sequence[str], default: Config, wants_help: bool
) -> tuple[Config, dict[str, type], list[str]]:
    """Opens and closes optional sections; returns what was opened and the tokens that remain."""
    rest, opened = list(argv), dict[str, type]()
    for section in dataclasses.fields(default):
        outer = getattr(default, section.name)
        if not is_section(type(outer)):
            continue
        for name, hint in hints(type(outer)).items():
            cls = next(filter(is_section, alternatives(hint)), None)
            if cls is None or len(alternatives(hint)) == 1:
                continue
            flag = f"--{section.name}.{name}".replace("_", "-")
            tokens = [token.partition("=")[0].replace("_", "-") for token in rest]
            closed = [
                i
                for i, token in enumerate(rest[:-1])
                if tokens[i] == flag and rest[i + 1].lower() == "none"
            ]
            for i in reversed(closed):
                del rest[i : i + 2]
            inner = None if closed else getattr(outer, name)
            if inner is None and (wants_help or any(t.startswith(flag + ".") for t in tokens)):
                inner = cls()
                opened[f"{section.name}.{name}"] = cls
            default = replace(default, **{section.name: replace(outer, **{name: inner})})
            outer = getattr(default, section.name)
    return default, opened, rest


def _flags(value: Any, prefix: str = "") -> dict[str, Any]:
    """Every flag of a config -> the annotation of its field."""
    found: dict[str, Any] = {}
    for name, hint in hints(type(value)).items():
        inner = getattr(value, name)
        path = f"{prefix}{name.replace('_', '-')}"
        if is_section(type(inner)):
            found |= _flags(inner, f"{path}.")
        elif isinstance(inner, tuple) and inner and all(map(dataclasses.is_dataclass, inner)):
            for i, item in enumerate(inner):
                found |= _flags(item, f"{path}.{i}.")
        elif not any(map(is_section, alternatives(hint))):
            found[f"--{path}"] = hint
            if hint is bool:
                found[f"--{prefix}no-{name.replace('_', '-')}"] = hint
    return found


def _checked(argv: Sequence[str], flags: dict[str, Any]) -> list[str]:
    """Refuses unknown flags; spells none as tyro does where the field before it may be none."""
    tokens: list[str] = []
    hint: Any = None
    for token in argv:
        if token.startswith("--") and token != "--help":
            flag, equals, value = token.partition("=")
            flag = flag.replace("_", "-")
            if flag not in flags:
                raise UserError(f"{flag}: no such field; {_nearest(flag, flags)}")
            hint = flags[flag]
            tokens.append(flag)
            if not equals:
                continue
            if hint is bool:
                raise UserError(f"{flag}: takes no value; write {flag} or its opposite, see --help")
            token = value
        may_be_none = type(None) in alternatives(hint)
        tokens.append("None" if may_be_none and token.lower() == "none" else token)
    return tokens


def _nearest(flag: str, flags: dict[str, Any]) -> str:
    """By the whole name, or by its last part: --kl-coef means --ppo.kl-coef."""
    last = flag.lstrip("-").rpartition(".")[2]
    same = [known for known in flags if known.lstrip("-").rpartition(".")[2] == last]
    near = difflib.get_close_matches(flag, same or list(flags), n=1, cutoff=0.0 if same else 0.7)
    if not near:
        parts = {known.lstrip("-").rpartition(".")[2]: known for known in flags}
        near = [parts[part] for part in difflib.get_close_matches(last, list(parts), n=1)]
    return f"did you mean {near[0]}?" if near else "--help lists all fields"


def _one_line(boxed: str, argv: Sequence[str], flags: dict[str, Any]) -> str:
    """What, where and what to do, from what tyro drew a box around."""
    bare = re.sub(r"\x1b\[[0-9;]*m", "", boxed)
    lines = [line.strip("│╭╮╰╯─ \t") for line in bare.splitlines()]
    text = " ".join(line for line in lines if line)
    flag = next((f for f in re.findall(r"--[\w.-]+\w", text) if f in flags and f in argv), None)
    if flag is None:
        return text
    start = len(argv) - 1 - list(reversed(argv)).index(flag) + 1
    end = next((i for i in range(start, len(argv)) if argv[i].startswith("--")), len(argv))
    given = " ".join(argv[start:end])
    return (
        f"{flag}: must be {describe(flags[flag])}, got {given!r}"
        if given
        else (f"{flag}: must be {describe(flags[flag])}, got nothing; write the value behind it")
    )


def _with_field_types(arm: Arm) -> Arm:
    """A flag cannot say of which type an arm's value is; the field that it changes can."""

    def typed(name: Any, value: Any) -> Any:
        members = alternatives(hints(PpoConfig).get(name))
        if int in members and float not in members and type(value) is float and value.is_integer():
            return int(value)
        if bool in members and isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if type(None) in members and isinstance(value, str) and value.lower() == "none":
            return None
        return value

    return replace(arm, changes=tuple((name, typed(name, value)) for name, value in arm.changes))


def dump(config: Any) -> Any:
    """A config, or a part of it, as what JSON knows; tuples become lists."""
    if dataclasses.is_dataclass(config):
        return {f.name: dump(getattr(config, f.name)) for f in dataclasses.fields(config)}
    return [dump(item) for item in config] if isinstance(config, (tuple, list)) else config


def from_dict(plain: Any) -> Config:
    """What :func:`dump` wrote, exactly; a field that is not there takes its default.

    Values are not checked here (see :mod:`instructax.validation`).

    Raises:
      UserError: a field that no config has, or no object where a section should be.
    """
    if not isinstance(plain, dict):
        raise UserError(
            f"config = {shown(plain)}: must be an object of sections; see `config.json` of a run"
        )
    return _build(plain, Config, "")


def _build(plain: Any, hint: Any, path: str) -> Any:
    for member in alternatives(hint):
        if is_section(member) and isinstance(plain, dict):
            inner = hints(member)
            for name in plain:
                if name not in inner:
                    raise UserError(f"{path}{name}: no such field; {suggestion(str(name), inner)}")
            values = {name: _build(v, inner[name], f"{path}{name}.") for name, v in plain.items()}
            return member(**values)
        if typing.get_origin(member) is tuple and isinstance(plain, list):
            items = typing.get_args(member)
            if items[-1] is Ellipsis:
                items = items[:1] * len(plain)
            if len(items) != len(plain):
                return tuple(plain)
            return tuple(
                _build(v, item, f"{path}{i}.")
                for i, (v, item) in enumerate(zip(plain, items, strict=True))
            )
    return plain


def diff(a: Any, b: Any) -> list[str]:
    """Paths of the fields that differ, in the order of the fields; a tuple counts as one field."""
    return list(_changed(a, b, ""))


def _changed(a: Any, b: Any, path: str) -> Iterator[str]:
    if dataclasses.is_dataclass(a) and type(a) is type(b):
        for f in dataclasses.fields(a):
            at = f"{path}.{f.name}" if path else f.name
            yield from _changed(getattr(a, f.name), getattr(b, f.name), at)
    elif a != b:
        yield path


def apply_arm(config: Config, arm: Arm) -> Config:
    """The config with the arm's changes written over its ``ppo`` section.

    Raises:
      UserError: a change of a field that PpoConfig does not have.
    """
    for name, _ in arm.changes:
        if name not in hints(PpoConfig):
            raise UserError(
                f"arm {arm.name}: {name} is no field of PpoConfig; {suggestion(name, hints(PpoConfig))}"
            )
    changes: dict[str, Any] = dict(arm.changes)
    return replace(config, ppo=replace(config.ppo, **changes))
