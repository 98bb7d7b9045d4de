"""RULER's variable tracking: a chain of assignments in noise; which variables hold the value?

The wording, spelling included, is NVIDIA's (github.com/hsiehjackson/RULER, scripts/data/synthetic/constants.py and
variable_tracking.py).
"""

import itertools
import string
from dataclasses import dataclass
from random import Random

from sparsekv.evaluation.benchmarks.ruler_prompt import NOISE, Prompt, noise_lines, scatter

CHAIN = 5  # variables: one is given the value, four copy it
TASK = "Memorize and track the chain(s) of variable assignment hidden in the following text."
QUESTION = "Question: Find all variables that are assigned the value {value} in the text above. "
ANSWER_PREFIX = (
    "Answer: According to the chain(s) of variable assignment in the text above, "
    f"{CHAIN} variables are assgined the value {{value}}, they are: "
)
# NVIDIA's solved example loses its line breaks and the last word of its question
EXAMPLE = f" {TASK} {{text}} {QUESTION.removesuffix(' above. ')} {ANSWER_PREFIX} {{answer}}\n\n\n\n"


@dataclass(frozen=True)
class VariableTracking:
    """The task with a solved example of so many noise sentences in front of it, or with none."""

    example_amount: int | None

    def __call__(self, rng: Random, amount: int) -> Prompt:
        """A prompt with `amount` noise sentences around its five assignments."""
        example = ""
        if self.example_amount is not None:
            text, value, names = _chain(rng, self.example_amount, letters=3)
            example = EXAMPLE.format(text=text, value=value, answer=" ".join(names))
        text, value, names = _chain(rng, amount, letters=5)
        return Prompt(
            f"{example}{TASK}\n\n{text}\n", QUESTION.format(value=value), ANSWER_PREFIX.format(value=value), names
        )


def _chain(rng: Random, amount: int, letters: int) -> tuple[str, int, list[str]]:
    """Noise with a chain of assignments in it, the value, and the variables that hold it, in order."""
    names: list[str] = []
    while len(names) < CHAIN:
        name = "".join(rng.choices(string.ascii_uppercase, k=letters))
        names += [] if name in names else [name]
    value = rng.randrange(10_000, 99_999)
    first = f"VAR {names[0]} = {value}"
    chain = [first, *(f"VAR {new} = VAR {old} " for old, new in itertools.pairwise(names))]
    noise = [f"{line}\n" for line in noise_lines(amount)]
    if len(noise) <= CHAIN:  # too few lines to lie between
        noise = [NOISE[i % len(NOISE)] for i in range(amount)]
    return " ".join(scatter(chain, noise, sorted(rng.random() for _ in chain))), value, names
