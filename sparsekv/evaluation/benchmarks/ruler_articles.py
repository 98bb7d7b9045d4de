"""Encyclopedia articles about an invented world: every name is made up, so no answer can be known beforehand.

An article about a work (a viaduct, an opera, …) names a person; an article about the person tells where they were born,
studied and settled. A question about the work alone takes one article, a question about its person takes both.
"""

from dataclasses import dataclass
from random import Random

from sparsekv.evaluation.benchmarks.ruler_prompt import words

# {t} title, {p} person, {x} {y} {z} made-up names, {s} the person's surname


@dataclass(frozen=True)
class Kind:
    """Wordings of one kind of article; a question goes with the part of the article that answers it."""

    title: str
    sentences: tuple[str, ...]
    questions: tuple[tuple[str, str], ...]
    person: str = ""  # how a question refers to the person


WORKS = (
    Kind(
        "the {x} Viaduct",
        (
            "The {x} Viaduct carries a single railway track across the gorge of the {y} on nine tall arches.",
            "Its plans were drawn by {p}, whose two earlier schemes had been turned down as far too costly.",
            "All the stone came by mule from the quarries above {z}.",
            "A fire in the scaffolding delayed the first train by almost a year.",
        ),
        (
            ("Who drew the plans for {t}?", "{p}"),
            ("The gorge of which river is crossed by {t}?", "{y}"),
            ("Above which place lay the quarries that supplied stone to {t}?", "{z}"),
        ),
        "the engineer who drew the plans for {t}",
    ),
    Kind(
        "the opera The Ferryman of {x}",
        (
            "The Ferryman of {x} is an opera in three acts that opened to half-empty rows at the {y} Playhouse.",
            "Working mostly at night, {p} composed it within a single winter.",
            "Its hero loves the daughter of the Duke of {z} and drowns in the last scene.",
            "Critics praised the choruses, while the long ballet was soon cut.",
        ),
        (
            ("Who composed {t}?", "{p}"),
            ("At which playhouse did {t} open?", "{y}"),
            ("Whose daughter does the hero love in {t}: the Duke of which land?", "{z}"),
        ),
        "the composer of {t}",
    ),
    Kind(
        "the {x} fern",
        (
            "The {x} fern clings to shaded cliffs on the island of {y} and grows nowhere else on earth.",
            "Science owes its first description to {p}, who had climbed down on a rope to pick one frond.",
            "Islanders know the plant as {z} and boil its roots to dye wool.",
            "Goats have eaten it away from all but the steepest slopes.",
        ),
        (
            ("Who first described {t}?", "{p}"),
            ("On which island does {t} grow?", "{y}"),
            ("By which local word do islanders know {t}?", "{z}"),
        ),
        "the botanist who first described {t}",
    ),
    Kind(
        "{x} Rovers",
        (
            "{x} Rovers play their home matches at {y} Park, a ground with one wooden stand.",
            "Under {p}, a coach who never raised a voice, the side climbed three divisions in as many seasons.",
            "Matches against its old rivals, {z} Athletic, still fill every seat.",
            "The club shop burned down twice and was rebuilt by supporters.",
        ),
        (
            ("Under which coach did {t} climb three divisions?", "{p}"),
            ("At which park do {t} play at home?", "{y}"),
            ("Which athletic club are the old rivals of {t}?", "{z}"),
        ),
        "the coach who took {t} up three divisions",
    ),
    Kind(
        "the steamship {x}",
        (
            "The steamship {x} slid into the water at the {y} yard and carried mail across the northern ocean.",
            "On her first nineteen voyages she sailed under Captain {p}, a strict teetotaller.",
            "Thick fog drove her onto the rocks off Cape {z}, where everyone aboard was saved.",
            "Her bell now hangs in a village hall.",
        ),
        (
            ("Under which captain did {t} make her first nineteen voyages?", "{p}"),
            ("At which yard was {t} built?", "{y}"),
            ("Off which cape did {t} run onto the rocks?", "{z}"),
        ),
        "the first captain of {t}",
    ),
    Kind(
        "Mount {x}",
        (
            "Mount {x} rises straight out of the {y} Glacier and is hidden by cloud for most of the year.",
            "Nobody stood on its summit before {p}, who went up the western ridge alone and without a rope.",
            "Monks at {z} Abbey, on the lower slopes, ring a bell when avalanches threaten.",
            "Surveyors have disagreed about its height ever since.",
        ),
        (
            ("Who was the first to stand on the summit of {t}?", "{p}"),
            ("Out of which glacier does {t} rise?", "{y}"),
            ("Which abbey stands on the lower slopes of {t}?", "{z}"),
        ),
        "the climber who first stood on the summit of {t}",
    ),
    Kind(
        "the Treaty of {x}",
        (
            "The Treaty of {x} ended eleven years of war over the salt trade and was signed in {y} Castle.",
            "Most of its articles were negotiated by {p}, a diplomat who slept through the ceremony.",
            "It handed the province of {z} to the victors, along with four hundred barrels of herring.",
            "Both copies were later lost at sea.",
        ),
        (
            ("Which diplomat negotiated most of {t}?", "{p}"),
            ("In which castle was {t} signed?", "{y}"),
            ("Which province did the victors receive through {t}?", "{z}"),
        ),
        "the diplomat who negotiated most of {t}",
    ),
    Kind(
        "the painting The Weavers of {x}",
        (
            "The Weavers of {x} is a large canvas that visitors can see at the {y} Gallery.",
            "In it {p} portrayed eleven neighbours at their looms, none of them paid for sitting.",
            "Thieves once cut it from the frame, and it turned up years afterwards in a barn outside {z}.",
            "Cleaning has revealed a twelfth figure by the window.",
        ),
        (
            ("Which artist painted {t}?", "{p}"),
            ("At which gallery can visitors see {t}?", "{y}"),
            ("Outside which town did {t} turn up after the theft?", "{z}"),
        ),
        "the artist who painted {t}",
    ),
)
BIOGRAPHY = Kind(
    "{p}",
    (
        "{p} was born above a cooper's workshop in {x}, the youngest of six.",
        "An aunt paid for four years of study at {y} College.",
        "Late in life {s} settled by the sea at {z}, kept bees and wrote memoirs that nobody printed.",
        "A street was named after {s} and renamed a decade later.",
    ),
    (
        ("In which town was {who} born?", "{x}"),
        ("At which college did {who} study?", "{y}"),
        ("At which seaside place did {who} settle late in life?", "{z}"),
    ),
)
FIRST_NAMES = words(
    "Alba Anselm Beatrix Bertil Casimir Cecily Clement Dagny Edda Emeric Fenna Florian Gerda Gideon Hedda Hector "
    "Imogen Isolde Jasper Judith Konrad Lavinia Leopold Linnea Magnus Minerva Nestor Odile Orson Petra Piers Ramona "
    "Roland Sabine Sylvan Thea Ursula Valentin Winifred Yvette"
)


