"""What RULER's tasks share: a prompt in its three parts, a recipe that draws one of any length, and the haystacks."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from random import Random

from sparsekv.data import is_held_out
from sparsekv.errors import require
from sparsekv.sources import PYDOC, documents

NOISE = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")


@dataclass(frozen=True)
class Prompt:
    """One question about one context; `answer` holds the strings that the scorer looks for."""

    context: str
    question: str
    answer_prefix: str
    answer: list[str]

    @property
    def text(self) -> str:
        """The whole prompt, whose tokens are counted."""
        return self.context + self.question + self.answer_prefix


@dataclass(frozen=True)
class Recipe:
    """Draws prompts that grow with an amount of filler (words, sentences, …).

    `make(rng, amount)` draws what is asked before any filler, and filler one piece after the other: with equal
    generators a larger amount asks the same in more text. `least` is the smallest amount that makes sense;
    below `from_length` tokens of context the recipe is not used.
    """

    make: Callable[[Random, int], Prompt]
    least: int = 0
    from_length: int = 0


def words(text: str) -> tuple[str, ...]:
    """The words of a text, for lists that are pleasant to read in code."""
    return tuple(text.split())


def noise_lines(amount: int) -> list[str]:
    """`amount` sentences of RULER's noise, one round of them a line."""
    whole, rest = divmod(amount, len(NOISE))
    return [" ".join(NOISE)] * whole + ([" ".join(NOISE[:rest])] if rest else [])


def scatter(pieces: list[str], among: list[str], depths: list[float]) -> list[str]:
    """`among` with the pieces put in, each at its depth in [0, 1); equal places keep the order of the pieces."""
    places = sorted(range(len(pieces)), key=depths.__getitem__)
    result, last = [], 0
    for i in places:
        place = int(depths[i] * (len(among) + 1))
        result += [*among[last:place], pieces[i]]
        last = place
    return result + among[last:]


@cache
def essay() -> tuple[list[str], list[int]]:
    """Words of natural text that training never sees, and the places where its sentences begin.

    The text is the Python documentation that the interpreter carries: the documents that `sparsekv.data` holds out.
    """
    told = " ".join(filter(is_held_out, _documentation())).split()
    return told, [0, *(i + 1 for i, word in enumerate(told[:-1]) if word.endswith((".", "!", "?")))]


@cache
def vocabulary() -> list[str]:
    """Lower-case words that two documents or more of the whole documentation have, sorted: word lists are of these."""
    seen = Counter(word for text in _documentation() for word in set(re.findall(r"\b[a-z]{3,12}\b", text)))
    return sorted(word for word, count in seen.items() if count > 1)


@cache
def _documentation() -> list[str]:
    texts = list(documents(PYDOC, 0, None))
    require(any(map(is_held_out, texts)), "--benchmark ruler-local: this Python carries no documentation to hide in")
    return texts
