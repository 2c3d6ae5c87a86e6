"""Verbs -> stages; nothing else."""

from __future__ import annotations

import contextlib
import difflib
import importlib
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
}
"""Verb -> module whose ``run(config, ...)`` does it, further arguments, and a line of help."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 refused with one line on stderr, 130 interrupted; a stage may raise SystemExit."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        _main(arguments)
        sys.stdout.flush()
    except UserError as error:
        print(f"instructax: {' '.join(str(error).split())}", file=sys.stderr)
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
    file, rest = _config_file(rest)
    default = Config() if file is None else load_config(file)
    config = parse(rest, default, prog=f"instructax {verb} [--config FILE]")
    validate(config, verb)
    module, more, _ = VERBS[verb]
    importlib.import_module(f"instructax.{module}").run(config, **more)


def _config_file(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The value of --config, and everything else."""
    file, rest, tokens = None, [], iter(arguments)
    for token in tokens:
        flag, equals, value = token.partition("=")
        if flag != "--config":
            rest.append(token)
            continue
        if file is not None:
            raise UserError("--config: is given twice; give one file, and overrides as flags")
        file = value if equals else next(tokens, "")
        if not file or file.startswith("--"):
            raise UserError("--config: names no file; write --config configs/demo.py")
    return file, rest


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
