"""The wordings and values that recall rows are made of."""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

# Templates. {a} attribute, {e} entity, {v} value, {E} entity as a sentence begins; {k} and {f} are snake_case names

SENTENCES = (
    "The {a} of {e} is {v}.",
    "For {e}, the {a} is recorded as {v}.",
    "Please note that {v} is now the {a} of {e}.",
    "According to the register, the {a} of {e} is {v}.",
    "When somebody asks for the {a} of {e}, say {v}.",
    "It was agreed that the {a} of {e} would be {v}.",
    "{v}: that is the {a} of {e}.",
    "As of this week, the {a} of {e} reads {v}.",
    "We changed the {a} of {e} to {v}.",
    "{E} has the {a} {v}.",
    "The clerk wrote down {v} as the {a} of {e}.",
    "Reminder about {e}: the {a} is {v}.",
    'In the margin somebody had pencilled "{a} of {e}: {v}".',
    "“And the {a} of {e}?” “{v},” she replied.",
    "Until further notice, {e} keeps {v} as its {a}.",
    "{E} was entered with {v} under {a}.",
    "After some searching they found the {a} of {e}, namely {v}.",
    "Everybody in the office knows that the {a} of {e} is {v}.",
    "You will be asked for the {a} of {e} at the desk; it is {v}.",
    "The letter confirmed it: {v} for the {a} of {e}.",
    "By the way, {e} goes with {v} when it comes to the {a}.",
    "Correction: the {a} of {e} is not what we printed, it is {v}.",
    "(The {a} of {e}, for those who wonder, is {v}.)",
    "If you need the {a} of {e}, use {v}.",
)
LINES = (
    "{k}.{f}={v}",
    "{k}_{f}: {v}",
    'export {k}_{f}="{v}"',
    '{{"subject": "{e}", "field": "{a}", "value": "{v}"}}',
    '<entry subject="{e}" field="{a}">{v}</entry>',
    "[{e}]\n{f} = {v}",
    "{e};{a};{v}",
    "{e} | {a} | {v}",
    "- {e}\n  - {a}: {v}",
    "* {a} ({e}): {v}",
    "**{E}** · {a} · `{v}`",
    'settings["{e}"]["{a}"] = "{v}"',
    "UPDATE registry SET {f} = '{v}' WHERE subject = '{e}';",
    "INFO set {a} for {e} to {v}",
    "# {E}\n{a}\n: {v}",
)
QUESTIONS = (
    "What is the {a} of {e}?",
    "Which {a} does {e} have?",
    "Give the {a} of {e}.",
    "Tell me the {a} of {e}.",
    "I need the {a} of {e}. What was it?",
    "Remind me: the {a} of {e}?",
    "{E}: {a}?",
    "Look up the {a} for {e}.",
    "Could you find the {a} of {e} for me?",
    "From the notes, what is the {a} of {e}?",
    "What did it say about the {a} of {e}?",
    "State the {a} recorded for {e}, nothing else.",
    "The {a} of {e}, please.",
    "Do you remember the {a} of {e}?",
    "Someone is asking for the {a} of {e}. What should I tell them?",
    "Under {e}, what stands as {a}?",
    "What value was given as the {a} of {e}?",
    "Hi, quick one: what's the {a} of {e} again?",
    "Fill in the gap: the {a} of {e} is ___.",
    "{k}.{f} = ?",
)
ANSWERS = (*["{v}"] * 4, "{v}.", "It is {v}.", "The {a} of {e} is {v}.", "{v} is the {a} of {e}.", "That would be {v}.")
REVERSE_QUESTIONS = (
    "Who or what has {v} as {a}?",
    "Which entry lists {v} as its {a}?",
    "{v} is the {a} of what?",
    "Whose {a} is {v}?",
    "To whom does the {a} {v} belong?",
)
COPY_QUESTIONS = (
    "Copy the passage that gives the {a} of {e}.",
    "Repeat word for word what was written about the {a} of {e}.",
    "Quote the exact wording in which the {a} of {e} appeared.",
    "Write out again the part on the {a} of {e}.",
)
QUOTE_QUESTIONS = (
    "How does the passage continue after “{v}”?",
    "Continue word for word: “{v}",
    "Which words came right after “{v}”?",
    "Recite what followed “{v}”.",
)
LIST_QUESTIONS = (
    "Give these in order: {items}.",
    "List, one by one: {items}.",
    "I need several things: {items}.",
    "Look these up for me: {items}.",
)
GROUPS = (
    ("Overview ({a}):", "- {e}: {v}"),
    ("| who or what | {a} |\n|---|---|", "| {e} | {v} |"),
    ("name,{f}", "{e},{v}"),
    ("The {a} in each case:", "{E} – {v}."),
    ("{f}:", "  {k}: {v}"),
    ("Entries under “{a}”:", "({e}) {v}"),
)
SCENES = (  # {v} is another entity; no attribute is told
    "{E} stood beside {v} all morning.",
    "Rain fell, and {e} was left with {v}.",
    "Later {e} came back to {v}.",
    "{E} had nothing to do with {v}.",
    "They walked from {e} to {v} and rested.",
    "Between {e} and {v} there was only a fence.",
    "{E} asked after {v} once more.",
    "On Mondays {e} comes before {v}.",
    "No letter arrived for {e}, and none for {v}.",
    "{E} was painted next to {v}.",
)
PLAIN_TURNS = (
    "\n\nQ: {q}\nA: {a}",
    "\n\nQuestion: {q}\nReply: {a}",
    "\n\n{q}\n{a}",
    "\n{q} {a}",
    "\n\n[Visitor] {q}\n[Desk] {a}",
    "\n\n> {q}\n\n{a}",
    "\n\nAsked: {q}\nAnswered: {a}",
)

