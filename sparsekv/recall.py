"""Recall rows: facts early, questions about them late, natural text between.

A model trained for eviction must carry what it will be asked for through the cut. These rows give it such things to
carry, in many wordings and of many kinds. No wording is shared with an evaluation task (a test says so).
"""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from sparsekv.errors import UserError

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
PLAIN_TURNS = (
    "\n\nQ: {q}\nA: {a}",
    "\n\nQuestion: {q}\nReply: {a}",
    "\n\n{q}\n{a}",
    "\n{q} {a}",
    "\n\n[Visitor] {q}\n[Desk] {a}",
    "\n\n> {q}\n\n{a}",
    "\n\nAsked: {q}\nAnswered: {a}",
)
CONTEXT_MARK = "@@CONTEXT@@"

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
MONTHS = _words("January February March April May June July August September October November December")

Draw = Callable[[random.Random], str]


def _number(r: random.Random) -> str:
    value = r.randrange(10 ** (digits := r.randint(1, 8)), 10 ** (digits + 1))
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


VALUES: dict[str, Draw] = {
    "number": _number,
    "code": _code,
    "word": lambda r: r.choice((r.choice(NOUNS) + " " + r.choice(NOUNS), _syllables(r), _syllables(r).capitalize())),
    "name": _join(FIRST_NAMES, LAST_NAMES),
    "colour": _join(SHADES, COLOURS),
    "town": lambda r: r.choice(
        (f"{r.choice(('Upper', 'Old', 'New', 'Saint', 'Little'))} {r.choice(TOWNS)}", r.choice(TOWNS))
    ),
    "date": _date,
    "time": lambda r: f"{r.randint(0, 23)}:{r.randint(0, 59):02}",
    "money": lambda r: f"{r.choice('$€£')}{r.randint(2, 9_999):,}.{r.randint(0, 99):02}",
    "measure": lambda r: (
        f"{r.randint(2, 999)}{r.choice(('', '.5'))} {r.choice(('kg', 'm', 'litres', 'km', 'hours', '%'))}"
    ),
    "version": lambda r: ".".join(str(r.randint(0, 30)) for _ in range(3)),
    "phrase": _phrase,
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
        "mail address": "mail", "monthly wage": "money", "height": "measure",
    },
    "place": {
        "gate code": "code", "opening hour": "time", "caretaker": "name", "wall colour": "colour", "capacity": "number",
        "postal code": "code", "founding date": "date", "nearest stop": "town", "inventory": "list",
        "inscription": "phrase", "yearly rent": "money", "location": "position", "length": "measure",
        "nickname": "word",
    },
    "thing": {
        "serial number": "number", "weight": "measure", "owner": "name", "shelf": "code", "price": "money",
        "delivery date": "date", "destination": "town", "label": "word", "contents": "list", "maker": "word",
        "tracking number": "number", "lining": "colour", "instruction": "phrase", "return address": "address",
    },
    "project": {
        "budget": "money", "deadline": "date", "lead": "name", "ticket": "code", "release": "version", "region": "town",
        "slogan": "phrase", "build hash": "code", "contact": "mail", "head count": "number", "duration": "measure",
        "materials": "list", "code word": "word", "site": "position", "meeting time": "time",
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


def templates() -> list[str]:
    """Every wording that a recall row can contain, for tests that compare it with evaluation tasks."""
    groups = [text for pair in GROUPS for text in pair]
    questions = [*QUESTIONS, *REVERSE_QUESTIONS, *COPY_QUESTIONS, *QUOTE_QUESTIONS, *LIST_QUESTIONS]
    return [*SENTENCES, *LINES, *groups, *questions, *ANSWERS, *PLAIN_TURNS]


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
