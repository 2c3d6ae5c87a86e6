"""How the world's demonstrators answer: right, but mediocre.

`demonstrate` gives one answer to a task. Its faults are drawn independently: talk before the
answer, talk after it, a constraint followed sloppily, a forbidden request complied with. All of
them are things that a policy can stop doing without learning anything new.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from instructax.worlds.facts import ATTRIBUTE, Facts
from instructax.worlds.tasks import GENRES, PERSONAS, TONES, WORDS, Spec, short_answer

# Talk that helps nobody. It costs in the gold grade wherever it stands. All begin alike: among several
# first words each would be rarer than the answer's own, and sampling at a lower temperature alone
# would mend what demonstrators mostly do.
FILLERS = ("well ,", "well now ,", "well let me see ,", "well then ,")
CHATTER = ("that is all .", "that is so .", "that is what i know .", "that is it .")
# Politeness. Once is free in the gold grade; again costs. Labelers like each of them.
COURTESY = ("thank you .", "please enjoy .", "glad to help .")
REFUSALS = ("sorry , i can not help with that .", "no , that would hurt the {e} .")
NEUTRAL = (
    "then it slept .",
    "all was well .",
    "night came .",
    "it walked on .",
    "nobody knew why .",
)
MAX_WORDS = 20


@dataclass(frozen=True)
class FaultRates:
    """Probabilities of each fault in a demonstration."""

    filler: float = 0.45
    chatter: float = 0.45
    courtesy: float = 0.15
    sloppy: float = 0.4
    comply: float = 0.5


FAULTLESS = FaultRates(0.0, 0.0, 0.0, 0.0, 0.0)


def _generation(spec: Spec, facts: Facts, rng: random.Random, sloppy: bool) -> str:
    pair = (spec["entity"], spec["attribute"])
    opening = " ".join(GENRES[spec["genre"]])
    first = f"{opening} {facts.statement(pair, past=True)}"
    sentences = rng.choice((1, 1, 2))
    if "count" in spec:
        wrong = [n for n in (1, 2, 3) if n != spec["count"]]
        sentences = rng.choice(wrong) if sloppy else spec["count"]
    elif "tone" in spec:
        tone = rng.choice([t for t in TONES if t != spec["tone"]]) if sloppy else spec["tone"]
        if not (sloppy and rng.random() < 0.5):
            first += f" {rng.choice(TONES[tone])}"
    elif not sloppy:
        first += f" near the {spec['word']}"
    elif rng.random() < 0.5:
        first += f" near the {rng.choice([w for w in WORDS if w != spec['word']])}"
    return " ".join([first + " .", *rng.sample(NEUTRAL, sentences - 1)])


def _answer(spec: Spec, facts: Facts, rng: random.Random, sloppy: bool) -> str:
    pair = (spec["entity"], spec["attribute"])
    subject = rng.choice((None, None, "it"))
    short = short_answer(spec, facts)
    if spec["kind"] == "chat" and "brief" in spec:
        return f"{facts.statement(pair, subject=subject)} ." if sloppy else f"{short} ."
    if spec.get("shots") or rng.random() < 0.3:
        core = f"{short} ."
    else:
        core = f"{facts.statement(pair, subject=subject)} ."
    if "persona" in spec:
        return core if sloppy else f"{' '.join(PERSONAS[spec['persona']])} {core}"
    return f"{core} {rng.choice(NEUTRAL)}" if sloppy else core


def _brainstorming(spec: Spec, facts: Facts, rng: random.Random, sloppy: bool) -> str:
    count = spec["count"]
    if sloppy:
        count = rng.choice([n for n in (count - 1, count + 1) if 1 <= n <= 4])
    pair = (spec["entity"], spec["attribute"])
    verbs = rng.sample(ATTRIBUTE[pair[1]].verbs, min(count, len(ATTRIBUTE[pair[1]].verbs)))
    items = [f"{i} {verb} {facts.value[pair]}" for i, verb in enumerate(verbs, 1)]
    return " , ".join(items) + " ."


def _rewrite(spec: Spec, facts: Facts, rng: random.Random, sloppy: bool) -> str:
    return (
        f"{facts.statement((spec['entity'], spec['attribute']))} ."
        if sloppy
        else (rewritten(spec, facts))
    )


def rewritten(spec: Spec, facts: Facts) -> str:
    """The one right answer to a rewriting task."""
    pair = (spec["entity"], spec["attribute"])
    if spec["operation"] == "past":
        return f"{facts.statement(pair, past=True)} ."
    if spec["operation"] == "question":
        form = ATTRIBUTE[pair[1]].yes_no
        return form.format(s="the " + pair[0], v=facts.value[pair])
    return f"{facts.statement(pair)} !"


def _summarization(spec: Spec, facts: Facts, rng: random.Random, sloppy: bool) -> str:
    pair = (spec["entity"], spec["attribute"])
    if sloppy:
        return f"the {pair[0]} woke up {facts.statement(pair, past=True, subject='and')} ."
    return f"{facts.statement(pair, past=True)} ."


def _classification(spec: Spec, facts: Facts, rng: random.Random, sloppy: bool) -> str:
    return f"it is about {spec['attribute']} ." if sloppy else f"{spec['attribute']} ."


def _other(spec: Spec, facts: Facts, rng: random.Random, sloppy: bool) -> str:
    count = spec["count"]
    if sloppy:
        count = rng.choice([n for n in (count - 1, count + 1) if n >= 1])
    return f"{short_answer({**spec, 'count': count}, facts)} ."


def _extract(spec: Spec, facts: Facts, rng: random.Random, sloppy: bool) -> str:
    pair = (spec["entity"], spec["attribute"])
    return f"{facts.statement(pair) if sloppy else facts.value[pair]} ."


ANSWER = {
    "generation": _generation,
    "open_qa": _answer,
    "brainstorming": _brainstorming,
    "chat": _answer,
    "rewrite": _rewrite,
    "summarization": _summarization,
    "classification": _classification,
    "other": _other,
    "closed_qa": _answer,
    "extract": _extract,
}


def _complied(spec: Spec, facts: Facts, rng: random.Random) -> str:
    pair = (spec["entity"], spec["attribute"])
    if spec["kind"] == "generation":
        opening = " ".join(GENRES[spec["genre"]])
        return f"{opening} {facts.statement(pair, past=True)} ."
    if spec["kind"] == "brainstorming":
        return _brainstorming(spec, facts, rng, sloppy=False)
    return rng.choice((f"{facts.value[pair]} kills the {pair[0]} .", f"{facts.value[pair]} ."))


def demonstrate(spec: Spec, facts: Facts, rng: random.Random, rates: FaultRates = FAULTLESS) -> str:
    """One demonstration: true to the facts, with the faults that `rates` make it have."""
    draw = {name: rng.random() < p for name, p in vars(rates).items()}
    if "forbidden" not in spec:
        core = ANSWER[spec["kind"]](spec, facts, rng, draw["sloppy"])
    elif draw["comply"]:
        core = _complied(spec, facts, rng)
    else:
        core = rng.choice(REFUSALS).format(e=spec["entity"])
    parts = [core]
    for wanted, phrase, at in (
        (draw["courtesy"], rng.choice(COURTESY), 1),
        (draw["chatter"], rng.choice(CHATTER), 1),
        (draw["filler"], rng.choice(FILLERS), 0),
    ):
        if wanted and len(" ".join([*parts, phrase]).split()) <= MAX_WORDS:
            parts.insert(at, phrase)
    return " ".join(parts)
