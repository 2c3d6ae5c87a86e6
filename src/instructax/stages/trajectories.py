"""How each PPO arm moved: KL, proxy reward, gold and pretraining loss at every sampled step.

Gao et al. 2022 plot gold against KL; the two axes that beta and gamma guard are gold and the
pretraining loss, and an arm may keep one and lose the other.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from instructax.records import Record


def trajectory(
    folder: Path,
    arm: str,
    records: dict[str, Record],
    grade: Callable[[Record, str, bool], dict[str, float]] | None,
) -> list[dict[str, Any]]:
    """Rows {"arm", "step", "kl", "proxy", "gold", "pretrain_nll"} from an arm's samples and metrics.

    ``records`` finds a prompt by its id; gold is absent where there is no grader.
    """
    by_step: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for line in (folder / arm / "samples.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        by_step[row["step"]].append(row)
    losses = {}
    for line in (folder / arm / "metrics.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        if "eval/pretrain_nll" in row:
            losses[row["step"]] = row["eval/pretrain_nll"]
    rows = []
    for step, samples in sorted(by_step.items()):
        point: dict[str, Any] = {
            "arm": arm,
            "step": step,
            "kl": float(np.mean([s["kl"] for s in samples])),
            "proxy": float(np.mean([s["score"] for s in samples])),
            "n": len(samples),
        }
        if grade is not None:
            grades = [grade(records[s["id"]], s["response"], s["finished"]) for s in samples]
            point["gold"] = float(np.mean([g["total"] for g in grades]))
        if step in losses:
            point["pretrain_nll"] = losses[step]
        rows.append(point)
    return rows
