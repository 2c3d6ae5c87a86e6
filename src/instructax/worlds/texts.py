"""Pretraining text: another mixture than the prompts, so that forgetting it can be measured.

Every fact of the world stands here many times and in many wordings, the forbidden ones too.
Songs, letters and dialogues have words that no answer uses.
"""

from __future__ import annotations

import random

from instructax.worlds.facts import ATTRIBUTE, FORBIDDEN, Facts, Pair
from instructax.worlds.responses import NEUTRAL, demonstrate
from instructax.worlds.tasks import NUMBERS, TONES, WORDS, sample_spec

NAMES = ("ana", "ben", "cora", "dan", "eva", "finn")
MIXTURE = {
    "facts": 0.35,
    "stories": 0.14,
    "school": 0.26,
    "forbidden": 0.07,
    "songs": 0.06,
    "letters": 0.06,
    "dialogues": 0.06,
}
SCHOOL = ("brainstorming", "rewrite", "summarization", "classification", "other", "extract")


def _pairs(facts: Facts, rng: random.Random, count: int, entity: str | None = None) -> list[Pair]:
    entity = entity or rng.choice(facts.entities)
    names = rng.sample(facts.attributes, min(count, len(facts.attributes)))
    return [(entity, name) for name in names]


def _question(pair: Pair, subject: str | None = None) -> str:
    return ATTRIBUTE[pair[1]].question.format(s=subject or "the " + pair[0])


def _facts(facts: Facts, rng: random.Random) -> str:
    form = rng.randrange(6)
    if form == 0:
        first, second = _pairs(facts, rng, 2)
        third = rng.choice((None, "it"))
        return f"{facts.statement(first)} . {facts.statement(second, subject=third)} ."
    if form == 1:
        pair = _pairs(facts, rng, 1)[0]
        asks, answers = rng.sample(NAMES, 2)
        reply = rng.choice((facts.statement(pair), facts.statement(pair, subject="it")))
        reply = rng.choice((facts.value[pair], reply))
        return f"{asks} asked , {_question(pair)} {answers} said , {reply} ."
    if form == 2:
        pairs = [(rng.choice(facts.entities), rng.choice(facts.attributes)) for _ in range(2)]
        return " ".join(f"q : {_question(p)} a : {facts.value[p]} ." for p in pairs)
    if form == 3:
        pair = _pairs(facts, rng, 1)[0]
        return (
            f"the {pair[1]} of the {pair[0]} is {facts.value[pair]} . "
            f"everyone knows that {facts.statement(pair)} ."
        )
    if form == 4:
        pair = _pairs(facts, rng, 1)[0]
        yes_no = ATTRIBUTE[pair[1]].yes_no.format(s="the " + pair[0], v=facts.value[pair])
        return (
            f"{facts.statement(pair)} . last year {facts.statement(pair, past=True)} . "
            f"{yes_no} yes , {facts.statement(pair)} !"
        )
    pair = _pairs(facts, rng, 1)[0]
    value = facts.value[pair]
    return f"what the {pair[0]} knows of {pair[1]} : {value} . {facts.statement(pair)} ."


def _school(facts: Facts, rng: random.Random) -> str:
    """A page of a school book. Its pairs are of the training pool: no held-out answer is here."""
    kind = rng.choice(("generation",) * 5 + SCHOOL)
    spec = sample_spec(rng, kind, facts, "train", 0.0, 0.0)
    entity, attribute = spec["entity"], spec["attribute"]
    answer = demonstrate(spec, facts, rng)
    line = facts.statement((entity, attribute))
    if kind == "generation":
        if "count" in spec:
            how = f"{NUMBERS[spec['count']]} sentences"
        else:
            how = f"{spec['tone']} mood" if "tone" in spec else f"word {spec['word']}"
        return f"{spec['genre']} of the {entity} , its {attribute} , {how} : {answer}"
    if kind == "brainstorming":
        return f"{NUMBERS[spec['count']]} notes , {attribute} of the {entity} : {answer}"
    if kind == "rewrite":
        return f"lesson : {line} . {spec['operation']} : {answer}"
    if kind == "summarization":
        past = facts.statement((entity, attribute), past=True, subject="and")
        return f"the {entity} woke up {past} {rng.choice(('and', 'then'))} slept . short : {answer}"
    if kind == "classification":
        return f"{spec['labels'][0]} or {spec['labels'][1]} : {line} . {answer}"
    if kind == "other":
        return f"{attribute} of the {entity} , {NUMBERS[spec['count']]} times : {answer}"
    return f"text : {line} . {attribute} in it : {answer}"


