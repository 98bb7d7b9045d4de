"""The engine gives every answer that kvpress's own pipeline gives, whatever it is batched with."""

import itertools
import logging
import math
from pydoc_data.topics import topics

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import constants
from kvpress import KnormPress, KVPressTextGenerationPipeline, SnapKVPress
from tiny import SHAPE, make_sharp, make_tiny, make_tiny_tokenizer
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache

from sparsekv.errors import UserError
from sparsekv.evaluation.engine import caches as caches_module
from sparsekv.evaluation.engine import engine as engine_module
from sparsekv.evaluation.engine.engine import Engine
from sparsekv.evaluation.engine.memory import held_by_others
from sparsekv.evaluation.engine.model_check import check_model
from sparsekv.evaluation.engine.prefill import prefill_shared
from sparsekv.evaluation.engine.sampling import Sampling
from sparsekv.evaluation.engine.work import FULL_CACHE, Answer, Cell, ContextWork, Failure, Question
from sparsekv.presses import is_decoding, make_press, needs_eager, why_not
from sparsekv.prompts import encode_prompt

# kvpress itself fails on random weights for presses that mask by head (no hyperplane), and on any model for PyramidKV
# and a question of several tokens: tests/integration/test_engine_kvpress.py has those on a real model
PRESSES = (
    "snapkv",
    "streaming_llm",
    "critical_snapkv",
    "knorm",
    "keydiff",
    "chunkkv",
    "observed_attention",
    "key_rerotation_streaming_llm",
    "merging_knorm",
    "anchor",
    "snapkv:window_size=16",
    "decoding_knorm:compression_interval=4",
)
CELLS = (FULL_CACHE, *(Cell(press, ratio) for press in PRESSES for ratio in (0.3, 0.7)))
QUESTIONS = ("What is this about?", "Name its second word. Then go on with the rest of the text.")
TEXTS = [
    text[start : start + length] for text, start, length in zip(topics.values(), (0, 40), (700, 1000), strict=False)
]


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def model(request, tmp_path_factory):
    model = make_tiny(request.param)
    with torch.no_grad():
        for weight in model.parameters():  # sharper attention, or eviction would hardly show
            weight.mul_(3)
    return model


@pytest.fixture(scope="module")
def tokenizer():
    return make_tiny_tokenizer()


def works_of(tokenizer, cells, max_new_tokens=10):
    works = []
    for number, text in enumerate(TEXTS):
        context, questions = encode_prompt(tokenizer, text, QUESTIONS, "It is")
        asked = [Question(10 * number + i, ids, max_new_tokens + number) for i, ids in enumerate(questions)]
        works.append(ContextWork(context, tuple(asked), tuple(cells)))
    return works


def texts_of(engine, works):
    """(row, cell, generation) → text, each once."""
    found = {}
    for answers in engine.run(works):
        for answer in answers:
            assert isinstance(answer, Answer), answer
            key = (answer.row, answer.cell, answer.generation)
            assert key not in found
            found[key] = answer.text
    return found


def pipeline_texts(model, tokenizer, cells, max_new_tokens=10):
    pipeline = KVPressTextGenerationPipeline(model=model, tokenizer=tokenizer)
    found = {}
    for cell, (number, text) in itertools.product(cells, enumerate(TEXTS)):
        press = make_press(cell.press, cell.ratio, tokenizer)
        options = {"answer_prefix": "It is", "press": press, "max_new_tokens": max_new_tokens + number}
        if press is not None and needs_eager(press):
            model.set_attn_implementation("eager")
        if is_decoding(cell.press):
            answers = [pipeline(text, question=question, **options)["answer"] for question in QUESTIONS]
        else:
            answers = pipeline(text, questions=list(QUESTIONS), **options)["answers"]
        model.set_attn_implementation("sdpa")
        found |= {(10 * number + i, cell, 0): answer for i, answer in enumerate(answers)}
    return found


@pytest.fixture(scope="module")
def expected(model, tokenizer):
    return pipeline_texts(model, tokenizer, CELLS)


