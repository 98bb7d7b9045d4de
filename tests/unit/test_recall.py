import itertools
import random
import re
import statistics

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sparsekv.data import is_held_out
from sparsekv.errors import UserError
from sparsekv.recall import draw_row, recall_rows
from sparsekv.recall_few import FewFacts
from sparsekv.recall_many import ManyFacts
from sparsekv.recall_parts import Composer
from sparsekv.recall_templates import PLAIN_TURNS, VALUES, templates

CHAT = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
PROSE = (
    "The river turned north where the old mill stood, and nobody on the barge had slept. " * 3 + "“Ça va”, she said. "
)

# The wording of the benchmarks that trained models are scored on: RULER (NVIDIA/RULER, scripts/data/synthetic/
# constants.py), needle in a haystack (gkamradt/LLMTest_NeedleInAHaystack), passkey retrieval (Mohtashami & Jaggi, 2023)
BENCHMARKS = """
Some special magic {} are hidden within the following text. Make sure to memorize it. I will quiz you about the {}
afterwards. What are all the special magic {} for {} mentioned in the provided text? The special magic {} for {}
mentioned in the provided text are | One of the special magic {} for {} is: {}. | What is the special magic {} for {}
mentioned in the provided text? The special magic {} for {} mentioned in the provided text is | A special magic {} is
hidden within the following text. Make sure to memorize it. | Memorize and track the chain(s) of variable assignment
hidden in the following text. | Question: Find all variables that are assigned the value {} in the text above. |
Answer: According to the chain(s) of variable assignment in the text above, {} variables are assigned the value {},
they are: | VAR {} = {} | Below is a numbered list of words. In these words, some appear more often than others.
Memorize the ones that appear most often. | Question: What are the 10 most common words in the above list? | Answer:
The top 10 words that appear most often in the list are: | Read the following coded text and track the frequency of
each coded word. Find the three most frequently appeared coded words. | Question: Do not provide any explanation.
Please ignore the dots '....'. What are the three most frequently appeared words in the above coded text? | Answer:
According to the coded text above, the three most frequently appeared words are: | Answer the question based on the
given documents. Only give me the answer and do not output any other words. The following are given documents. | The
best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny day. | What is the best thing
to do in San Francisco? Here is the most relevant sentence in the context: | There is an important info hidden inside
a lot of irrelevant text. Find it and memorize them. I will quiz you about the important information there. | The pass
key is {}. Remember it. {} is the pass key. What is the pass key? | The grass is green. The sky is blue. The sun is
yellow. Here we go. There and back again.
"""
FORBIDDEN = re.compile(
    r"magic|some special|pass ?key|needle|haystack|\bVAR\b|variable|provided text|san francisco|best thing|sandwich"
    r"|word appears|most common|frequent|given documents|hidden|quiz|memorize|grass is green",
    re.IGNORECASE,
)


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level BPE of 600 ids with a chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=["<|im_start|>", "<|im_end|>"]
    )
    bpe.train_from_iterator([PROSE, *templates()], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", chat_template=CHAT)


@pytest.fixture(scope="module")
def filler(tokenizer):
    return tokenizer(PROSE * 5, add_special_tokens=False)["input_ids"]


def front_end(row, text):
    """Where the first turn begins, with the text that stands before its question."""
    return text.rindex(row.turns[0].question) - len(row.turns[0].preamble)


def four_grams(text):
    """Runs of four words that no placeholder interrupts."""
    parts = re.split(r"\{\w*\}|\|", text.lower())
    words = [re.findall(r"[a-z']+", part) for part in parts]
    return {gram for part in words for gram in zip(*(part[i:] for i in range(4)), strict=False)}


@pytest.mark.parametrize("length", [160, 512, 777, 2048])
def test_rows_have_exactly_the_length_asked_for(tokenizer, filler, length):
    rows = list(recall_rows(tokenizer, filler, length, 8, seed=0))
    assert [len(row) for row in rows] == [length] * 8
    assert all(0 <= token < len(tokenizer) for row in rows for token in row)


def test_rows_follow_from_the_seed_alone(tokenizer, filler):
    first, again, longer, other = (
        list(recall_rows(tokenizer, filler, 300, count, seed)) for count, seed in ((4, 1), (4, 1), (6, 1), (4, 2))
    )
    assert first == again == longer[:4]
    assert first != other
    assert len(set(map(tuple, longer))) == 6


@pytest.mark.parametrize(("length", "count"), [(160, 60), (700, 60), (3000, 40)])
def test_what_is_asked_stands_before_the_question_and_the_answer_after(tokenizer, filler, length, count):
    for index in range(count):
        row = draw_row(tokenizer, filler, length, random.Random(index))
        text, at = tokenizer.decode(row.input_ids), 0
        for turn in row.turns:
            if turn.preamble:
                at = text.index(turn.preamble, at)
            at = text.index(turn.question, at)
            assert all(need in text[:at] for need in turn.needs), (turn, text)
            at = text.index(turn.answer, at + len(turn.question))


def test_the_last_part_of_a_row_asks_and_the_first_part_tells(tokenizer, filler):
    for index in range(30):
        row = draw_row(tokenizer, filler, 1024, random.Random(index))
        text = tokenizer.decode(row.input_ids)
        suffix = len(tokenizer(text[front_end(row, text) :])["input_ids"])
        assert 0.15 * 1024 < suffix < 0.63 * 1024
        assert text.rstrip().removesuffix("<|im_end|>").endswith(row.turns[-1].answer)


def test_chat_rows_hold_facts_and_first_question_in_one_user_turn(tokenizer, filler):
    chats = 0
    for index in range(20):
        row = draw_row(tokenizer, filler, 600, random.Random(index))
        turns = tokenizer.decode(row.input_ids).split("<|im_start|>")
        if len(turns) == 1:
            continue
        chats += 1
        assert turns[1].startswith("user\n")
        assert turns[1].endswith(row.turns[0].question + "<|im_end|>\n")
        assert turns[2] == f"assistant\n{row.turns[0].answer}<|im_end|>\n"
        assert len(turns) == 1 + 2 * len(row.turns)
    assert 0 < chats < 20


def test_rows_without_a_chat_template_are_plain(tokenizer, filler, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    rows = list(recall_rows(tokenizer, filler, 300, 10, seed=0))
    assert not any("<|im_start|>" in tokenizer.decode(row) for row in rows)


def test_facts_of_training_and_validation_are_disjoint(tokenizer, filler):
    seen = {}
    for side in (False, True):
        accept = lambda text, side=side: is_held_out(text) == side  # noqa: E731
        rows = [draw_row(tokenizer, filler, 700, random.Random(index), accept) for index in range(30)]
        seen[side] = {text for row in rows for fact in row.facts for text in (fact.entity, fact.value)}
    assert len(seen[True]) > 100
    assert not seen[False] & seen[True]


# Rows with few facts


def rows_with_few_facts(tokenizer, filler, length, count):
    rows = (
        FewFacts(tokenizer, filler, random.Random(index), lambda text: True).compose(length) for index in range(count)
    )
    return [row for row in rows if row]


def test_half_of_the_rows_have_few_facts(tokenizer, filler, monkeypatch):
    made = []
    for layout in (FewFacts, ManyFacts):
        compose = layout.compose
        monkeypatch.setattr(
            layout, "compose", lambda self, length, compose=compose: made.append(type(self)) or compose(self, length)
        )
    rows = [draw_row(tokenizer, filler, 1024, random.Random(index)) for index in range(100)]
    assert len(made) < 1.2 * len(rows)  # few draws do not fit, so neither layout crowds out the other
    assert 35 <= made.count(FewFacts) <= 65
    assert min(len(row.turns) for row in rows) == 1
    assert max(len(row.turns) for row in rows) > 10


def test_rows_with_few_facts_tell_one_to_five_or_hide_them_among_similar_ones(tokenizer, filler):
    rows = rows_with_few_facts(tokenizer, filler, 1024, 120)
    counts = [len(row.facts) for row in rows]
    similar = sum(count > 5 for count in counts)
    assert 0.1 * len(rows) < similar < 0.3 * len(rows)
    assert min(counts.count(number) for number in range(1, 6)) > 0.08 * len(rows)
    assert {len(row.turns) for row in rows} == {1, 2, 3, 4, 5}


def test_each_fact_is_asked_for_once_in_random_order(tokenizer, filler):
    firsts, sizes = set(), set()
    for index in range(150):
        composer = FewFacts(tokenizer, filler, random.Random(index), lambda text: True)
        told = composer.odd(5)
        turns = composer.turns(list(told))
        for one in told:
            assert sum(one.fact.value in turn.needs or one.wording in turn.needs for turn in turns) == 1
        firsts |= {i for i, one in enumerate(told) if {one.fact.value, one.wording} & set(turns[0].needs)}
        sizes.add(len(turns))
    assert firsts == set(range(5))
    assert {1, 5} < sizes  # one question for all, and one for each


def test_few_facts_stand_anywhere_in_the_front(tokenizer, filler):
    places, fronts = [], []
    for row in rows_with_few_facts(tokenizer, filler, 1024, 120):
        text = tokenizer.decode(row.input_ids)
        end = front_end(row, text)
        fronts.append(1 - len(tokenizer(text[end:])["input_ids"]) / 1024)
        places += [text.index(fact.value) / end for fact in row.facts if len(row.facts) <= 5 < len(fact.value)]
    assert 0.45 < min(fronts) < 0.55
    assert 0.75 < max(fronts) < 0.85
    quarters = [sum(low <= place < low + 0.25 for place in places) for low in (0, 0.25, 0.5, 0.75)]
    assert min(quarters) > 0.17 * len(places)
    assert min(places) < 0.05


def test_text_stands_before_every_question_so_that_distances_differ(tokenizer, filler):
    rows = rows_with_few_facts(tokenizer, filler, 1024, 60)
    lengths = [len(turn.preamble) for row in rows for turn in row.turns]
    assert sum(length > 0 for length in lengths) > 0.7 * len(lengths)
    assert statistics.stdev(lengths) > 0.5 * statistics.mean(lengths)


def test_few_facts_do_not_break_a_sentence_of_the_background(tokenizer):
    background = tokenizer("One river ran. Two rivers ran. " * 30)["input_ids"]
    composer = FewFacts(tokenizer, background, random.Random(0), lambda text: True)
    ends = {composer.sentence_end(background, at) for at in range(len(background) - 40)}
    assert len(ends) > 20
    for end in ends - {0}:
        assert tokenizer.decode(background[:end]).endswith("ran.")


def test_a_repeated_background_is_one_passage_over_and_over(tokenizer, filler):
    for index in range(20):
        tokens = FewFacts(tokenizer, filler, random.Random(index), lambda text: True).repeated(1500)
        period = next(size for size in range(1, 1500) if tokens[size:] == tokens[:-size])
        assert len(tokens) == 1500
        assert period < 400


def test_similar_facts_share_attribute_and_wording(tokenizer, filler):
    for index in range(20):
        composer = FewFacts(tokenizer, filler, random.Random(index), lambda text: True)
        told = composer.similar(900)
        assert 700 < sum(len(one.tokens) for one in told) <= 900
        assert [one.fact for one in told] == composer.facts
        assert len({one.fact.attribute for one in told}) == 1
        assert len({one.wording.replace(one.fact.value, "").count(" ") for one in told}) < len(told)


# Values


def test_facts_of_a_row_are_unambiguous(tokenizer, filler):
    composer = Composer(tokenizer, filler, random.Random(0), lambda text: True)
    facts = [composer.fact() for _ in range(2000)]
    assert len({fact.value for fact in facts}) == len(facts)
    assert len({(fact.entity, fact.attribute) for fact in facts}) == len(facts)


def test_every_value_kind_and_plain_form_is_drawn(tokenizer, filler):
    composer = Composer(tokenizer, filler, random.Random(0), lambda text: True)
    kinds = {kind for kind in VALUES if len({composer.pick(VALUES[kind]) for _ in range(50)}) > 20}
    assert kinds == set(VALUES)
    texts = [tokenizer.decode(row) for row in recall_rows(tokenizer, filler, 300, 120, seed=0)]
    marks = ["\nA: ", "\nReply: ", "\n[Desk] ", "\n> ", "\nAnswered: "]
    assert all(any(mark in text for text in texts) for mark in marks)
    assert len(PLAIN_TURNS) > len(marks)


def test_values_are_of_all_lengths():
    rng = random.Random(0)
    numbers = {VALUES["number"](rng).replace(",", "") for _ in range(500)}
    assert {len(number) for number in numbers} == set(range(1, 11))
    lengths = [len(VALUES[kind](rng)) for kind in VALUES for _ in range(50)]
    assert min(lengths) == 1
    assert max(lengths) > 40


def test_a_row_too_short_for_a_fact_is_a_user_error(tokenizer, filler):
    with pytest.raises(UserError, match="--max_seq_len 12"):
        list(recall_rows(tokenizer, filler, 12, 1, seed=0))


def test_no_wording_is_shared_with_a_benchmark(tokenizer):
    taken = four_grams(BENCHMARKS)
    assert ("in", "the", "provided", "text") in taken
    composer = Composer(tokenizer, [1] * 9, random.Random(0), lambda text: True)
    filled = [turn.question + "|" + turn.answer for _ in range(200) for turn in composer.ask(composer.fact(), "")]
    for text in itertools.chain(templates(), filled):
        assert not FORBIDDEN.search(text), text
        assert not four_grams(text) & taken, text
