"""RULER made locally: lengths, wording, and answers that a reader of the context can find."""

import random
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from tiny import make_tiny_tokenizer

from sparsekv import recall_templates
from sparsekv.data import is_held_out
from sparsekv.errors import UserError
from sparsekv.evaluation.benchmarks import ruler_articles
from sparsekv.evaluation.benchmarks.ruler import RECIPES, TASKS, largest_fitting, ruler_rows
from sparsekv.evaluation.benchmarks.ruler_articles import BIOGRAPHY, WORKS, World
from sparsekv.evaluation.benchmarks.ruler_needles import ADJECTIVES, NOUNS, Needles
from sparsekv.evaluation.benchmarks.ruler_prompt import _documentation, essay, scatter
from sparsekv.evaluation.benchmarks.ruler_qa import one_document, two_documents
from sparsekv.evaluation.benchmarks.ruler_variables import VariableTracking

NIAH = [task for task in TASKS if task.startswith("niah")]
NEEDLE = re.compile(r"One of the special magic (numbers|uuids) for (\S+) is: (\S+)\.")
# How a question and an answer's prefix read, as kvpress cuts NVIDIA's prompts (its evaluation/benchmarks/ruler)
MAGIC = r"special magic (?:numbers?|uuids?)"
WORDING = {
    "niah": (
        rf"What (?:is|are all) the {MAGIC} for \S.*\S mentioned in the provided text\? ",
        rf"The {MAGIC} for \S.*\S mentioned in the provided text (?:is|are)",
        128,
    ),
    "vt": (
        r"Question: Find all variables that are assigned the value \d{5} in the text above\. ",
        r"Answer: According to the chain\(s\) of variable assignment in the text above, 5 variables are assgined the "
        r"value \d{5}, they are: ",
        30,
    ),
    "cwe": (
        r"Question: What are the 10 most common words in the above list\? ",
        r"Answer: The top 10 words that appear most often in the list are:",
        120,
    ),
    "fwe": (
        r"Question: Do not provide any explanation\. Please ignore the dots '\.\.\.\.'\. What are the three most "
        r"frequently appeared words in the above coded text\? ",
        r"Answer: According to the coded text above, the three most frequently appeared words are:",
        50,
    ),
    "qa": (
        r"Answer the question based on the given documents\. Only give me the answer and do not output any other "
        r"words\.\n\nQuestion: \S.*\? ",
        r"Answer:",
        32,
    ),
}


@pytest.fixture(scope="module")
def tokenizer():
    return make_tiny_tokenizer()


@pytest.fixture(scope="module")
def rows(tokenizer):
    """Task → four rows of 3,000 tiny tokens, in which every task fits in full."""
    rows = ruler_rows(tokenizer, 3000, 4, 0)
    return {task: [row for row in rows if row["task"] == task] for task in TASKS}


def num_tokens(tokenizer, row) -> int:
    return len(tokenizer(row["context"] + row["question"] + row["answer_prefix"], add_special_tokens=False).input_ids)


def longest_piece(task) -> int:
    """Characters, so no fewer tokens of a byte-level tokenizer, of the longest piece of filler."""
    if task == "niah_single_1" or task == "vt":
        return 26
    if task in ("niah_multikey_2", "niah_multikey_3"):
        return 130
    if task.startswith("niah"):
        return max(map(len, essay()[0])) + 1
    return {"cwe": 60, "fwe": 40, "qa_1": 150, "qa_2": 190}[task]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [256, 512, 1024])
def test_prompts_fill_the_length_or_it_is_refused_with_the_least_one(tokenizer, task, length):
    try:
        rows = ruler_rows(tokenizer, length, 2, 0, [task])
    except UserError as error:
        said = re.fullmatch(
            rf"--context_length {length}: too short \({task} needs (\d+)\); choose (\d+) or more", str(error)
        )
        length, slack = int(said[1]), int(said[1])
        assert said[1] == said[2]
        rows = ruler_rows(tokenizer, length, 2, 0, [task])
        with pytest.raises(UserError):
            ruler_rows(tokenizer, length - 1, 2, 0, [task])
    else:
        slack = longest_piece(task)
    assert [length - slack <= num_tokens(tokenizer, row) <= length for row in rows] == [True, True]


