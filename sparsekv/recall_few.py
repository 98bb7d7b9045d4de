"""Recall rows with few facts: one to five of them stand out of a long background, and each is asked for."""

import re
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

from sparsekv.recall_parts import Composer, RecallRow, Turn
from sparsekv.recall_templates import ATTRIBUTES, ENTITIES, LINES, SCENES, SENTENCES, Fact

BACKGROUNDS = {"natural": 0.6, "repeated": 0.2, "similar": 0.2}  # kind → share of these rows
SENTENCE_END = re.compile(r"[.!?]\s|\n")


class Told(NamedTuple):
    """A fact, its wording in the front, and the tokens of that with the space around."""

    fact: Fact
    wording: str
    tokens: list[int]


class FewFacts(Composer):
    """One to five facts anywhere in the front (50–80% of the row); natural text stands before every question."""

    def compose(self, length: int) -> RecallRow | None:
        """A row of `length` tokens, or None when this draw does not fit."""
        rng = self.rng
        suffix_budget = int(length * rng.uniform(0.2, 0.5))
        count = rng.randint(1, max(1, min(5, suffix_budget // 40)))
        kind = rng.choices(list(BACKGROUNDS), list(BACKGROUNDS.values()))[0]
        told = self.similar(0.9 * (length - suffix_budget)) if kind == "similar" else self.odd(count)
        if not told:
            return None
        turns = self.spread(self.turns(rng.sample(told, min(count, len(told)))), suffix_budget)
        prefix, suffix = (self.encode(text) for text in self.style()(turns))
        spare = length - len(prefix) - len(suffix) - sum(len(one.tokens) for one in told)
        if spare < 0 or len(suffix) > 0.55 * length:
            return None
        if kind == "similar":
            front = [*self.natural(spare), *(token for one in told for token in one.tokens)]
        else:
            front = self.scatter(told, self.repeated(spare) if kind == "repeated" else self.natural(spare))
        return RecallRow(prefix + front + suffix, turns, self.facts)

    def odd(self, count: int) -> list[Told]:
        """Facts that have nothing in common."""
        told = []
        for _ in range(count):
            fact = self.fact()
            text, wording = self.tell(fact)
            told.append(Told(fact, wording, self.encode(text)))
        return told

    def similar(self, room: float) -> list[Told]:
        """Facts in the same few wordings, about one attribute as long as it has values left: up to `room` tokens."""
        rng = self.rng
        pool, layouts = rng.choice(((SENTENCES, (" {}", "\n{}", "\n\n{}")), (LINES, ("\n{}", "\n\n{}"))))
        wordings, layout = rng.sample(pool, rng.randint(1, 3)), rng.choice(layouts)
        kind = rng.choice(list(ENTITIES))
        told: list[Told] = []
        for attribute in rng.sample(list(ATTRIBUTES[kind]), len(ATTRIBUTES[kind])):
            while fact := self.fact_about(kind, attribute):
                wording = fact.fill(rng.choice(wordings))
                tokens = self.encode(layout.format(wording))
                room -= len(tokens)
                if room < 0:
                    self.facts.remove(fact)
                    return told
                told.append(Told(fact, wording, tokens))
        return told

    def repeated(self, size: int) -> list[int]:
        """`size` tokens of one passage, natural or of made-up sentences, over and over."""
        rng = self.rng
        if rng.random() < 0.5:
            text = self.passage(rng.randint(20, 80))
        else:
            text = " ".join(self.scene() for _ in range(rng.randint(2, 6)))
        tokens = self.encode(rng.choice((" {}", "{}\n")).format(text))
        return (tokens * (size // len(tokens) + 1))[:size]

    def scene(self) -> str:
        """A sentence about two entities that tells no attribute."""
        pools = [self.rng.choice(self.rng.choice(list(ENTITIES.values()))) for _ in range(2)]
        who, what = (self.pick(pool) or "nobody" for pool in pools)
        return Fact("", who, what).fill(self.rng.choice(SCENES))

    def scatter(self, told: list[Told], background: list[int]) -> list[int]:
        """The facts at uniformly random places of the background, each moved on to the next end of a sentence."""
        marks = sorted(self.sentence_end(background, self.rng.randint(0, len(background))) for _ in told)
        front: list[int] = []
        for (before, at), one in zip(pairwise([0, *marks]), told, strict=True):
            front += background[before:at] + one.tokens
        return front + background[marks[-1] :]

    def sentence_end(self, tokens: list[int], at: int) -> int:
        """The first place from `at` on where a sentence or line has ended, or `at` where none is near."""
        near = range(max(at, 1), min(at + 40, len(tokens))) if at else ()
        ends = (i for i in near if SENTENCE_END.search(str(self.tokenizer.decode(tokens[i - 1 : i + 1]))))
        return next(ends, at)

    def turns(self, told: list[Told]) -> list[Turn]:
        """Each fact asked for once, in random order; now and then several in one question."""
        rng = self.rng
        joint = rng.randint(2, len(told)) if len(told) > 1 and rng.random() < 0.2 else 0
        turns = [self.several([one.fact for one in told[:joint]])] if joint else []
        turns += [rng.choice(self.ask(one.fact, one.wording)) for one in told[joint:]]
        rng.shuffle(turns)
        return turns

    def spread(self, turns: list[Turn], budget: int) -> list[Turn]:
        """Natural text before the turns, split among them at random, so that all is about `budget` tokens."""
        sizes = self.shares(max(0, budget - self.size(turns)), len(turns))
        return [replace(turn, preamble=self.passage(size)) for turn, size in zip(turns, sizes, strict=True)]
