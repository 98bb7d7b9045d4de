"""RULER's eight needle tasks: sentences with magic numbers or UUIDs in a haystack.

The wording is NVIDIA's (github.com/hsiehjackson/RULER, scripts/data/synthetic/constants.py and niah.py).
"""

import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Literal

from sparsekv.evaluation.benchmarks.ruler_prompt import Prompt, essay, noise_lines, scatter, words

NEEDLE = "One of the special magic {kind} for {key} is: {value}."
ADJECTIVES = words(
    "able agile ancient angry aware bitter blunt bold brave brief calm careful cheap chilly civil clean clever clumsy "
    "common crisp cruel curious damp dear dense dizzy dull eager early easy empty exact faint fair famous fancy fast "
    "fierce firm flat fluffy fond formal frail frank fresh full funny fussy glad grand grave greedy happy harsh hasty "
    "heavy honest huge humble icy ideal idle jolly keen kind lame large late lazy lean lively local lonely loud lucky "
    "mad mature meek mellow merry mild modest muddy naive near neat nervous nice noble noisy odd plain pleasant "
    "polite poor proud pure quick rapid rare ready rich ripe rough round royal rude sad safe salty scarce serious "
    "sharp shiny short shy silent simple sleepy slim slow smooth sober soft solid sour spare stable steep stern stiff "
    "strange strict strong sturdy subtle sudden sweet swift tall tame tart tender thick thin tidy tight timid tiny "
    "tough vague vast vital vivid weak weary wet wide wild wise witty young"
)
NOUNS = words(
    "acorn actor alley almanac almond anchovy antler apron arrow attic badge bamboo banjo banner beacon beaver bench "
    "berry bishop bonnet bottle branch brick bubble bucket buffalo bugle cabbage cactus camel candy canoe canyon "
    "caravan cargo castle cathedral celery cellar chapter cherry chimney circus cobra coffee collar comet coral "
    "corner cottage cotton cowboy cradle cricket crown cupboard curtain cushion daisy dancer desert diamond dolphin "
    "donkey dragon eagle easel elbow elephant engraver fabric feast ferret fiddle flute forest fossil fountain fox "
    "furnace gallery garlic gazelle giraffe glacier goblet gorilla grape gravel guitar hammock hazel helmet hermit "
    "honey hornet hostel igloo island jacket jaguar jewel judge jungle kangaroo kernel kitten lagoon lawyer lemonade "
    "leopard lizard llama lobster locket magnet mango mansion maple meadow melon mermaid monkey monsoon mosaic "
    "mountain muffin mustard napkin nectar nutmeg oasis oboe ocean octopus onion orchid otter oyster paddle palace "
    "panda parade parlor parrot pastry peacock pelican pencil penguin piccolo pigeon pillow pirate planet plaza poet "
    "potato prairie puddle pumpkin puppet pyramid rabbit raccoon raft rainbow ranch raven reindeer rocket rooster "
    "saddlebag sailor salmon sandal saucer scarf scholar scooter shadow shepherd shovel sidewalk singer skeleton "
    "sleigh slipper snail spider spoon squirrel statue stove sunset swan tablet tavern teacup teapot temple thunder "
    "ticket tiger toaster tomato tractor trophy trumpet tulip tunnel turnip turtle tuxedo valley village violin "
    "volcano wallet walrus whale whisker whistle widow windmill wizard yogurt zebra"
)

Haystack = Literal["noise", "essay", "needles"]
Content = Literal["words", "numbers", "uuids"]


@dataclass(frozen=True)
class Needles:
    """One needle task: where the needles lie, what keys and values are, and how many of each."""

    haystack: Haystack
    keys: Content = "words"
    values: Content = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1

    def __call__(self, rng: Random, amount: int) -> Prompt:
        """A prompt with `amount` noise sentences, words of essay, or needles that nobody asks for."""
        new_key, new_value = _unique(rng, self.keys), _unique(rng, self.values)
        told = {new_key(): [new_value() for _ in range(self.num_values)] for _ in range(self.num_keys)}
        needles = [self._needle(key, value) for key, values in told.items() for value in values]
        asked = rng.sample(list(told), self.num_queries)
        depths = [rng.random() for _ in needles]
        if self.haystack == "essay":
            context = " ".join(scatter(needles, _essay_sentences(rng, amount), depths))
        else:
            others = (
                noise_lines(amount)
                if self.haystack == "noise"
                else [self._needle(new_key(), new_value()) for _ in range(amount)]
            )
            context = "\n".join(scatter(needles, others, depths))
        return self._prompt(context, asked, [value for key in asked for value in told[key]])

    def _needle(self, key: str, value: str) -> str:
        return NEEDLE.format(kind=self.values, key=key, value=value)

    def _prompt(self, context: str, asked: list[str], answer: list[str]) -> Prompt:
        one = len(answer) == 1
        kind = self.values[:-1] if one else self.values
        some, are, are_all = ("A", "is", "is") if one else ("Some", "are", "are all")
        query = ", ".join(asked[:-1]) + (", and " if asked[:-1] else "") + asked[-1]
        return Prompt(
            f"{some} special magic {kind} {are} hidden within the following text. Make sure to memorize it. "
            f"I will quiz you about the {kind} afterwards.\n{context}\n",
            f"What {are_all} the special magic {kind} for {query} mentioned in the provided text? ",
            f"The special magic {kind} for {query} mentioned in the provided text {are}",
            answer,
        )


def _unique(rng: Random, content: Content) -> Callable[[], str]:
    """A source of random words, numbers or UUIDs that never gives one twice."""
    draw: dict[Content, Callable[[], str]] = {
        "words": lambda: f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}",
        "numbers": lambda: str(rng.randrange(10**6, 10**7)),
        "uuids": lambda: str(uuid.UUID(int=rng.getrandbits(128), version=4)),
    }
    given: set[str] = set()

    def new() -> str:
        while (value := draw[content]()) in given:
            pass
        given.add(value)
        return value

    return new


def _essay_sentences(rng: Random, amount: int) -> list[str]:
    """`amount` words of natural text from the beginning of a random sentence, as sentences."""
    told, beginnings = essay()
    start = rng.choice(beginnings)
    text = " ".join(told[i % len(told)] for i in range(start, start + amount))
    return re.split(r"(?<=[.!?]) ", text) if text else []