# Words


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FIRST_NAMES = _words(
    "Marta Idris Yuki Pavel Leila Tomas Aoife Kwame Ingrid Rafael Noor Stellan Bruna Dmitri Esme Farid Greta Hugo "
    "Ilse Jonas Kaori Lucia Mateo Nadia Oskar Priya Quentin Rosa Samir Tuuli Ulrich Vera Wanda Xavier Yara Zoltan"
)
LAST_NAMES = _words(
    "Lindqvist Okafor Tanaka Novak Haddad Moreau Byrne Mensah Solberg Duarte Rahman Ekman Costa Orlov Whitby Aziz "
    "Keller Fontaine Bauer Petrov Sato Ferrari Quiroga Ivanova Nyman Sharma Delacroix Montero Khalil Koski Vogel "
    "Marchetti Zielinski Abbott Castellan Drummond"
)
ADJECTIVES = _words(
    "quiet northern wooden elder narrow mossy modern copper distant upper gentle broken winter coastal double "
    "second former visiting retired junior chief amber crooked floating glass hollow iron little open painted"
)
ROLES = _words(
    "porter librarian gardener engineer translator baker surveyor archivist pilot cook tailor conductor courier "
    "plumber violinist nurse locksmith painter auditor ranger beekeeper cashier dentist editor glazier"
)
PLACES = _words(
    "warehouse library bridge station lighthouse bakery museum school harbour greenhouse clinic theatre mill tower "
    "canteen workshop garage chapel depot market orchard pavilion quarry stadium vineyard"
)
THINGS = _words(
    "crate piano suitcase lantern bicycle cabinet telescope carpet clock engine kayak ladder mirror printer radio "
    "sofa tent typewriter umbrella vase wagon barrel camera drum globe"
)
TOWNS = _words(
    "Alderbrook Brindle Carrow Dunmere Eastham Farrow Galway Halden Inverley Jasmund Kestrel Lorne Marlow Norden "
    "Ostrava Pembury Quimper Ravenna Selby Tarn Uppsala Verona Wexford Yarm Zadar Porto Lucerne Bergen Tallinn Cork"
)
COLOURS = _words(
    "red green blue yellow orange purple brown black white grey pink teal turquoise beige maroon olive violet silver "
    "golden crimson ivory indigo"
)
SHADES = _words("light dark pale deep bright dusty warm cold")
NOUNS = _words(
    "apple river candle feather bread stone ribbon pepper cloud harvest kettle saddle basket lemon hammer velvet "
    "pebble thistle barley button copper walnut marble ginger anchor blanket compass dragonfly ember falcon"
)
VERBS = _words("follow carry open find paint keep leave borrow mend count return lift")
DEEDS = _words("brought sold lost repaired sent promised lent found moved lifted")
MONTHS = _words("January February March April May June July August September October November December")

