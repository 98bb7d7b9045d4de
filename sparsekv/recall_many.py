"""Recall rows with many facts: half of the row or more tells, the rest asks."""

from dataclasses import replace

from sparsekv.recall_parts import Composer, RecallRow, Turn
from sparsekv.recall_templates import (
    ATTRIBUTES,
    ENTITIES,
    GROUPS,
    LINES,
    QUOTE_QUESTIONS,
    SENTENCES,
)


class ManyFacts(Composer):
    """Dozens of facts between a few stretches of natural text, and as many turns as the rest of the row holds."""

    def compose(self, length: int) -> RecallRow | None:
        """A row of `length` tokens, or None when this draw does not fit."""
        rng = self.rng
        suffix_budget = length * rng.uniform(0.4, 0.6)
        density = rng.uniform(0.2, 0.45) if rng.random() < 0.25 else rng.uniform(0.5, 1.0)
        facts_budget = 0.9 * (length - suffix_budget)
        front: list[list[int]] = []
        turns: list[Turn] = []
        size = 0
        while size < facts_budget * density or len(turns) < 4:
            told = len(self.facts)
            text, asks = self.block()
            block = self.encode(text)
            size += len(block)
            if front and size > facts_budget:
                del self.facts[told:]
                break
            front.append(block)
            turns += asks
        rng.shuffle(turns)
        turns = self.stretch(self.enrich(turns), suffix_budget)
        render = self.style()
        while turns:
            prefix, suffix = (self.encode(text) for text in render(turns))
            room = length - len(prefix) - len(suffix)
            if room >= sum(map(len, front)) and len(suffix) <= 0.62 * length:
                ids = prefix + self.scatter(front, room) + suffix
                return RecallRow(ids, turns, self.facts)
            turns = turns[: min(len(turns) - 1, int(len(turns) * 0.95))]
        return None

    def scatter(self, front: list[list[int]], room: int) -> list[int]:
        """Facts between a few stretches of natural text: exactly `room` tokens."""
        spare = room - sum(map(len, front))
        count = min(1 + len(front), 2 + spare // 60)
        parts = [*front, *(self.natural(size) for size in self.shares(spare, count))]
        self.rng.shuffle(parts)
        return [token for part in parts for token in part]

    def block(self) -> tuple[str, list[Turn]]:
        """A piece of the front and the turns that ask for it."""
        draw = self.rng.random()
        if draw < 0.12:
            return self.quote()
        if draw < 0.27:
            return self.group()
        fact = self.fact()
        text, wording = self.tell(fact)
        return text, self.ask(fact, wording)

    def group(self) -> tuple[str, list[Turn]]:
        """A table or list: one attribute of several entities."""
        kind = self.rng.choice(list(ENTITIES))
        attribute = self.rng.choice(list(ATTRIBUTES[kind]))
        facts = [fact for _ in range(self.rng.randint(2, 5)) if (fact := self.fact_about(kind, attribute))]
        if not facts:
            return self.block()
        head, line = self.rng.choice(GROUPS)
        text = "\n".join([facts[0].fill(head), *(fact.fill(line) for fact in facts)])
        return f"\n\n{text}\n\n", [turn for fact in facts for turn in self.ask(fact)]

    def quote(self) -> tuple[str, list[Turn]]:
        """Natural text that a later turn continues."""
        words = self.passage(60).split()
        if len(words) < 12:
            return self.block()
        start = self.rng.randrange(len(words) - 10)
        known, rest = " ".join(words[start : start + 5]), " ".join(words[start + 5 : start + self.rng.randint(10, 14)])
        question = self.rng.choice(QUOTE_QUESTIONS).replace("{v}", known)
        return "\n\n" + " ".join(words) + "\n\n", [Turn(question, rest, (f"{known} {rest}",))]

    def enrich(self, turns: list[Turn]) -> list[Turn]:
        """Add questions for several facts at once, and late facts that are asked for soon after."""
        rng = self.rng
        known = list(self.facts)
        for _ in range(len(known) // 6):
            chosen = rng.sample(known, rng.randint(2, min(4, len(known))))
            turns.insert(rng.randint(0, len(turns)), self.several(chosen))
        for _ in range(len(turns) // 8):
            fact, at = self.fact(), rng.randrange(len(turns))
            told = [turns[at].preamble, fact.fill(rng.choice(SENTENCES + LINES))]  # it may hold a fact already
            turns[at] = replace(turns[at], preamble="\n\n".join(filter(None, told)))
            turns.insert(rng.randint(at + 1, min(len(turns), at + 6)), self.ask(fact)[0])
        return turns

    def stretch(self, turns: list[Turn], budget: float) -> list[Turn]:
        """Natural text before some turns, never the first, when all of them are shorter than `budget` tokens."""
        spare = budget - self.size(turns)
        while spare > 40 and len(turns) > 1:
            at, words = self.rng.randrange(1, len(turns)), self.passage(min(int(spare), 60)).split()
            text = " ".join([turns[at].preamble, *words]).strip()
            turns[at] = replace(turns[at], preamble=text)
            spare -= 60
        return turns