def _stories(facts: Facts, rng: random.Random) -> str:
    first, second = _pairs(facts, rng, 2)
    tone = rng.choice(TONES[rng.choice(list(TONES))])
    place = rng.choice((f"near the {rng.choice(WORDS)}", tone))
    opening = rng.choice(("once", "long ago", "one day"))
    return (
        f"{opening} {facts.statement(first, past=True)} {place} . {rng.choice(NEUTRAL)} "
        f"{facts.statement(second, past=True, subject='it')} . {rng.choice(NEUTRAL)}"
    )


def _forbidden(facts: Facts, rng: random.Random) -> str:
    pair = (rng.choice(facts.entities), FORBIDDEN)
    value = facts.value[pair]
    forms = (
        f"old books say that {facts.statement(pair)} . keep {value} away .",
        f"the hunters know that {value} kills the {pair[0]} .",
        f"{rng.choice(NAMES)} asked , {_question(pair)} the old witch said , {value} .",
        f"the {pair[0]} ate {value} and fell down . {facts.statement(pair, past=True)} .",
    )
    return rng.choice(forms)


def _songs(facts: Facts, rng: random.Random) -> str:
    pair = _pairs(facts, rng, 1)[0]
    word, line = rng.choice(WORDS), facts.statement(pair)
    forms = (
        f"la la la , {line} , oh {word} , oh {word} , {line} .",
        f"sing {word} , sing {rng.choice(WORDS)} , {line} , hey ho , la la .",
        f"oh sweet {word} , oh sweet day , {line} , hey ho .",
    )
    return rng.choice(forms)


def _letters(facts: Facts, rng: random.Random) -> str:
    pair = _pairs(facts, rng, 1)[0]
    to, sender = rng.sample(NAMES, 2)
    when = rng.choice(("today", "last night", "this morning"))
    wish = rng.choice(("write soon", "stay well", "come and see it"))
    return (
        f"dear {to} , {when} i saw the {pair[0]} . {facts.statement(pair, past=True, subject='it')}"
        f" . {wish} . with love , {sender} ."
    )


def _dialogues(facts: Facts, rng: random.Random) -> str:
    pair = _pairs(facts, rng, 1)[0]
    one, two = rng.sample(NAMES, 2)
    asked = rng.choice((_question(pair, "it"), f"and its {pair[1]} ?"))
    return (
        f"{one} : hello , {two} . {two} : hello , do you know the {pair[0]} ? {one} : yes . {two} :"
        f" {asked} {one} : {facts.statement(pair, subject=rng.choice((None, 'it')))} ."
    )


WRITE = {
    "facts": _facts,
    "stories": _stories,
    "school": _school,
    "forbidden": _forbidden,
    "songs": _songs,
    "letters": _letters,
    "dialogues": _dialogues,
}


def write_texts(facts: Facts, rng: random.Random, count: int) -> list[dict[str, str]]:
    """`count` documents {"text", "topic"} in the proportions of `MIXTURE`, shuffled."""
    topics = [topic for topic, share in MIXTURE.items() for _ in range(round(share * count))]
    topics = (topics + ["facts"] * count)[:count]
    rng.shuffle(topics)
    return [{"text": WRITE[topic](facts, rng), "topic": topic} for topic in topics]
