#!/usr/bin/env python3
"""One file of named variants becomes one job each, through any of the launchers.

    launch/sweep.py FILE [--only A,B] [--parallel N] [--dry-run] -- LAUNCHER [its options] --

FILE is TOML::

    config = "configs/demo.py"
    verb = "run"                 # default: run
    name = "demo"                # default: the name of the config's file

    [variants.gamma_0]
    "ppo.ptx-coef" = 0.0

A variant's fields are the flags of ``instructax VERB``; true and false become ``--section.field`` and
``--section.no-field``, a list several values. Each variant is a run ``NAME/VARIANT`` of its own, so that the same
sweep started again continues every run. ``{job}`` in the launcher's options is replaced by a name of the variant's
own, such as ``demo-gamma-0``: ``-- launch/slurm.sh --job {job} --nodes 2 --``.

Exit code: 0 all done, 1 some failed (each named), 2 the file or the options are wrong, 130 interrupted.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
import threading
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_FIELD = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*", re.IGNORECASE)
_OWN = ("name", "config")  # the sweep gives these itself
_LONGEST_JOB = 40


def _refuse(message: str) -> NoReturn:
    print(f"sweep.py: {message}", file=sys.stderr)
    raise SystemExit(2)


def flags_of(fields: dict[str, Any], where: str) -> list[str]:
    """The flags that set these fields."""
    flags: list[str] = []
    for field, value in fields.items():
        if not _FIELD.fullmatch(field) or field in _OWN:
            _refuse(f'{where}: {field!r} cannot be varied; write a field such as "ppo.ptx-coef"')
        if isinstance(value, dict):
            _refuse(f'{where}: write "{field}.{next(iter(value), "field")}" in quotes, as one name')
        if isinstance(value, bool):
            section, dot, last = field.rpartition(".")
            flags.append(f"--{section}{dot}{'' if value else 'no-'}{last}")
        elif isinstance(value, list):
            flags += [f"--{field}", *map(str, value)]
        else:
            flags += [f"--{field}", str(value)]
    return flags


def jobs_of(path: Path, only: Sequence[str], launcher: Sequence[str]) -> dict[str, list[str]]:
    """Run name -> the command that launches it."""
    try:
        sweep = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        _refuse(f"{path}: {getattr(error, 'strerror', None) or error}")
    unknown = sorted(set(sweep) - {"config", "verb", "name", "variants"})
    if unknown:
        _refuse(f"{path}: unknown {', '.join(unknown)}; known are config, verb, name and variants")
    config, variants = sweep.get("config"), sweep.get("variants")
    if not isinstance(config, str):
        _refuse(f'{path}: config is missing; write config = "configs/demo.py"')
    if not isinstance(variants, dict) or not all(isinstance(v, dict) for v in variants.values()):
        _refuse(f"{path}: no variants; write [variants.NAME] and its fields below")
    name, verb = str(sweep.get("name", Path(config).stem)), str(sweep.get("verb", "run"))
    missing = [variant for variant in only if variant not in variants]
    if missing:
        _refuse(f"{path}: no variant {', '.join(missing)}; there are {', '.join(variants)}")
    commands: dict[str, list[str]] = {}
    owners: dict[str, str] = {}
    for variant, fields in variants.items():
        if not _NAME.fullmatch(variant) or not _NAME.fullmatch(name):
            _refuse(f"{path}: {name}/{variant} is no name; use letters, digits, dots and dashes")
        job = re.sub(r"[^a-z0-9]+", "-", f"{name}-{variant}".lower()).strip("-")
        if len(job) > _LONGEST_JOB or not job[0].isalpha():
            _refuse(
                f"{path}: {name}/{variant} gives the job name {job}, which must begin with a "
                f"letter and have at most {_LONGEST_JOB}; choose another name"
            )
        if owners.setdefault(job, variant) != variant:
            _refuse(f"{path}: {owners[job]} and {variant} give the same job name {job}")
        if only and variant not in only:
            continue
        flags = flags_of(fields, f"{path}: {variant}")
        start = [word.replace("{job}", job) for word in launcher]
        run = [verb, "--config", config, "--name", f"{name}/{variant}"]
        commands[f"{name}/{variant}"] = [*start, *run, *flags]
    return commands


def launch(commands: dict[str, list[str]], parallel: int) -> dict[str, int]:
    """Exit code of each; what has not begun when Ctrl-C comes never begins."""
    stopping = threading.Event()

    def one(command: list[str]) -> int:
        return 130 if stopping.is_set() else subprocess.run(command, check=False).returncode

    with ThreadPoolExecutor(parallel) as pool:
        try:
            return dict(zip(commands, pool.map(one, commands.values()), strict=True))
        except KeyboardInterrupt:
            stopping.set()
            raise


def main(argv: Sequence[str]) -> int:
    own, found, launcher = list(argv), "--" in argv, []
    if found:
        at = own.index("--")
        own, launcher = own[:at], own[at + 1 :]
    parser = argparse.ArgumentParser(
        prog="sweep.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = _refuse  # type: ignore[method-assign]
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", default="", help="variants, separated by commas")
    parser.add_argument("--parallel", type=int, default=1, help="launchers at once")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    options = parser.parse_args(own)
    if not launcher:
        _refuse("no launcher; write for example -- launch/local.sh -- behind the options")
    if options.parallel < 1:
        _refuse(f"--parallel must be at least 1, got {options.parallel}")
    commands = jobs_of(options.file, [v for v in options.only.split(",") if v], launcher)
    if options.dry_run:
        for command in commands.values():
            print("would run:", shlex.join(command))
        return 0
    try:
        codes = launch(commands, options.parallel)
    except KeyboardInterrupt:
        return 130
    failed = [f"{name} ({code})" for name, code in codes.items() if code]
    if failed:
        print(
            f"sweep.py: failed: {', '.join(failed)}; the same command goes on with them",
            file=sys.stderr,
        )
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