# ---- identical to kvpress ----


@pytest.mark.parametrize("budget", [2**30, 2_000_000, 1], ids=["one batch", "several", "a row at a time"])
def test_answers_are_those_of_kvpress(model, tokenizer, expected, budget):
    assert texts_of(Engine(model, tokenizer, budget), works_of(tokenizer, CELLS)) == expected
    assert len(set(expected.values())) > len(CELLS), "the cells' answers differ, or this shows nothing"


def test_model_is_left_as_it_was(model, tokenizer):
    before, state = model.config._attn_implementation, torch.get_rng_state()
    texts_of(Engine(model, tokenizer), works_of(tokenizer, CELLS[:4]))
    assert model.config._attn_implementation == before
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks for module in model.modules())


def test_stop_token_ends_an_answer_but_not_as_its_first_token(model, tokenizer, monkeypatch):
    cells = CELLS[:3]
    tokens = []
    plain = engine_module.generate
    monkeypatch.setattr(engine_module, "generate", lambda *args: tokens.extend(found := plain(*args)) or found)
    free = texts_of(Engine(model, tokenizer), works_of(tokenizer, cells, 8))
    monkeypatch.setattr(model.generation_config, "eos_token_id", [tokens[0][0], tokens[1][2]])
    stopped = texts_of(Engine(model, tokenizer), works_of(tokenizer, cells, 8))
    assert stopped == pipeline_texts(model, tokenizer, cells, 8)
    assert stopped != free


@pytest.mark.parametrize("template", [True, False])
def test_prompt_is_that_of_kvpress(tokenizer, template):
    tokenizer = make_tiny_tokenizer()
    if not template:
        tokenizer.chat_template = None
    pipeline = KVPressTextGenerationPipeline(model=make_tiny("llama"), tokenizer=tokenizer)
    theirs = pipeline.preprocess(TEXTS[0], list(QUESTIONS), "It is", max_context_length=10**9)
    context, questions = encode_prompt(tokenizer, TEXTS[0], QUESTIONS, "It is")
    assert torch.equal(context, theirs["context_ids"])
    assert all(torch.equal(*pair) for pair in zip(questions, theirs["questions_ids"], strict=True))


def test_template_can_be_left_out(tokenizer):
    plain = make_tiny_tokenizer()
    plain.chat_template = None
    for ours, theirs in zip(
        encode_prompt(tokenizer, "a", ["b"], "c", chat_template=False),
        encode_prompt(plain, "a", ["b"], "c"),
        strict=True,
    ):
        assert torch.equal(torch.cat([*ours]), torch.cat([*theirs]))


# ---- sampling ----


def test_draws_do_not_depend_on_the_batch(model, tokenizer):
    sampling = Sampling(temperature=1.0, top_p=0.95, top_k=50, num_generations=3, seed=1)
    cells = CELLS[:4]
    together = texts_of(Engine(model, tokenizer, 2**30, sampling), works_of(tokenizer, cells))
    apart = texts_of(Engine(model, tokenizer, 1, sampling), works_of(tokenizer, cells))
    assert together == apart
    assert len({together[0, FULL_CACHE, generation] for generation in range(3)}) == 3
    other = Sampling(temperature=1.0, top_p=0.95, top_k=50, num_generations=3, seed=2)
    assert texts_of(Engine(model, tokenizer, 2**30, other), works_of(tokenizer, cells)) != together


@pytest.mark.parametrize(
    "press", ["decoding_random:compression_interval=2", "cam_knorm:target_size=20:compression_interval=2"]
)
def test_presses_that_draw_while_decoding_do_so_by_the_seed_and_the_row(tokenizer, press):
    model = make_sharp("llama")

    def answers(works, seed=0):
        return texts_of(Engine(model, tokenizer, sampling=Sampling(seed=seed)), works)

    works = works_of(tokenizer, (Cell(press, 0.8),))
    found = answers(works)
    assert found == answers(works) == answers(works[::-1])
    assert found == {key: text for work in works for key, text in answers([work]).items()}
    assert any(answers(works, seed) != found for seed in range(1, 4)), "merging shows in few answers"


