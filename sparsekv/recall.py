"""Recall rows: facts early, questions about them late, natural text between.

A model trained for eviction must carry what it will be asked for through the cut. These rows give it such things to
carry, in many wordings and of many kinds. No wording is shared with an evaluation task (a test says so).
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from sparsekv.errors import UserError
from sparsekv.recall_templates import (
    ANSWERS,
    ATTRIBUTES,
    COPY_QUESTIONS,
    ENTITIES,
    GROUPS,
    LINES,
    LIST_QUESTIONS,
    PLAIN_TURNS,
    QUESTIONS,
    QUOTE_QUESTIONS,
    REVERSE_QUESTIONS,
    SENTENCES,
    VALUES,
    Draw,
    Fact,
)

CONTEXT_MARK = "@@CONTEXT@@"


@dataclass(frozen=True)
class Turn:
    """A question and its answer; `needs` are the strings before it that the answer rests on."""

    question: str
    answer: str
    needs: tuple[str, ...]
    preamble: str = ""  # text that stands right before the question


@dataclass(frozen=True)
class RecallRow:
    """One row: `input_ids` (exactly the length asked for), the turns at its end in order, and the facts told."""

    input_ids: list[int]
    turns: list[Turn]
    facts: list[Fact]


def recall_rows(
    tokenizer: PreTrainedTokenizerBase,
    filler: list[int],
    max_seq_len: int,
    num_rows: int,
    seed: int | str,
    accept: Callable[[str], bool] = lambda text: True,
) -> Iterator[list[int]]:
    """Yield `num_rows` rows of exactly `max_seq_len` token ids.

    Parameters
    ----------
    tokenizer
        With a chat template, half of the rows are conversations in it.
    filler
        Token ids of natural text, drawn from at random places.
    seed
        Row i depends on the seed and i alone.
    accept
        Which entities and values may be used: keeps training and validation apart.

    Raises
    ------
    UserError
        `max_seq_len` is too short for a fact and a question.
    """
    for index in range(num_rows):
        yield draw_row(tokenizer, filler, max_seq_len, random.Random(f"{seed}-{index}"), accept).input_ids


def draw_row(
    tokenizer: PreTrainedTokenizerBase,
    filler: list[int],
    max_seq_len: int,
    rng: random.Random,
    accept: Callable[[str], bool] = lambda text: True,
) -> RecallRow:
    """Draw one row; see `recall_rows`. The front (facts in filler) takes whatever length the turns leave."""
    for _ in range(50):
        row = _Composer(tokenizer, filler, rng, accept).compose(max_seq_len)
        if row is not None:
            return row
    raise UserError(f"--max_seq_len {max_seq_len}: too short for recall rows; use longer rows or leave recall out")


class _Composer:
    """Draws the parts of one row. Entities with their attributes, and values, are unique within it."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        filler: list[int],
        rng: random.Random,
        accept: Callable[[str], bool],
    ):
        self.tokenizer, self.filler, self.rng, self.accept = tokenizer, filler, rng, accept
        self.facts: list[Fact] = []
        self.used: set[str] = set()

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
        render = self.chat if self.tokenizer.chat_template and rng.random() < 0.5 else self.plain()
        while turns:
            prefix, suffix = (self.encode(text) for text in render(turns))
            room = length - len(prefix) - len(suffix)
            if room >= sum(map(len, front)) and len(suffix) <= 0.62 * length:
                ids = prefix + self.scatter(front, room) + suffix
                return RecallRow(ids, turns, self.facts)
            turns = turns[: min(len(turns) - 1, int(len(turns) * 0.95))]
        return None

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def natural(self, count: int) -> list[int]:
        """`count` tokens of natural text, from a random place; it begins again where it ends."""
        tokens: list[int] = []
        start = self.rng.randrange(len(self.filler))
        while len(tokens) < count:
            tokens += self.filler[start : start + count - len(tokens)]
            start = 0
        return tokens

    def words(self, count: int) -> list[str]:
        """Whole words of natural text, from about `count` tokens."""
        return str(self.tokenizer.decode(self.natural(count))).split()[1:-1]

    def scatter(self, front: list[list[int]], room: int) -> list[int]:
        """Facts between a few stretches of natural text: exactly `room` tokens."""
        spare = room - sum(map(len, front))
        count = min(1 + len(front), 2 + spare // 60)
        marks = sorted(self.rng.randint(0, spare) for _ in range(count - 1))
        sizes = [after - before for before, after in zip([0, *marks], [*marks, spare], strict=True)]
        parts = [*front, *(self.natural(size) for size in sizes)]
        self.rng.shuffle(parts)
        return [token for part in parts for token in part]

    def pick(self, draw: Draw) -> str | None:
        """A draw that is accepted, or None where a small pool holds none."""
        return next((text for text in (draw(self.rng) for _ in range(200)) if self.accept(text)), None)

    def fact_about(self, kind: str, attribute: str) -> Fact | None:
        """A new fact, or None when the pool of its values is used up."""
        for _ in range(10):
            entity, value = self.pick(self.rng.choice(ENTITIES[kind])), self.pick(VALUES[ATTRIBUTES[kind][attribute]])
            if entity and value and not {value, f"{attribute} of {entity}"} & self.used:
                self.used |= {value, f"{attribute} of {entity}"}
                self.facts.append(Fact(attribute, entity, value))
                return self.facts[-1]
        return None

    def fact(self) -> Fact:
        while True:
            kind = self.rng.choice(list(ENTITIES))
            if fact := self.fact_about(kind, self.rng.choice(list(ATTRIBUTES[kind]))):
                return fact

    def block(self) -> tuple[str, list[Turn]]:
        """A piece of the front and the turns that ask for it."""
        rng, draw = self.rng, self.rng.random()
        if draw < 0.12:
            return self.quote()
        if draw < 0.27:
            return self.group()
        fact = self.fact()
        if draw < 0.47:
            text = fact.fill(rng.choice(LINES))
            return f"\n\n{text}\n\n", self.ask(fact, text)
        text = fact.fill(rng.choice(SENTENCES))
        return rng.choice((" {}", " {}", "\n{}\n", "\n\n{}\n\n")).format(text), self.ask(fact, text)

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
        words = self.words(60)
        if len(words) < 12:
            return self.block()
        start = self.rng.randrange(len(words) - 10)
        known, rest = " ".join(words[start : start + 5]), " ".join(words[start + 5 : start + self.rng.randint(10, 14)])
        question = self.rng.choice(QUOTE_QUESTIONS).replace("{v}", known)
        return "\n\n" + " ".join(words) + "\n\n", [Turn(question, rest, (f"{known} {rest}",))]

    def ask(self, fact: Fact, text: str | None = None) -> list[Turn]:
        """One turn about a fact, now and then two; `text` is its wording where that stands alone."""
        rng = self.rng
        forward = Turn(fact.fill(rng.choice(QUESTIONS)), fact.fill(rng.choice(ANSWERS)), (fact.value,))
        draw = rng.random()
        if draw < 0.12:
            needs = (fact.value,)
            return [forward, Turn(fact.fill(rng.choice(REVERSE_QUESTIONS)), fact.entity, needs)]
        if draw < 0.2 and text:
            return [Turn(fact.fill(rng.choice(COPY_QUESTIONS)), text, (text,))]
        return [forward]

    def enrich(self, turns: list[Turn]) -> list[Turn]:
        """Add questions for several facts at once, and late facts that are asked for soon after."""
        rng = self.rng
        known = list(self.facts)
        for _ in range(len(known) // 6):
            chosen = rng.sample(known, rng.randint(2, min(4, len(known))))
            turns.insert(rng.randint(0, len(turns)), self.several(chosen))
        for _ in range(len(turns) // 8):
            fact, at = self.fact(), rng.randrange(len(turns))
            turns[at] = replace(turns[at], preamble=fact.fill(rng.choice(SENTENCES + LINES)))
            turns.insert(rng.randint(at + 1, min(len(turns), at + 6)), self.ask(fact)[0])
        return turns

    def several(self, facts: list[Fact]) -> Turn:
        items = "; ".join(fact.fill("the {a} of {e}") for fact in facts)
        question = self.rng.choice(LIST_QUESTIONS).format(items=items)
        values = [fact.value for fact in facts]
        numbered = "\n".join(f"{i}. {value}" for i, value in enumerate(values, start=1))
        answer = self.rng.choice(("; ".join(values), "\n".join(f"- {value}" for value in values), numbered))
        return Turn(question, answer, tuple(values))

    def stretch(self, turns: list[Turn], budget: float) -> list[Turn]:
        """Natural text before some turns, never the first, when all of them are shorter than `budget` tokens."""
        spare = (
            budget - len(self.encode("\n".join(f"{turn.question} {turn.answer}" for turn in turns))) - 12 * len(turns)
        )
        while spare > 40 and len(turns) > 1:
            at, words = self.rng.randrange(1, len(turns)), self.words(min(int(spare), 60))
            text = " ".join([turns[at].preamble, *words]).strip()
            turns[at] = replace(turns[at], preamble=text)
            spare -= 60
        return turns

    def plain(self) -> Callable[[list[Turn]], tuple[str, str]]:
        style = self.rng.choice(PLAIN_TURNS)

        def render(turns: list[Turn]) -> tuple[str, str]:
            parts = []
            for turn in turns:
                parts += [f"\n\n{turn.preamble}" if turn.preamble else "", style.format(q=turn.question, a=turn.answer)]
            return "", "".join(parts) + "\n"

        return render

    def chat(self, turns: list[Turn]) -> tuple[str, str]:
        """What the chat template puts before and after the front, which opens the first user turn."""
        messages: list[dict[str, Any]] = []
        for turn in turns:
            user = "\n\n".join(filter(None, (turn.preamble, turn.question)))
            messages += [{"role": "user", "content": user}, {"role": "assistant", "content": turn.answer}]
        messages[0]["content"] = CONTEXT_MARK + "\n\n" + messages[0]["content"]
        text = str(self.tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=False))
        prefix, suffix = text.split(CONTEXT_MARK)
        return prefix, suffix
