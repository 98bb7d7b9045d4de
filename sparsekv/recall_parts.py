"""What recall rows are put together from: natural text, facts, turns, and how turns are written."""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from sparsekv.recall_templates import (
    ANSWERS,
    ATTRIBUTES,
    COPY_QUESTIONS,
    ENTITIES,
    LINES,
    LIST_QUESTIONS,
    PLAIN_TURNS,
    QUESTIONS,
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


class Composer:
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

    def passage(self, count: int) -> str:
        """Whole words of natural text as it is laid out, from about `count` tokens."""
        inner = re.search(r"\s.*\s", str(self.tokenizer.decode(self.natural(count))), re.DOTALL)
        return inner[0].strip() if inner else ""

    def shares(self, total: int, count: int) -> list[int]:
        """`total` as a sum of `count` numbers, split at random."""
        marks = sorted(self.rng.randint(0, total) for _ in range(count - 1))
        return [after - before for before, after in zip([0, *marks], [*marks, total], strict=True)]

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

    def tell(self, fact: Fact) -> tuple[str, str]:
        """A fact as it stands in a text, with the space around it, and its wording alone."""
        if self.rng.random() < 0.27:
            text = fact.fill(self.rng.choice(LINES))
            return f"\n\n{text}\n\n", text
        text = fact.fill(self.rng.choice(SENTENCES))
        return self.rng.choice((" {}", " {}", "\n{}\n", "\n\n{}\n\n")).format(text), text

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

    def several(self, facts: list[Fact]) -> Turn:
        items = "; ".join(fact.fill("the {a} of {e}") for fact in facts)
        question = self.rng.choice(LIST_QUESTIONS).format(items=items)
        values = [fact.value for fact in facts]
        numbered = "\n".join(f"{i}. {value}" for i, value in enumerate(values, start=1))
        answer = self.rng.choice(("; ".join(values), "\n".join(f"- {value}" for value in values), numbered))
        return Turn(question, answer, tuple(values))

    def size(self, turns: list[Turn]) -> int:
        """About how many tokens the turns take, without preambles."""
        return len(self.encode("\n".join(f"{turn.question} {turn.answer}" for turn in turns))) + 12 * len(turns)

    def style(self) -> Callable[[list[Turn]], tuple[str, str]]:
        """How the turns are written: a function to the text before the front and the text after it."""
        return self.chat if self.tokenizer.chat_template and self.rng.random() < 0.5 else self.plain()

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
