"""A stage's folder: what it was run with, and whether it may be continued."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

from instructax.config import Config, UserError
from instructax.resolve import diff, dump, from_dict
from instructax.runtime.distributed import all_see, on_main
from instructax.runtime.environment import environment

_CONFIG, _ENVIRONMENT = "config.json", "environment.json"

# The sections of a Config that belong to one stage alone: another stage does not read them.
_STAGES = ("pretrain", "sft", "init", "reward", "ppo", "sample", "evaluate")
# None of these changes what a stage computes: names, places, the mesh, workers, traces, in how many
# microbatches (but for dropout's draws), how often it looks or saves. Their change is written down,
# not refused.
_FREE = (
    "name", "run_dir", "seeds", "workers", "profile", "mesh", "arms", "data.prompts_evaluation",
)  # fmt: skip
_FREE_FIELDS = (
    "grad_accumulation", "checkpoint_every", "evaluate_every", "evaluations", "sample_every",
    "log_prompts",
)  # fmt: skip


def open_run(folder: Any, config: Config, *, stage: str) -> Path:
    """Make the folder of a stage, or open it to continue, and write down config and environment.

    ``config.json`` and ``environment.json`` are compared and written by the main process.

    Args:
      folder: the stage's folder.
      config: the resolved config.
      stage: the section of the config that the stage reads ("sft", "ppo", ...). Sections of other
        stages may change between runs; with a name that is no section everything counts.

    Raises:
      UserError: the folder was made with another config: each changed field is listed; or another
        process does not see it.
    """
    folder = Path(folder)
    on_main(lambda: _open(folder, config, stage))
    all_see(folder, _CONFIG)
    return folder


def _open(folder: Path, config: Config, stage: str) -> None:
    stored = _stored_config(folder / _CONFIG)
    if stored is not None:
        changed = [
            f"{path}: {_shown(stored, path)} -> {_shown(config, path)}"
            for path in diff(stored, config)
            if _matters(path, stage)
        ]
        if changed:
            raise UserError(
                f"{folder} was made with another config and cannot be continued with this one: "
                f"{'; '.join(changed)}. Take back the change, give the run another --name, or "
                "remove the folder"
            )
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / _CONFIG, dump(config))
    _write(folder / _ENVIRONMENT, environment())


def _stored_config(path: Path) -> Config | None:
    if not path.exists():
        return None
    try:
        return from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read: {error}; remove it to accept this config"
        ) from error


def _matters(path: str, stage: str) -> bool:
    section, field = path.split(".")[0], path.split(".")[-1]
    if any(path == free or path.startswith(free + ".") for free in _FREE):
        return False
    other = stage in _STAGES and section in _STAGES and section != stage
    return not other and field not in _FREE_FIELDS


def _shown(config: Config, path: str) -> str:
    text = json.dumps(dump(functools.reduce(getattr, path.split("."), config)))
    return text if len(text) <= 60 else text[:57] + "..."


def _write(path: Path, value: dict[str, Any]) -> None:
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)