# ---- likelihood ----


def likelihood_work(tokenizer, cells, question):
    context, questions = encode_prompt(tokenizer, TEXTS[0], [question], "", chat_template=False)
    ids = questions[0] if question else torch.zeros(1, 0, dtype=torch.long)
    answer = tokenizer.encode(TEXTS[1][:60], return_tensors="pt", add_special_tokens=False)
    return ContextWork(context, (Question(0, ids, 0, answer),), tuple(cells))


@torch.no_grad()
def continued(model, work, press):
    """Log-probabilities of the scored tokens by a plain kvpress prefill and continuation."""
    cache = DynamicCache()
    with press(model):
        model.model(work.ids, past_key_values=cache)
    question = work.questions[0]
    ids = torch.cat([question.ids, question.answer_ids], dim=1)
    positions = torch.arange(work.ids.shape[1], work.ids.shape[1] + ids.shape[1])[None]
    logits = model(ids, past_key_values=cache, position_ids=positions).logits[0]
    first = max(1, question.ids.shape[1])
    return logits[first - 1 : -1].log_softmax(-1), ids[0, first:]


@pytest.mark.parametrize("question", ["", "And then?"])
@pytest.mark.parametrize("with_full", [True, False])
def test_likelihood_is_that_of_a_plain_continuation(model, tokenizer, question, with_full):
    cell = Cell("knorm", 0.6)
    work = likelihood_work(tokenizer, [FULL_CACHE, cell] if with_full else [cell], question)
    found = {answer.cell: answer for answers in Engine(model, tokenizer).run([work]) for answer in answers}
    assert set(found) == set(work.cells)
    full, _ = continued(model, work, KnormPress(0.0))
    evicted, targets = continued(model, work, KnormPress(0.6))
    assert found[cell].nll == pytest.approx(float(F.nll_loss(evicted, targets)), abs=1e-4)
    divergence = float((full.exp() * (full - evicted)).sum(-1).mean())
    assert found[cell].kl == pytest.approx(divergence, abs=1e-4)
    assert found[cell].kl > 0.01
    assert found[cell].num_tokens == len(targets)
    if with_full:
        assert found[FULL_CACHE].kl == 0


# ---- memory and failures ----


def out_of_memory(*_, **__):
    raise torch.cuda.OutOfMemoryError


def test_a_batch_too_large_is_halved(model, tokenizer, monkeypatch):
    cells = CELLS[:4]
    wanted = texts_of(Engine(model, tokenizer), works_of(tokenizer, cells))
    sizes = []
    plain = engine_module.generate

    def generate(model, rows, *args):
        sizes.append(len(rows))
        return out_of_memory() if len(rows) > 3 else plain(model, rows, *args)

    monkeypatch.setattr(engine_module, "generate", generate)
    assert texts_of(Engine(model, tokenizer), works_of(tokenizer, cells)) == wanted
    assert max(sizes) > 3 >= sizes[-1]


def test_a_prefill_too_large_is_done_a_cell_at_a_time(model, tokenizer, monkeypatch):
    cells = CELLS[:4]
    wanted = texts_of(Engine(model, tokenizer), works_of(tokenizer, cells))
    plain = caches_module.prefill_shared
    monkeypatch.setattr(
        caches_module,
        "prefill_shared",
        lambda model, ids, presses, seed: out_of_memory() if len(presses) > 1 else plain(model, ids, presses, seed),
    )
    assert texts_of(Engine(model, tokenizer), works_of(tokenizer, cells)) == wanted


def test_a_row_that_never_fits_is_one_line(model, tokenizer, monkeypatch):
    monkeypatch.setattr(engine_module, "generate", out_of_memory)
    with pytest.raises(UserError, match=r"^out of memory with one row of .*--context_length$"):
        texts_of(Engine(model, tokenizer), works_of(tokenizer, CELLS[:2]))