@dataclass(frozen=True)
class Article:
    """A drawn article: its title and its sentences, and questions with the strings that answer them."""

    title: str
    sentences: tuple[str, ...]
    questions: tuple[tuple[str, str], ...]

    def text(self, num_sentences: int | None = None) -> str:
        """Its first sentences, or all."""
        return " ".join(self.sentences[:num_sentences])


class World:
    """Draws articles; no made-up name occurs twice, or as a part of another."""

    def __init__(self, rng: Random):
        self.rng, self.used = rng, set[str]()

    def pair(self) -> tuple[Article, Article]:
        """An article about a work, whose questions take it alone, and one about its person, whose take both."""
        kind = self.rng.choice(WORKS)
        surname = self._name()
        person = {"p": f"{self.rng.choice(FIRST_NAMES)} {surname}", "s": surname}
        names = {**person, **self._names()}
        title = kind.title.format(**names)
        work = _article(kind, {**names, "t": title})
        biography = _article(BIOGRAPHY, {**person, **self._names(), "who": kind.person.format(t=title)})
        return work, biography

    def _names(self) -> dict[str, str]:
        return {place: self._name() for place in "xyz"}

    def _name(self) -> str:
        """Six letters such as Velmor: equally long names are never part of one another."""
        letters = ("bdfgklmnprstvw", "aeiou", "lmnrst", "bdfgkmpstvz", "aeiou", "klmnrstx")
        while (name := "".join(map(self.rng.choice, letters)).capitalize()) in self.used:
            pass
        self.used.add(name)
        return name


def _article(kind: Kind, names: dict[str, str]) -> Article:
    title = kind.title.format(**names)
    return Article(
        title[0].upper() + title[1:],
        tuple(sentence.format(**names) for sentence in kind.sentences),
        tuple((question.format(**names), answer.format(**names)) for question, answer in kind.questions),
    )
