"""RULER's two counting tasks: the most common words of a numbered list, the most frequent words of a coded text.

The wording is NVIDIA's (github.com/hsiehjackson/RULER, scripts/data/synthetic/constants.py,
common_words_extraction.py and freq_words_extraction.py).
"""

import itertools
import math
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from sparsekv.evaluation.benchmarks.ruler_prompt import Prompt, vocabulary

NUM_COMMON = 10
COMMON_TASK = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{text}\n"
)
COMMON_QUESTION = "Question: What are the 10 most common words in the above list? "
COMMON_PREFIX = "Answer: The top 10 words that appear most often in the list are:"

FREQUENT_TASK = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. {text}\n"
)
FREQUENT_QUESTION = (
    "Question: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text? "
)
FREQUENT_PREFIX = "Answer: According to the coded text above, the three most frequently appeared words are:"
LEAST_WORDS = 53  # from here on the fourth rank occurs twice or more, and more often than the fifth


@dataclass(frozen=True)
class CommonWords:
    """Ten words that occur `common` times among others that occur `uncommon` times, after a solved example.

    The example has `example_words` words, of which ten occur `example_common` times and the others
    `example_uncommon` times; there is none where `example_words` is 0.
    """

    common: int
    uncommon: int
    example_words: int = 0
    example_common: int = 0
    example_uncommon: int = 0

    def __call__(self, rng: Random, amount: int) -> Prompt:
        """A prompt with `amount` uncommon words."""
        words = rng.sample(vocabulary(), len(vocabulary()))
        example = ""
        if self.example_words:
            text, answer = _word_list(rng, words[: self.example_words], self.example_common, self.example_uncommon)
            solution = " ".join(f"{i}. {word}" for i, word in enumerate(answer, start=1))
            example = COMMON_TASK.format(text=text) + COMMON_QUESTION + COMMON_PREFIX + solution + "\n"
            words = words[self.example_words :]
        chosen = list(itertools.islice(_endless(words), NUM_COMMON + amount))
        text, answer = _word_list(rng, chosen, self.common, self.uncommon)
        return Prompt(example + COMMON_TASK.format(text=text), COMMON_QUESTION, COMMON_PREFIX, answer)


def _word_list(rng: Random, words: list[str], common: int, uncommon: int) -> tuple[str, list[str]]:
    """A numbered list in random order, and the ten words that are common in it."""
    entries = [*words[:NUM_COMMON] * common, *words[NUM_COMMON:] * uncommon]
    rng.shuffle(entries)
    return " ".join(f"{i}. {word}" for i, word in enumerate(entries, start=1)), words[:NUM_COMMON]


def _endless(words: Sequence[str]) -> Iterator[str]:
    """The words, then pairs of them, all different."""
    yield from words
    for step in itertools.count(1):
        yield from (f"{first}-{second}" for first, second in zip(words, words[step:], strict=False))


def frequent_words(rng: Random, amount: int) -> Prompt:
    """Six-letter words whose frequency falls with the square of their rank; the first rank is dots.

    Rank k occurs ⌊amount · k⁻² / ζ(2)⌋ times; ranks 2, 3 and 4 are asked for.
    """
    counts = itertools.takewhile(bool, (int(amount * 6 / (math.pi * k) ** 2) for k in itertools.count(1)))
    ranked: dict[str, int] = {}
    for count in counts:
        word = "..." if not ranked else "".join(rng.choices(string.ascii_lowercase, k=6))
        ranked.setdefault(word, count)
    text = [word for word, count in ranked.items() for _ in range(count)]
    rng.shuffle(text)
    return Prompt(FREQUENT_TASK.format(text=" ".join(text)), FREQUENT_QUESTION, FREQUENT_PREFIX, list(ranked)[1:4])