def test_every_task_fits_1024_tiny_tokens(tokenizer):
    assert len(ruler_rows(tokenizer, 1024, 1, 0)) == len(TASKS)


def test_the_message_of_several_short_tasks_names_each_and_the_greatest(tokenizer):
    with pytest.raises(UserError, match=r"\(cwe needs \d+, qa_2 needs (\d+)\); choose \d+ or more$") as caught:
        ruler_rows(tokenizer, 128, 1, 0, ["cwe", "qa_2"])
    needs = re.findall(r"needs (\d+)", str(caught.value))
    assert f"choose {max(map(int, needs))} " in str(caught.value)


@settings(deadline=None)
@given(
    first=st.integers(1, 100),
    pieces=st.lists(st.integers(1, 60), min_size=1, max_size=400),
    least=st.integers(0, 5),
    room=st.integers(0, 3000),
)
def test_the_largest_fitting_amount_leaves_no_room_for_a_piece(first, pieces, least, room):
    asked = []

    def tokens(amount):
        asked.append(amount)
        rounds, rest = divmod(amount - least, len(pieces))
        return first + rounds * sum(pieces) + sum(pieces[:rest])

    amount = largest_fitting(tokens, least, first + room)
    left = first + room - tokens(amount)
    assert 0 <= left < max(*pieces, (first + room) / 1000)
    assert len(asked) == len(set(asked)) + 1  # nothing is tokenized twice; here the result is asked for once more
    assert len(asked) < 40


def test_rows_have_the_columns_and_the_wording(rows):
    for task, of_task in rows.items():
        question, prefix, max_new_tokens = WORDING[task.split("_")[0]]
        for row in of_task:
            assert list(row) == ["context", "question", "answer_prefix", "answer", "max_new_tokens", "task"]
            assert re.fullmatch(question, row["question"])
            assert re.fullmatch(prefix, row["answer_prefix"])
            assert (row["task"], row["max_new_tokens"]) == (task, max_new_tokens)
            assert row["answer"]
            assert all(isinstance(text, str) and text for text in row["answer"])
            # cut at its last question, the whole prompt falls into the same three parts
            whole = row["context"] + row["question"] + row["answer_prefix"]
            begin = list(re.finditer(re.escape(row["question"][:24]), whole))[-1].start()
            assert whole[:begin] == row["context"]
            assert row["question"].find(row["answer_prefix"][:7]) == -1 or task.startswith("qa")


def test_a_row_depends_on_seed_task_and_number_alone(tokenizer):
    few = ruler_rows(tokenizer, 1500, 1, 3)
    many = ruler_rows(tokenizer, 1500, 2, 3, ("qa_1", "niah_single_2", "cwe"))
    assert [row["task"] for row in many] == ["qa_1", "qa_1", "niah_single_2", "niah_single_2", "cwe", "cwe"]
    assert all(row in few for row in many[::2])
    assert not any(row in few for row in many[1::2])
    other = ruler_rows(tokenizer, 1500, 1, 4)
    assert not any(row["context"] == seeded["context"] for row, seeded in zip(other, few, strict=True))
    assert not any(row["answer"] == seeded["answer"] for row, seeded in zip(other, few, strict=True))


# Needles


