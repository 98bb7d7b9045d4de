import itertools
import random
import re

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sparsekv.data import is_held_out
from sparsekv.errors import UserError
from sparsekv.recall import _Composer, draw_row, recall_rows
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


def four_grams(text):
    """Runs of four words that no placeholder interrupts."""
    parts = re.split(r"\{\w*\}|\|", text.lower())
    words = [re.findall(r"[a-z']+", part) for part in parts]
    return {gram for part in words for gram in zip(*(part[i:] for i in range(4)), strict=False)}


@pytest.mark.parametrize("length", [160, 512, 2048])
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


def test_what_is_asked_stands_before_the_question_and_the_answer_after(tokenizer, filler):
    for index in range(60):
        row = draw_row(tokenizer, filler, 700, random.Random(index))
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
        first_question = len(tokenizer(text[: text.index(row.turns[0].question)])["input_ids"])
        assert 0.37 * 1024 < first_question < 0.8 * 1024
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


def test_facts_of_a_row_are_unambiguous(tokenizer, filler):
    composer = _Composer(tokenizer, filler, random.Random(0), lambda text: True)
    facts = [composer.fact() for _ in range(2000)]
    assert len({fact.value for fact in facts}) == len(facts)
    assert len({(fact.entity, fact.attribute) for fact in facts}) == len(facts)


def test_every_value_kind_and_plain_form_is_drawn(tokenizer, filler):
    composer = _Composer(tokenizer, filler, random.Random(0), lambda text: True)
    kinds = {kind for kind in VALUES if len({composer.pick(VALUES[kind]) for _ in range(50)}) > 20}
    assert kinds == set(VALUES)
    texts = [tokenizer.decode(row) for row in recall_rows(tokenizer, filler, 300, 120, seed=0)]
    marks = ["\nA: ", "\nReply: ", "\n[Desk] ", "\n> ", "\nAnswered: "]
    assert all(any(mark in text for text in texts) for mark in marks)
    assert len(PLAIN_TURNS) > len(marks)


def test_a_row_too_short_for_a_fact_is_a_user_error(tokenizer, filler):
    with pytest.raises(UserError, match="--max_seq_len 12"):
        list(recall_rows(tokenizer, filler, 12, 1, seed=0))


def test_no_wording_is_shared_with_a_benchmark(tokenizer):
    taken = four_grams(BENCHMARKS)
    assert ("in", "the", "provided", "text") in taken
    composer = _Composer(tokenizer, [1] * 9, random.Random(0), lambda text: True)
    filled = [turn.question + "|" + turn.answer for _ in range(200) for turn in composer.ask(composer.fact(), "")]
    for text in itertools.chain(templates(), filled):
        assert not FORBIDDEN.search(text), text
        assert not four_grams(text) & taken, text