def test_memory_that_other_processes_hold_is_told(model, tokenizer, monkeypatch):
    monkeypatch.setattr(engine_module, "generate", out_of_memory)
    for held, told in ((70.0, True), (0.5, False)):
        monkeypatch.setattr(engine_module, "held_by_others", lambda device, held=held: held * 2**30)
        with pytest.raises(UserError, match="shorten --context_length") as error:
            texts_of(Engine(model, tokenizer), works_of(tokenizer, CELLS[:2]))
        hint = "as other processes hold 70.0 GiB of its device, give each a --memory_budget_gib"
        assert (hint in str(error.value)) == told
    assert held_by_others(model.device) == 0, "on a CPU"


def test_a_press_that_fails_does_not_end_the_matrix(model, tokenizer, monkeypatch):
    def score(self, *args, **kwargs):
        raise ValueError("no score\nfor you")

    monkeypatch.setattr(SnapKVPress, "score", score)
    cells = (FULL_CACHE, Cell("snapkv", 0.5), Cell("knorm", 0.5), Cell("decoding_snapkv:compression_interval=2", 0.5))
    found = list(itertools.chain(*Engine(model, tokenizer).run(works_of(tokenizer, cells))))
    failures = [each for each in found if isinstance(each, Failure)]
    reason = f"ValueError: no score for you (row 0, a context of {works_of(tokenizer, cells)[0].ids.shape[1]} tokens)"
    assert failures == [Failure(cells[3], reason), Failure(cells[1], reason)]
    assert {each.cell for each in found if isinstance(each, Answer)} == {FULL_CACHE, cells[2]}


def test_a_decoding_press_that_cannot_run_does_not_end_the_matrix(model, tokenizer, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    cells = (Cell("decoding_qfilter", 0.5), Cell("decoding_knorm:compression_interval=2", 0.5))
    found = list(itertools.chain(*Engine(model, tokenizer).run(works_of(tokenizer, cells))))
    (failure,) = (each for each in found if isinstance(each, Failure))
    assert failure == Failure(cells[0], why_not("decoding_qfilter", model)), "said once, for both contexts"
    assert {(each.row, each.cell) for each in found if isinstance(each, Answer)} == {
        (row, cells[1]) for row in (0, 1, 10, 11)
    }


@pytest.mark.parametrize(
    ("family", "changes", "why"),
    [
        ("gemma3", {}, "has sliding_attention layers"),
        ("mistral", {"sliding_window": 64}, "has sliding_attention layers"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "rotary type dynamic",
        ),
    ],
)
def test_models_that_would_be_answered_wrongly_are_refused(tokenizer, family, changes, why):
    with pytest.raises(UserError, match=f"^--model .*{why}"):
        Engine(make_tiny(family, **changes), tokenizer)


def test_keys_and_values_of_two_widths_are_refused():
    with pytest.raises(UserError, match="--model x: deepseek_v3 has keys of another width than its values"):
        check_model(CONFIG_MAPPING["deepseek_v3"](), "x")


def test_attention_that_is_not_the_interfaces_is_refused(tokenizer):
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["stablelm"](**SHAPE))
    with pytest.raises(UserError, match=r"^--model .*: its attention does not go through transformers' attention int"):
        Engine(model, tokenizer)


def test_a_window_that_is_not_used_is_no_window(tokenizer):
    Engine(make_tiny("qwen2", sliding_window=64, use_sliding_window=False), tokenizer)


def test_a_template_that_fails_is_one_line():
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('not like this') }}"
    with pytest.raises(UserError, match=r"^--chat_template true: .*not like this.*pass false$"):
        encode_prompt(tokenizer, "a", ["b"], "")