@pytest.mark.parametrize("task", NIAH)
def test_needles_are_told_once_and_asked_for(rows, task):
    for row in rows[task]:
        told = NEEDLE.findall(row["context"])
        keys, values = [key for _, key, _ in told], [value for *_, value in told]
        asked = [key for key in dict.fromkeys(keys) if f" {key}" in row["question"]]
        assert sorted(value for _, key, value in told if key in asked) == sorted(row["answer"])
        assert all(row["context"].count(value) == 1 for value in row["answer"])
        assert len(values) == len(set(values))
        assert len(set(keys)) == (1 if task == "niah_multivalue" else len(keys))
        assert all(f" {key}" in row["answer_prefix"] for key in asked)
        assert len(asked) == (4 if task == "niah_multiquery" else 1)
        assert len(row["answer"]) == (4 if task in ("niah_multiquery", "niah_multivalue") else 1)


@pytest.mark.parametrize(
    ("task", "count", "key", "value"),
    [
        ("niah_single_1", 1, r"[a-z]+-[a-z]+", r"\d{7}"),
        ("niah_single_2", 1, r"[a-z]+-[a-z]+", r"\d{7}"),
        ("niah_single_3", 1, r"[a-z]+-[a-z]+", r"[\da-f]{8}(-[\da-f]{4}){3}-[\da-f]{12}"),
        ("niah_multikey_1", 4, r"[a-z]+-[a-z]+", r"\d{7}"),
        ("niah_multikey_2", None, r"[a-z]+-[a-z]+", r"\d{7}"),
        ("niah_multikey_3", None, r"[\da-f]{8}(-[\da-f]{4}){3}-[\da-f]{12}", r"[\da-f]{8}(-[\da-f]{4}){3}-[\da-f]{12}"),
        ("niah_multivalue", 4, r"[a-z]+-[a-z]+", r"\d{7}"),
        ("niah_multiquery", 4, r"[a-z]+-[a-z]+", r"\d{7}"),
    ],
)
def test_kinds_and_numbers_of_needles(rows, task, count, key, value):
    for row in rows[task]:
        told = NEEDLE.findall(row["context"])
        assert len(told) == count or (count is None and len(told) > 8)
        assert all(re.fullmatch(key, k) and re.fullmatch(value, v) for _, k, v in told)
        one = len(row["answer"]) == 1
        assert row["context"].startswith("A special magic" if one else "Some special magic")
        assert ("What is the" if one else "What are all the") in row["question"]
        body = row["context"].split("afterwards.\n", 1)[1]
        if task in ("niah_multikey_2", "niah_multikey_3"):
            assert NEEDLE.sub("", body).strip() == ""
        if task == "niah_single_1":
            assert NEEDLE.sub("", body).count("The grass is green.") > 20


def test_the_haystack_is_text_that_training_never_sees(rows):
    held_out = " ".join(" ".join(filter(is_held_out, _documentation())).split())
    twice = f"{held_out} {held_out}"
    for row in rows["niah_multikey_1"]:
        body = row["context"].split("afterwards.\n", 1)[1].strip()
        assert all(part.strip() in twice for part in NEEDLE.split(body)[::4])


def test_no_key_or_value_is_told_twice_in_a_long_context():
    told = NEEDLE.findall(Needles("needles")(random.Random(0), 5000).context)
    assert [len({needle[i] for needle in told}) for i in (1, 2)] == [5001, 5001]


def test_depths_are_uniform():
    places = []
    for seed in range(300):
        lines = Needles("needles")(random.Random(seed), 199).context.split("\n")[1:-1]
        asked = Needles("needles")(random.Random(seed), 0).answer[0]
        places.append(next(i for i, line in enumerate(lines) if asked in line) / 200)
    assert stats.kstest(places, "uniform").pvalue > 0.01


@settings(deadline=None)
@given(st.lists(st.floats(0, 1, exclude_max=True), max_size=8), st.integers(0, 20))
def test_scatter_keeps_the_haystack_and_the_order_of_depths(depths, length):
    pieces, among = [f"p{i}" for i in range(len(depths))], [str(i) for i in range(length)]
    result = scatter(pieces, among, depths)
    assert [item for item in result if item.isdigit()] == among
    found = [depths[int(item[1:])] for item in result if item.startswith("p")]
    assert found == sorted(depths)


# Variables and words


