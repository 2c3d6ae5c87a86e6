"""Verbs -> stages; nothing else."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import Any

from instructax.config import Config, UserError
from instructax.resolve import load_config, parse
from instructax.validation import validate

VERBS: dict[str, tuple[str, dict[str, Any], str]] = {
    "run": ("stages.pipeline", {}, "the whole recipe, stage after stage, and the report"),
    "tokenizer": ("stages.tokenizer", {}, "train a SentencePiece model on text"),
    "data": ("stages.data", {}, "curate the records, or generate the embedded world"),
    "pretrain": ("stages.pretrain", {}, "language model on text"),
    "sft": ("stages.sft", {}, "supervised fine-tuning on demonstrations"),
    "init": ("stages.sft", {"init": True}, "the RL init: demonstrations with pretraining text"),
    "reward": ("stages.reward", {}, "reward model on ranked responses"),
    "ppo": ("stages.ppo", {}, "PPO, or PPO-ptx where ptx_coef is not 0"),
    "sample": ("stages.sample", {}, "responses to prompts, ready to be ranked"),
    "evaluate": ("stages.evaluate", {}, "win rates, gold scores and the alignment tax"),
    "report": ("report.page", {}, "one page of plots and samples from a run's folder"),
    "plan": (
        "plan.command",
        {},
        "memory, time and traffic on chips not there (--topology v5p:8x8x8)",
    ),
}
"""Verb -> module whose ``run(config, ...)`` does it, further arguments, and a line of help."""

OPTIONS: dict[str, dict[str, str]] = {
    "plan": {
        "topology": "v5p:8x8x8, v6e:16x16, or local",
        "only": "ppo/update",
        "output": "plan.json",
    },
}
"""Verb -> what it takes besides a config's fields, each with an example."""

OF_MAIN = ("report",)
"""Verbs that need no other process and know of none."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 refused with one line on stderr, 130 interrupted.

    A stage may raise SystemExit: 143 after SIGTERM.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        _main(arguments)
        sys.stdout.flush()
    except UserError as error:
        print(error.line(), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of stdout has gone; what is still buffered must not fail again at exit.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


def _main(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"verbs are {', '.join(VERBS)}"
        raise UserError(f"no verb {verb!r}; {hint}")
    file, rest = _option(rest, "config", "configs/demo.py")
    given: dict[str, Any] = {}
    for name, example in OPTIONS.get(verb, {}).items():
        value, rest = _option(rest, name, example)
        given |= {} if value is None else {name: value}
    default = Config() if file is None else load_config(file)
    config = parse(rest, default, prog=f"instructax {verb} [--config FILE]")
    # A plan is for machines where the files need not be.
    validate(config, None if verb == "plan" else verb)
    module, more, _ = VERBS[verb]
    stage = importlib.import_module(f"instructax.{module}")
    if verb == "plan":
        stage.run(config, **more, **given)
        return
    from instructax.runtime.distributed import is_main, join, on_main
    from instructax.runtime.stopping import leaving_on_sigterm

    join(config)
    heard = contextlib.nullcontext() if is_main() else contextlib.redirect_stdout(_Nowhere())
    with leaving_on_sigterm(), heard:
        if verb in OF_MAIN:
            on_main(lambda: bool(stage.run(config, **more)))
        else:
            stage.run(config, **more)


class _Nowhere(io.TextIOBase):
    """What the processes beside the main one say; their errors they do say."""

    def write(self, text: str) -> int:
        return len(text)


def _option(arguments: list[str], name: str, example: str) -> tuple[str | None, list[str]]:
    """The value of --name, and everything else."""
    found, rest, tokens = None, [], iter(arguments)
    for token in tokens:
        flag, equals, value = token.partition("=")
        if flag != f"--{name}":
            rest.append(token)
            continue
        if found is not None:
            hint = "one file, and overrides as flags" if name == "config" else "one value"
            raise UserError(f"--{name}: is given twice; give {hint}")
        found = value if equals else next(tokens, "")
        if not found or found.startswith("--"):
            what = "file" if name == "config" else "value"
            raise UserError(f"--{name}: names no {what}; write --{name} {example}")
    return found, rest


def _help() -> str:
    verbs = "\n".join(f"  {verb:<11}{line}" for verb, (_, _, line) in VERBS.items())
    return (
        "usage: instructax VERB [--config FILE] [--section.field VALUE ...]\n\n"
        f"{verbs}\n\n"
        "FILE is Python with `def config() -> Config`; flags are written over it.\n"
        "`instructax VERB --config FILE --help` explains every field and shows its value."
    )


if __name__ == "__main__":
    raise SystemExit(main())