def test_a_text_beyond_the_models_positions_is_no_warning_of_the_tokenizer(monkeypatch, caplog):
    """Whether it fits is said elsewhere, in one line; contexts may still be cut."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    context, _ = encode_prompt(make_tiny_tokenizer(), "a " * 3000, ["b"], "")
    assert context.shape[1] > make_tiny_tokenizer().model_max_length
    assert "maximum sequence length" not in caplog.text


def test_a_likelihood_needs_plain_logits(model, tokenizer, monkeypatch):
    monkeypatch.setattr(model.config, "logits_scaling", 8.0, raising=False)
    with pytest.raises(UserError, match="logits_scaling"):
        list(Engine(model, tokenizer).run([likelihood_work(tokenizer, [FULL_CACHE], "")]))


def test_a_prefill_that_never_fits_is_one_line(model, tokenizer, monkeypatch):
    monkeypatch.setattr(caches_module, "prefill_shared", out_of_memory)
    with pytest.raises(UserError, match=r"^out of memory with one row of .*--context_length$"):
        texts_of(Engine(model, tokenizer), works_of(tokenizer, CELLS[:2]))


def test_an_idle_press_is_reported(model, tokenizer, caplog):
    cell = Cell("decoding_knorm", 0.5)
    answers = [each for batch in Engine(model, tokenizer).run(works_of(tokenizer, [cell])) for each in batch]
    (said,) = [message for message in caplog.messages if "evicts nothing" in message]
    assert said.endswith("give decoding_knorm:compression_interval=N")
    assert all(answer.prefill_seconds > 0 for answer in answers)
    assert answers[0].kv_bytes["requested"] == pytest.approx(answers[0].kv_bytes["full"] / 2, rel=0.01)


def test_a_press_that_acts_in_one_row_is_not_idle(model, tokenizer, caplog):
    """The first rows to be answered are the shortest."""
    works = works_of(tokenizer, [Cell("decoding_knorm:compression_interval=11", 0.5)])
    assert {question.max_new_tokens for work in works for question in work.questions} == {10, 11}
    list(Engine(model, tokenizer).run(works))
    assert not caplog.messages


# ---- what a cache holds ----


def test_bytes_of_a_cache(model, tokenizer):
    cells = (FULL_CACHE, Cell("knorm", 0.5), Cell("adakv_snapkv", 0.5))
    work = works_of(tokenizer, cells)[0]
    found = {answer.cell: answer.kv_bytes for answers in Engine(model, tokenizer).run([work]) for answer in answers}
    length = work.ids.shape[1]
    full = 2 * 2 * 2 * length * 16 * 4  # keys and values, layers, heads, tokens, head_dim, bytes
    kept = math.floor(0.5 * length) / length
    assert found[FULL_CACHE] == {"full": full, "requested": full, "logical": full, "physical": full}
    assert found[cells[1]] == {"full": full, "requested": full / 2, "logical": full * kept, "physical": full * kept}
    assert found[cells[2]]["physical"] == full, "masked by head: nothing is freed"
    assert found[cells[2]]["logical"] == pytest.approx(full * kept, rel=0.01)


def test_heads_keep_their_own_entries(model, tokenizer):
    ids = works_of(tokenizer, CELLS)[0].ids
    cache = prefill_shared(model, ids, {"full": None, "press": make_press("adakv_snapkv", 0.6)})
    for whole, entries in zip(cache["full"].layers, cache["press"].layers, strict=True):
        assert int(entries.counts.sum()) == 2 * int(ids.shape[1] * (1 - 0.6))
        for head, count in enumerate(entries.counts):
            for key in entries.keys[head, :count]:
                assert (whole.keys[head] == key).all(-1).any()


def test_random_presses_draw_alike_in_every_run(model, tokenizer):
    ids = works_of(tokenizer, CELLS)[0].ids
    runs = [prefill_shared(model, ids, {"random": make_press("random", 0.5), **more}) for more in ({}, {"full": None})]
    first, second = (run["random"].layers[1].keys for run in runs)
    assert torch.equal(first, second)
    assert not torch.equal(
        first, prefill_shared(model, ids, {"random": make_press("random", 0.5)}, 1)["random"].layers[1].keys
    )