def held(text: str, value: int) -> list[str]:
    """The variables that hold a value after a text is run as a program, in the order in which they got it."""
    memory: dict[str, int] = {}
    for name, source in re.findall(r"VAR ([A-Z]+) = (\d+|VAR [A-Z]+)", text):
        memory[name] = memory[source.removeprefix("VAR ")] if source.startswith("VAR") else int(source)
    return [name for name in memory if memory[name] == value]


def test_variables_can_be_tracked(rows):
    for row in rows["vt"]:
        *example, task = re.split(r"(?<!^)(?=Memorize and track)", row["context"])
        assert held(task, int(re.search(r"\d{5}", row["question"])[0])) == row["answer"]
        assert len(set(row["answer"])) == 5
        assert all(re.fullmatch("[A-Z]{5}", name) for name in row["answer"])
        solved = re.search(r"assgined the value (\d{5}), they are:  ([A-Z ]+)\n\n\n\n$", "".join(example))
        assert held("".join(example), int(solved[1])) == solved[2].split()


@pytest.mark.parametrize("amount", [5, 12, 31])
def test_assignments_stand_in_order_at_any_amount_of_noise(amount):
    prompt = VariableTracking(None)(random.Random(amount), amount)
    assert held(prompt.context, int(re.search(r"\d{5}", prompt.question)[0])) == prompt.answer
    assert len(re.findall(r"grass|sky|sun|Here|There", prompt.context)) == amount


def test_common_words_are_the_most_common(rows):
    for row in rows["cwe"]:
        solved, asked = (set(re.findall(r"\d+\. (\S+)", text)) for text in row["context"].split("Below is")[1:])
        assert not solved & asked
        for text, answer in zip(
            re.findall(r"most often\.\n(.*)\n", row["context"]),
            [re.search(r"list are:(.*)\n", row["context"])[1], row["answer"]],
            strict=True,
        ):
            entries = re.findall(r"(\d+)\. (\S+)", text)
            assert [int(number) for number, _ in entries] == list(range(1, len(entries) + 1))
            counts = Counter(word for _, word in entries)
            wanted = answer if isinstance(answer, list) else re.findall(r"\d+\. (\S+)", answer)
            assert {word for word, _ in counts.most_common(10)} == set(wanted)
            assert len({counts[word] for word in wanted}) == 1
            assert counts.most_common(11)[-1][1] < counts[wanted[0]]
        assert counts[row["answer"][0]] == 6


def test_word_lists_go_on_when_the_words_run_out():
    text = RECIPES["cwe"][1].make(random.Random(0), 30_000).context.split("most often.\n")[-1]
    counts = Counter(re.findall(r"\d+\. (\S+)", text))
    assert Counter(counts.values()) == {6: 10, 1: 30_000}


def test_frequent_words_are_the_most_frequent(rows):
    for row in rows["fwe"]:
        text = re.search(r"coded words\. (.*)\n", row["context"])[1]
        (dots, first), *ranked = Counter(text.split()).most_common(5)
        assert dots == "..."
        assert [word for word, _ in ranked[:3]] == row["answer"]
        assert first > ranked[0][1] > ranked[1][1] > ranked[2][1] > ranked[3][1]
        assert all(re.fullmatch("[a-z]{6}", word) for word in row["answer"])


@pytest.mark.parametrize("amount", range(53, 140))
def test_the_three_most_frequent_words_never_tie_with_the_fourth(amount):
    prompt = RECIPES["fwe"][0].make(random.Random(0), amount)
    counts = Counter(prompt.context.split("coded words. ")[1].split()).most_common(5)
    assert counts[3][1] > max(1, counts[4][1])


# Questions and documents