Draw = Callable[[random.Random], str]


def _number(r: random.Random) -> str:
    value = r.randrange(10 ** (digits := r.randint(0, 9)), 10 ** (digits + 1))
    return f"{value:,}" if r.random() < 0.1 else str(value)


def _code(r: random.Random) -> str:
    pattern = r.choice(
        ("AA-0000", "A00A0", "000-00-000", "AAA/00", "00AA00", "hhhhhhhh", "hhhh-hhhh", "AAAAA", "A-00.0")
    )
    alphabets = {"A": "ABCDEFGHJKLMNPQRSTUVWXYZ", "0": "0123456789", "h": "0123456789abcdef"}
    return "".join(r.choice(alphabets.get(char, char)) for char in pattern)


def _syllables(r: random.Random) -> str:
    return "".join(r.choice("bdfgklmnprstvz") + r.choice("aeiou") for _ in range(r.randint(2, 4))) + r.choice("nrlsx")


def _date(r: random.Random) -> str:
    day, month, year = r.randint(1, 28), r.randint(1, 12), r.randint(1890, 2060)
    name = MONTHS[month - 1]
    return r.choice((f"{day} {name} {year}", f"{name} {day}", f"{year}-{month:02}-{day:02}", f"{day}.{month}.{year}"))


def _join(*pools: Sequence[str]) -> Draw:
    return lambda r: " ".join(r.choice(pool) for pool in pools)


def _phrase(r: random.Random) -> str:
    return _join(VERBS, ("the",), ADJECTIVES, NOUNS, ("before", "after", "near"), TOWNS)(r)


def _uuid(r: random.Random) -> str:
    return "-".join("".join(r.choices("0123456789abcdef", k=length)) for length in (8, 4, 4, 4, 12))


def _statement(r: random.Random) -> str:
    who, what = _join(ADJECTIVES, ROLES)(r), _join(COLOURS, THINGS)(r)
    return f"the {who} {r.choice(DEEDS)} the {what} {r.choice(('from', 'to', 'in'))} {r.choice(TOWNS)}"


def _time(r: random.Random) -> str:
    minute = f"{r.randint(0, 59):02}"
    return r.choice((f"{r.randint(0, 23)}:{minute}", f"{r.randint(1, 12)}:{minute} {r.choice(('am', 'pm'))}"))


