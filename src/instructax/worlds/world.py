"""Puts the embedded world together: data sets, gold grades and simulated labelers, from a seed."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from instructax.config import WorldConfig
from instructax.worlds import gold, labelers, responses, tasks, texts
from instructax.worlds.customers import Customers, Record, raw_prompts
from instructax.worlds.facts import Facts, content_key, make_facts


def fault_rates(config: WorldConfig) -> responses.FaultRates:
    """The faults that this world's demonstrators have."""
    return responses.FaultRates(
        config.filler, config.chatter, config.courtesy, config.sloppy, config.comply
    )


@dataclass(frozen=True)
class World:
    """One world. Lists hold plain records, ready for JSON Lines; see `make_world`."""

    config: WorldConfig
    facts: Facts
    pretrain_texts: list[Record]
    pretrain_heldout: list[Record]
    demonstrations: list[Record]
    demonstrations_validation: list[Record]
    prompts_reward: list[Record]
    prompts_reward_validation: list[Record]
    prompts_ppo: list[Record]
    prompts_validation: list[Record]
    prompts_evaluation: list[Record]
    prompts_raw: list[Record]
    labeler_ids: tuple[str, ...]
    heldout_labeler_ids: tuple[str, ...]
    people: Mapping[str, labelers.Labeler]
    fluent: frozenset[tuple[str, str]]

    def assess(self, prompt: Record, response: str, finished: bool = True) -> gold.Assessment:
        """The gold grade with what labelers' tastes look at besides."""
        if "world" not in prompt:
            raise ValueError("prompt has no 'world' field: it is not a prompt of this world")
        return gold.assess(prompt["world"], response, finished, self.facts, self.fluent)

    def grade(self, prompt: Record, response: str, finished: bool = True) -> gold.Grade:
        """Gold grade of a response to a prompt record, also one read back from JSON."""
        return self.assess(prompt, response, finished).grade

    def rank(
        self,
        prompt: Record,
        responses: Sequence[str],
        finished: Sequence[bool],
        labeler_id: str,
        key: object,
    ) -> dict[str, list[int]]:
        """A simulated labeler's {"ranks", "ratings"} of K responses.

        Depends on (seed, labeler, prompt id, key) and the texts, not on their order.
        """
        if labeler_id not in self.people:
            raise ValueError(f"labeler_id {labeler_id!r} is not one of {sorted(self.people)}")
        assessed = [self.assess(prompt, r, f) for r, f in zip(responses, finished, strict=True)]
        return labelers.rank(
            self.people[labeler_id], assessed, responses, self.config.seed, prompt["id"], key
        )

    def files(self) -> dict[str, list[Record]]:
        """File name -> records, for whoever writes them."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {f"{name}.jsonl": v for name, v in values.items() if isinstance(v, list)}


def _shots(kind: str) -> int:
    return 1 if kind == "classification" else 2


def _prompts(
    config: WorldConfig,
    facts: Facts,
    name: str,
    pool: str,
    count: int,
    customers: Customers,
    labeler_share: float,
    labeler_ids: Sequence[str],
    floor: float,
) -> list[Record]:
    """`count` prompts of a pool, different from each other where the language has that many."""
    rng = random.Random(f"prompts/{config.seed}/{name}")
    seen: set[str] = set()
    records = []
    for i, kind in enumerate(tasks.allocate(count, rng, floor)):
        by_labeler = rng.random() < labeler_share
        few_shot = kind in tasks.SHORT and rng.random() < (0.4 if by_labeler else 0.1)
        for _ in range(30):
            spec = tasks.sample_spec(
                rng, kind, facts, pool, config.forbidden_share, config.sound_alike_share
            )
            plain = "forbidden" not in spec and "sound_alike" not in spec
            if few_shot and plain:
                spec = tasks.add_shots(spec, facts, pool, rng, _shots(kind))
            worded = tasks.realise(spec, facts, rng)
            text = json.dumps(worded)
            if text not in seen:
                break
        seen.add(text)
        record: Record = {"id": f"{name}-{i:05d}", **worded}
        if by_labeler:
            record["labeler_id"] = rng.choice(labeler_ids)
            plain_source = "plain" if rng.random() < 0.6 else "user_based"
            record["source"] = "few_shot" if spec.get("shots") else plain_source
        else:
            record["user_id"] = customers.next()
            record["source"] = "api"
        pair = (spec["entity"], spec["attribute"])
        record |= {"split": pool, "kind": kind, "content_key": content_key(pair), "world": spec}
        records.append(record)
    return records


def _demonstrated(
    config: WorldConfig, facts: Facts, prompts: list[Record], labeler_ids: Sequence[str], name: str
) -> list[Record]:
    rng = random.Random(f"demonstrations/{config.seed}/{name}")
    rates = fault_rates(config)
    return [
        {
            **prompt,
            "response": responses.demonstrate(prompt["world"], facts, rng, rates),
            "labeler_id": prompt.get("labeler_id") or rng.choice(labeler_ids),
        }
        for prompt in prompts
    ]


def fluent_bigrams(facts: Facts, draws_per_kind: int = 600) -> frozenset[tuple[str, str]]:
    """The neighbourhoods of words that answers have, from many answers to many tasks."""
    rng = random.Random("grammar")
    rates = responses.FaultRates(0.3, 0.3, 0.5, 0.5, 0.5)
    found: set[tuple[str, str]] = set()
    for kind in tasks.PROPORTIONS:
        for i in range(draws_per_kind):
            spec = tasks.sample_spec(rng, kind, facts, "train", 0.2, 0.0)
            if kind in tasks.SHORT and "forbidden" not in spec and i % 4 == 0:
                spec = tasks.add_shots(spec, facts, "train", rng, 1)
            text = responses.demonstrate(spec, facts, rng, rates)
            found.update(gold.bigrams(gold.tokenise(text)))
    # Courtesies in a row are a fault of their own, not words out of order.
    polite = [gold.tokenise(phrase) for phrase in responses.COURTESY]
    return frozenset(found | {(one[-1], two[0]) for one in polite for two in polite})


def make_world(config: WorldConfig) -> World:
    """Builds a world: a pure function of its config.

    Pools of (entity, attribute) pairs are disjoint: demonstrations, reward and PPO prompts are of
    the training pool, everything called validation of the second, evaluation of the third.
    Customers are disjoint between pools too. A prompt record carries its task under "world"
    (small JSON).
    """
    facts = make_facts(config.seed, config.num_entities, config.num_attributes)
    ids = tuple(f"labeler-{i:02d}" for i in range(config.labelers))
    heldout = tuple(f"heldout-labeler-{i:02d}" for i in range(config.heldout_labelers))
    sizes = {  # name -> (pool, count, share of prompts that labelers wrote; FACTS of the paper)
        "demonstrations": ("train", config.train_demonstrations, 0.9),
        "demonstrations_validation": ("validation", config.validation_demonstrations, 0.9),
        "prompts_reward": ("train", config.comparison_prompts, 0.2),
        "prompts_reward_validation": ("validation", config.comparison_validation_prompts, 0.2),
        "prompts_ppo": ("train", config.ppo_prompts, 0.0),
        "prompts_validation": ("validation", config.validation_prompts, 0.0),
        "prompts_evaluation": ("evaluation", config.eval_prompts, 0.0),
    }
    customers = {}
    for pool in ("train", "validation", "evaluation"):
        total = sum(count for p, count, _ in sizes.values() if p == pool)
        rng = random.Random(f"customers/{config.seed}/{pool}")
        # About six prompts a customer, as in the paper's PPO prompts.
        number = max(total // 6, -(-total // config.user_cap))
        customers[pool] = Customers(f"{pool}-user-", number, config.user_cap, rng)
    # What labelers wrote or ranked for training is more even than what customers ask.
    evened = ("demonstrations", "prompts_reward")
    lists = {
        name: _prompts(
            config,
            facts,
            name,
            pool,
            count,
            customers[pool],
            share,
            ids,
            config.kind_floor if name in evened else 0.0,
        )
        for name, (pool, count, share) in sizes.items()
    }
    for name in ("demonstrations", "demonstrations_validation"):
        lists[name] = _demonstrated(config, facts, lists[name], ids, name)
    sent = [
        record
        for name, records in lists.items()
        if name.startswith("prompts")
        for record in records
        if "user_id" in record
    ]
    raw = raw_prompts(
        sent, random.Random(f"raw/{config.seed}"), config.dirty_share, config.heavy_prompts
    )
    people = labelers.make_labelers(
        config.seed,
        (*ids, *heldout),
        noise=config.labeler_noise,
        courtesy=config.courtesy_liking,
        length=config.length_liking,
        tie_width=config.tie_width,
    )
    text_rng = random.Random(f"texts/{config.seed}")
    return World(
        config=config,
        facts=facts,
        pretrain_texts=texts.write_texts(facts, text_rng, config.pretrain_documents),
        pretrain_heldout=texts.write_texts(facts, text_rng, config.pretrain_heldout_documents),
        labeler_ids=ids,
        heldout_labeler_ids=heldout,
        people=people,
        fluent=fluent_bigrams(facts),
        prompts_raw=raw,
        **lists,
    )