def articles(row) -> list[str]:
    parts = re.split(r"Document (\d+):\n", row["context"])[1:]
    assert [int(number) for number in parts[::2]] == list(range(1, len(parts) // 2 + 1))
    return parts[1::2]


def test_one_document_answers_a_question(rows):
    for row in rows["qa_1"]:
        (answer,) = row["answer"]
        holding = [text for text in articles(row) if answer in text]
        assert len(holding) == 1
        assert row["context"].count(answer) == 1
        assert answer not in row["question"]
        subject = re.findall(r"(?<=\s)[A-Z][a-z]{5}\b", row["question"].split("Question: ")[1])[-1]
        assert subject in holding[0]
        assert len(articles(row)) > 4


@pytest.mark.parametrize("make", [one_document, two_documents])
def test_filler_of_a_question_is_counted_in_sentences(make):
    sentences = [make(random.Random(0), amount).context.count(".") for amount in range(12)]
    assert [count - sentences[0] for count in sentences] == list(range(12))


def test_two_documents_answer_a_question_together(rows):
    for row in rows["qa_2"]:
        (answer,) = row["answer"]
        (second,) = (text for text in articles(row) if answer in text)
        subject = re.findall(r"(?<=\s)[A-Z][a-z]{5}\b", row["question"].split("Question: ")[1])[-1]
        (first,) = (text for text in articles(row) if subject in text)
        person = second.split("\n")[0]
        assert first != second
        assert person in first
        assert person not in row["question"]
        assert subject not in second
        assert answer not in row["question"]


def test_no_answer_occurs_twice_in_a_long_context():
    world = World(random.Random(0))
    answers = [answer.split()[-1] for _ in range(700) for article in world.pair() for _, answer in article.questions]
    assert len(set(answers)) == len(answers) == 700 * 6


@pytest.mark.parametrize("kind", WORKS, ids=lambda kind: kind.title)
def test_each_part_of_an_article_answers_what_asks_for_it(kind):
    for question, part in [*kind.questions, *BIOGRAPHY.questions]:
        assert "{t}" in question or "{who}" in question
        told = kind if "{t}" in question else BIOGRAPHY
        assert sum(sentence.count(part) for sentence in told.sentences) == 1
        assert part not in told.title


def test_questions_share_no_wording_and_no_names_with_the_recall_rows_of_training():
    def four_grams(texts):
        parts = [part for text in texts for part in re.split(r"\{\w*\}", text.lower())]
        words = [re.findall(r"[a-z']+", part) for part in parts]
        return {gram for part in words for gram in zip(*(part[i:] for i in range(4)), strict=False)}

    kinds = [*WORKS, BIOGRAPHY]
    told = [text for kind in kinds for text in (kind.title, kind.person, *kind.sentences)]
    asked = [question for kind in kinds for question, _ in kind.questions]
    assert not four_grams([*told, *asked]) & four_grams(recall_templates.templates())
    trained = {word for name, value in vars(recall_templates).items() if name.isupper() for word in value}
    assert not trained & {*ADJECTIVES, *NOUNS, *ruler_articles.FIRST_NAMES}


# Refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ["niah_single_4"]}, r"--tasks niah_single_4: .*niah_single_"),
        ({"tasks": ["squad"]}, r"--tasks squad: .*niah_single_1.*qa_2"),
        ({"num_samples": 0}, r"--num_samples 0: choose 1 or more"),
        ({"context_length": 10**6}, r"--context_length 1000000: ruler-local goes up to 262144"),
        ({"context_length": -1}, r"--context_length -1: too short"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(tokenizer, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        ruler_rows(**{"tokenizer": tokenizer, "context_length": 1000, "num_samples": 1, "seed": 0, **changes})
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_with_a_real_tokenizer_at_nvidias_smallest_length():
    from sparsekv.models import load_tokenizer

    tokenizer = load_tokenizer("smollm2-135m")
    for row in ruler_rows(tokenizer, 4096, 3, 0):
        assert 4096 - 130 <= num_tokens(tokenizer, row) <= 4096
        if row["task"] == "cwe":
            text = row["context"].split("most often.\n")[-1]
            assert set(Counter(re.findall(r"\d+\. (\S+)", text)).values()) == {30, 3}