VALUES: dict[str, Draw] = {
    "number": _number,
    "code": _code,
    "uuid": _uuid,
    "word": lambda r: r.choice((r.choice(NOUNS) + " " + r.choice(NOUNS), _syllables(r), _syllables(r).capitalize())),
    "name": _join(FIRST_NAMES, LAST_NAMES),
    "colour": _join(SHADES, COLOURS),
    "town": lambda r: r.choice(
        (f"{r.choice(('Upper', 'Old', 'New', 'Saint', 'Little'))} {r.choice(TOWNS)}", r.choice(TOWNS))
    ),
    "date": _date,
    "time": _time,
    "money": lambda r: f"{r.choice('$€£')}{r.randint(2, 9_999):,}.{r.randint(0, 99):02}",
    "measure": lambda r: (
        f"{r.randint(2, 999)}{r.choice(('', '.5'))} {r.choice(('kg', 'm', 'litres', 'km', 'hours', '%'))}"
    ),
    "version": lambda r: ".".join(str(r.randint(0, 30)) for _ in range(3)),
    "phrase": _phrase,
    "statement": _statement,
    "list": lambda r: ", ".join(r.sample(NOUNS, 3)),
    "address": lambda r: f"{r.randint(1, 240)} {r.choice(LAST_NAMES)} {r.choice(('Street', 'Road', 'Lane'))}",
    "mail": lambda r: f"{_syllables(r)}.{_syllables(r)}@{r.choice(TOWNS).lower()}.example",
    "position": lambda r: f"{r.uniform(-80, 80):.3f}, {r.uniform(-170, 170):.3f}",
}
ENTITIES: dict[str, tuple[Draw, ...]] = {
    "person": (
        _join(FIRST_NAMES, LAST_NAMES),
        _join(("the",), ADJECTIVES, ROLES),
        _join(("the",), ROLES, ("from",), TOWNS),
    ),
    "place": (
        _join(("the",), ADJECTIVES, PLACES),
        _join(("the",), PLACES, ("in",), TOWNS),
        lambda r: f"room {r.randint(1, 999)}",
    ),
    "thing": (
        _join(("the",), COLOURS, THINGS),
        _join(("the",), THINGS, ("from",), TOWNS),
        lambda r: f"parcel {_code(r)}",
    ),
    "project": (
        lambda r: f"project {_syllables(r).capitalize()}",
        _join(("the",), NOUNS, ("account",)),
        _join(("operation",), NOUNS),
    ),
}
ATTRIBUTES: dict[str, dict[str, str]] = {
    "person": {
        "badge number": "number", "locker code": "code", "phone extension": "number", "favourite colour": "colour",
        "home town": "town", "birthday": "date", "middle name": "word", "call sign": "word", "seat": "code",
        "usual order": "list", "next appointment": "time", "mentor": "name", "motto": "phrase", "address": "address",
        "mail address": "mail", "monthly wage": "money", "height": "measure", "account key": "uuid",
        "last remark": "statement",
    },
    "place": {
        "gate code": "code", "opening hour": "time", "caretaker": "name", "wall colour": "colour", "capacity": "number",
        "postal code": "code", "founding date": "date", "nearest stop": "town", "inventory": "list",
        "inscription": "phrase", "yearly rent": "money", "location": "position", "length": "measure",
        "nickname": "word", "sensor id": "uuid", "latest news": "statement", "closing hour": "time",
    },
    "thing": {
        "serial number": "number", "weight": "measure", "owner": "name", "shelf": "code", "price": "money",
        "delivery date": "date", "destination": "town", "label": "word", "contents": "list", "maker": "word",
        "tracking number": "number", "lining": "colour", "instruction": "phrase", "return address": "address",
        "registration key": "uuid", "history": "statement", "pickup time": "time",
    },
    "project": {
        "budget": "money", "deadline": "date", "lead": "name", "ticket": "code", "release": "version", "region": "town",
        "slogan": "phrase", "build hash": "code", "contact": "mail", "head count": "number", "duration": "measure",
        "materials": "list", "code word": "word", "site": "position", "meeting time": "time",
        "licence key": "uuid", "summary": "statement",
    },
}  # fmt: skip


@dataclass(frozen=True)
class Fact:
    """One thing to remember: the `attribute` of `entity` is `value`."""

    attribute: str
    entity: str
    value: str

    def fill(self, template: str) -> str:
        snake = partial(re.sub, r"\W+", "_")
        upper = self.entity[0].upper() + self.entity[1:]
        names = {"a": self.attribute, "e": self.entity, "v": self.value, "E": upper}
        return template.format(**names, k=snake(self.entity.lower()), f=snake(self.attribute))


def templates() -> list[str]:
    """Every wording that a recall row can contain, for tests that compare it with evaluation tasks."""
    groups = [text for pair in GROUPS for text in pair]
    questions = [*QUESTIONS, *REVERSE_QUESTIONS, *COPY_QUESTIONS, *QUOTE_QUESTIONS, *LIST_QUESTIONS]
    return [*SENTENCES, *LINES, *groups, *questions, *ANSWERS, *SCENES, *PLAIN_TURNS]
