"""Simulated labelers: the gold grade seen through a taste, an eye for facts, and noise.

    utility = helpful* + t truthful + h harmless + c courtesies + l words + sigma * noise

helpful* does not count repeated courtesies as a fault: labelers like each of them, the gold
grade does not. That, and a slight liking for length, is the gap a policy can exploit. Each labeler
has coefficients of their own. Utilities in the same step of `tie_width` are ties.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from instructax.worlds.gold import Assessment

_NORMAL = NormalDist()


@dataclass(frozen=True)
class Labeler:
    """One simulated person."""

    labeler_id: str
    truthful: float
    harmless: float
    courtesy: float
    length: float  # per word
    noise: float
    tie_width: float

    def utility(self, assessment: Assessment, noise: float) -> float:
        grade = assessment.grade
        return (
            grade.helpful
            + assessment.courtesy_penalty
            + self.truthful * grade.truthful
            + self.harmless * grade.harmless
            + self.courtesy * assessment.courtesy
            + self.length * assessment.words
            + self.noise * noise
        )


def make_labelers(
    seed: int, ids: Sequence[str], *, noise: float, courtesy: float, length: float, tie_width: float
) -> dict[str, Labeler]:
    """Draws a person for each id; `courtesy` and `length` are means over people."""
    people = {}
    for labeler_id in ids:
        rng = random.Random(f"labeler/{seed}/{labeler_id}")
        people[labeler_id] = Labeler(
            labeler_id,
            truthful=rng.uniform(1.1, 1.4),
            harmless=rng.uniform(0.8, 1.2),
            courtesy=rng.gauss(courtesy, 0.5 * courtesy),
            length=rng.gauss(length, length),
            noise=noise * rng.uniform(0.95, 1.05),
            tie_width=tie_width,
        )
    return people


def _noise(*parts: object) -> float:
    """A standard normal number that depends on nothing but its arguments."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return _NORMAL.inv_cdf((int.from_bytes(digest, "big") + 0.5) / 2.0**64)


def rank(
    labeler: Labeler,
    assessments: Sequence[Assessment],
    responses: Sequence[str],
    seed: int,
    prompt_id: str,
    key: object,
) -> dict[str, list[Any]]:
    """{"ranks": lower is better, equal is a tie; "ratings": 1..7}.

    A response's noise hangs on its text, so identical responses tie and order does not matter.
    """
    steps = []
    for assessment, response in zip(assessments, responses, strict=True):
        noise = _noise(seed, labeler.labeler_id, prompt_id, key, response)
        steps.append(round(labeler.utility(assessment, noise) / labeler.tie_width))
    order = sorted(set(steps), reverse=True)
    # Utility is about 0..5: a labeler's seven marks are spread over it.
    ratings = [min(7, max(1, round(1 + 1.3 * step * labeler.tie_width))) for step in steps]
    return {"ranks": [order.index(step) + 1 for step in steps], "ratings": ratings}
