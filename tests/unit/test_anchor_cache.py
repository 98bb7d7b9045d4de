"""The shrinking cache against a dense mask of the same policy, in every way that a model is made to generate."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FAMILIES, VOCAB_SIZE, make_sharp, make_tiny_tokenizer
from transformers import DynamicCache, MambaConfig, MambaForCausalLM

import sparsekv
from sparsekv.anchors import AnchorConfig, AnchorSelector
from sparsekv.errors import UserError
from sparsekv.inference.anchor_cache import AnchorCache
from sparsekv.inference.policy import AnchorPolicy

CHANGES = {"gemma3": {"layer_types": ["full_attention"] * 2}}
MODELS = {name: make_sharp(name, **CHANGES.get(name, {})) for name in FAMILIES}
SELECTORS = {
    sizes: AnchorSelector(AnchorConfig(sink_size=sizes[0], recent_size=sizes[1]), make_tiny_tokenizer())
    for sizes in [(sink, recent) for sink in range(4) for recent in range(8)]
}
TOLERANCE = 1e-4


def text(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random ids of which about a quarter are anchors."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCAB_SIZE, (rows, length), generator=generator)
    anchors = SELECTORS[0, 0].classes(torch.arange(VOCAB_SIZE)).nonzero()[:, 0]
    marks = anchors[torch.randint(3, len(anchors), (rows, length), generator=generator)]
    return torch.where(torch.rand(rows, length, generator=generator) < 0.2, marks, ids)


def left_padded(rows: int, length: int, pads: list[int]) -> torch.Tensor:
    return (torch.arange(length) >= torch.tensor(pads)[:, None]).long().expand(rows, -1)


def kept_by_hand(selector: AnchorSelector, ids, real, cut: int, budget: int | None) -> torch.Tensor:
    """Bool[B, L]: what the policy keeps of [0, cut), token by token, by the selector of training."""
    keep = selector(ids, real, cut)
    if budget is not None:
        room = budget - selector.config.sink_size - selector.config.recent_size
        for row in range(len(ids)):
            tokens = real[row, :cut].nonzero()[:, 0].tolist()
            middle = tokens[selector.config.sink_size : max(0, len(tokens) - selector.config.recent_size)]
            anchors = [token for token in middle if keep[row, token]]
            keep[row, anchors[: max(0, len(anchors) - room)]] = False
    return keep


def dense_mask(selector, ids, real, mode: str, cut: int, budget: int | None) -> torch.Tensor:
    """Bool[B, 1, L, L]: who sees whom."""
    length = ids.shape[1]
    past = torch.ones(length, length, dtype=torch.bool).tril()
    if mode == "streaming":
        seen = torch.stack([kept_by_hand(selector, ids, real, query + 1, budget) for query in range(length)], dim=1)
    else:
        seen = past & (real != 0)[:, None]
        seen[:, cut:, :cut] &= kept_by_hand(selector, ids, real, cut, budget)[:, None, :cut]
    return ((seen & past) | torch.eye(length, dtype=torch.bool))[:, None]


def positions(real: torch.Tensor) -> torch.Tensor:
    return (real.cumsum(-1) - 1).clamp(min=0)


@torch.no_grad()
def reference(model, selector, ids, real, mode="prefill", cut=0, budget=None) -> torch.Tensor:
    mask = dense_mask(selector, ids, real, mode, cut, budget)
    if model.config._attn_implementation == "eager":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    return model(input_ids=ids, attention_mask=mask, position_ids=positions(real), use_cache=False).logits


@torch.no_grad()
def by_chunks(model, cache, ids, real, sizes) -> torch.Tensor:
    logits, start = [], 0
    for chunk in ids.split(sizes, dim=1):
        stop = start + chunk.shape[1]
        position = positions(real)[:, start:stop]
        logits.append(
            model(input_ids=chunk, attention_mask=real[:, :stop], position_ids=position, past_key_values=cache).logits
        )
        start = stop
        assert cache.get_seq_length() == stop
    return torch.cat(logits, dim=1)


def assert_close(found, wanted, real):
    assert (found - wanted)[real != 0].abs().max() < TOLERANCE


def assert_holds_only(cache: AnchorCache, model) -> None:
    """The tensors have room for the longest row and no more."""
    config, longest = model.config, int(cache.kept.max())
    wanted = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * longest * len(cache.kept)
    found = sum(t.untyped_storage().nbytes() for layer in cache.layers for t in (layer.keys, layer.values))
    assert found == cache.nbytes
    assert wanted <= found <= 1.05 * wanted


cases = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 10**6),
        "mode": st.sampled_from(["prefill", "streaming"]),
        "sizes": st.lists(st.integers(1, 13), min_size=2, max_size=6),
        "sink": st.integers(0, 3),
        "recent": st.integers(0, 7),
        "room": st.none() | st.integers(0, 5),
        "pad": st.integers(0, 9),
        "late": st.booleans(),
        "holes": st.booleans(),
    }
)


@pytest.mark.parametrize("name", FAMILIES)
@given(case=cases)
@settings(max_examples=25, deadline=None)
def test_logits_are_those_of_a_dense_mask(name, case):
    model, selector = MODELS[name], SELECTORS[case["sink"], case["recent"]]
    sizes, length = case["sizes"], sum(case["sizes"])
    budget = None if case["room"] is None else max(1, case["sink"] + case["recent"] + case["room"])
    ids, real = text(3, length, case["seed"]), left_padded(3, length, [0, min(case["pad"], length - 1), 1])
    if case["holes"]:  # as where turns of several rows differ in length
        real = real * (torch.rand(3, length, generator=torch.Generator().manual_seed(case["seed"])) < 0.8)
    prefill = case["mode"] == "prefill"
    cut = (length // 2 if case["late"] else sizes[0]) if prefill else None
    given_cut = cut if case["late"] else None
    cache = AnchorCache(model, selector=selector, mode=case["mode"], budget=budget, context_length=given_cut)
    found = by_chunks(model, cache, ids, real, sizes)
    assert_close(found, reference(model, selector, ids, real, case["mode"], cut, budget), real)
    kept = kept_by_hand(selector, ids, real, cut or length, budget)[:, : cut or length].sum(-1)
    assert cache.kept.tolist() == (kept + real[:, cut or length :].sum(-1)).tolist()
    if int(cache.kept.max()):
        assert_holds_only(cache, model)


def test_the_reference_tells_eviction_from_none():
    ids, selector = text(2, 40), SELECTORS[2, 4]
    real = torch.ones_like(ids)
    full = reference(MODELS["llama"], selector, ids, real, cut=40)
    for mode in ("prefill", "streaming"):
        assert (full - reference(MODELS["llama"], selector, ids, real, mode, 30)).abs().max() > 100 * TOLERANCE


def test_eager_attention_gets_the_same_mask():
    model = make_sharp("llama")
    model.set_attn_implementation("eager")
    ids, real = text(2, 30), left_padded(2, 30, [0, 6])
    for mode in ("prefill", "streaming"):
        cache = AnchorCache(model, selector=SELECTORS[2, 4], mode=mode, budget=8)
        found = by_chunks(model, cache, ids, real, [12, 7, 1, 1, 9])
        assert_close(found, reference(model, SELECTORS[2, 4], ids, real, mode, 12, 8), real)


# ---- generate ----

PADS = [0, 7, 3]
GENERATE = {"max_new_tokens": 9, "eos_token_id": None, "pad_token_id": 0}


def generate(cache, ids, real, **options):
    options = {"return_dict_in_generate": True, "output_logits": True, **GENERATE, **options}
    return MODELS["llama"].generate(ids, attention_mask=real, past_key_values=cache, **options)


def grown(real, sequences):
    return torch.nn.functional.pad(real, (0, sequences.shape[1] - real.shape[1]), value=1)


def assert_generated_exactly(out, real, start, mode, cut, budget=None):
    """Every step's logits are the reference's for the text that was generated."""
    real = grown(real, out.sequences)
    wanted = reference(MODELS["llama"], SELECTORS[2, 4], out.sequences, real, mode, cut, budget)[:, start - 1 : -1]
    assert (torch.stack(out.logits, dim=1) - wanted).abs().max() < TOLERANCE


@pytest.mark.parametrize("mode", ["prefill", "streaming"])
@pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": True, "top_k": 20}])
def test_generate(mode, options):
    ids, real = text(3, 24), left_padded(3, 24, PADS)
    cache = AnchorCache(MODELS["llama"], selector=SELECTORS[2, 4], mode=mode, budget=10)
    torch.manual_seed(0)
    out = generate(cache, ids, real, **options)
    assert_generated_exactly(out, real, 24, mode, 24, 10)
    assert cache.held() < 24 + 9 - 1
    assert_holds_only(cache, MODELS["llama"])


@pytest.mark.parametrize("mode", ["prefill", "streaming"])
def test_prefill_in_chunks(mode):
    """Where transformers itself reads chunks at their true positions (not in 5.2, with no cache)."""
    ids, real = text(3, 24), left_padded(3, 24, PADS)
    context = 24 if mode == "prefill" else None
    cache = AnchorCache(MODELS["llama"], selector=SELECTORS[2, 4], mode=mode, context_length=context)
    stock = generate(DynamicCache(), ids, real, do_sample=False, prefill_chunk_size=5)
    whole = generate(DynamicCache(), ids, real, do_sample=False)
    if not torch.allclose(stock.logits[0], whole.logits[0], atol=TOLERANCE):
        with pytest.raises(UserError, match=r"position_ids begin at .*prefill_chunk_size"):
            generate(cache, ids, real, do_sample=False, prefill_chunk_size=5)
        return
    out = generate(cache, ids, real, do_sample=False, prefill_chunk_size=5)
    assert_generated_exactly(out, real, 24, mode, 24)


@pytest.mark.parametrize("mode", ["prefill", "streaming"])
def test_beams(mode):
    ids, real = text(3, 24), left_padded(3, 24, PADS)
    cache = AnchorCache(MODELS["llama"], selector=SELECTORS[2, 4], mode=mode, budget=9)
    options = {"num_beams": 3, "do_sample": False, "length_penalty": 0.0, "output_scores": True}
    out = generate(cache, ids, real, **options)
    real = grown(real, out.sequences)
    wanted = reference(MODELS["llama"], SELECTORS[2, 4], out.sequences, real, mode, 24, 9)[:, 23:-1].log_softmax(-1)
    scores = wanted.gather(2, out.sequences[:, 24:, None])[..., 0].sum(-1)
    assert (scores - out.sequences_scores).abs().max() < TOLERANCE


@pytest.mark.parametrize("mode", ["prefill", "streaming"])
def test_a_second_turn(mode):
    ids, real = text(3, 24), left_padded(3, 24, PADS)
    cache = AnchorCache(MODELS["llama"], selector=SELECTORS[2, 4], mode=mode, budget=9)
    first = generate(cache, ids, real, do_sample=False).sequences
    ids = torch.cat([first, text(3, 6, seed=1)], dim=1)
    real = grown(real, ids)
    out = generate(cache, ids, real, do_sample=False)
    assert_generated_exactly(out, real, ids.shape[1], mode, 24, 9)


def test_assisted_decoding_where_the_context_is_given():
    ids = text(1, 24).repeat(1, 2)
    real = torch.ones_like(ids)
    cache = AnchorCache(MODELS["llama"], selector=SELECTORS[2, 4], context_length=40)
    out = generate(cache, ids, real, do_sample=False, prompt_lookup_num_tokens=4, eos_token_id=2)
    wanted = reference(MODELS["llama"], SELECTORS[2, 4], out.sequences, grown(real, out.sequences), cut=40)
    assert (wanted[0, 47:-1].argmax(-1) == out.sequences[0, 48:]).all()


def test_long_text_in_bounded_memory():
    """100,000 tokens through a cache of 4,096. With one layer, what is left of each depends on nothing before it."""
    model = make_sharp("llama", num_hidden_layers=1, max_position_embeddings=2**17)
    selector, length, budget = SELECTORS[3, 7], 100_000, 4096
    ids = text(1, length)
    cache = AnchorCache(model, selector=selector, mode="streaming", budget=budget)
    with torch.no_grad():
        for chunk in ids.split(1000, dim=1):
            found = model(input_ids=chunk, past_key_values=cache, logits_to_keep=1).logits
            assert cache.kept.item() == cache.held() <= budget
            assert_holds_only(cache, model)
        kept = kept_by_hand(selector, ids, torch.ones_like(ids), length, budget)
        left = {"input_ids": ids[kept][None], "position_ids": kept.nonzero()[:, 1][None]}
        mask = torch.ones(1, 1, budget, budget, dtype=torch.bool).tril()  # without it, gaps would part the text
        wanted = model(**left, attention_mask=mask, use_cache=False, logits_to_keep=1).logits
    assert cache.get_seq_length() == length
    assert cache.held() == budget
    assert (found - wanted).abs().max() < TOLERANCE


# ---- rows and lengths ----


def filled(mode="prefill", rows=3, length=24, **options):
    ids, real = text(rows, length), left_padded(rows, length, PADS[:rows])
    cache = AnchorCache(MODELS["llama"], selector=SELECTORS[2, 4], mode=mode, **options)
    by_chunks(MODELS["llama"], cache, ids, real, [length])
    return cache, ids, real


def continued(cache, ids, real, tail, mode="prefill", budget=None):
    """Feed the tail and compare all its logits."""
    whole, start = torch.cat([ids, tail], dim=1), ids.shape[1]
    real = grown(real, whole)
    with torch.no_grad():
        found = MODELS["llama"](
            input_ids=tail, attention_mask=real, position_ids=positions(real)[:, start:], past_key_values=cache
        ).logits
    wanted = reference(MODELS["llama"], SELECTORS[2, 4], whole, real, mode, 24, budget)
    assert (found - wanted[:, start:]).abs().max() < TOLERANCE


@pytest.mark.parametrize("mode", ["prefill", "streaming"])
@pytest.mark.parametrize("change", ["reorder", "select", "repeat"])
def test_rows_move_with_all_that_is_known_of_them(mode, change):
    cache, ids, real = filled(mode, budget=9)
    index = {"reorder": [2, 0, 0], "select": [2, 1], "repeat": [0, 0, 1, 1, 2, 2]}[change]
    if change == "reorder":
        cache.reorder_cache(torch.tensor(index))
    elif change == "select":
        cache.batch_select_indices(torch.tensor(index))
    else:
        cache.batch_repeat_interleave(2)
    continued(cache, ids[index], real[index], text(len(index), 6, seed=3), mode, 9)


def test_a_copy_is_a_prefix_for_several_questions():
    cache, ids, real = filled()
    for seed in range(3):
        continued(copy.deepcopy(cache), ids, real, text(3, 5, seed), "prefill")
    assert cache.get_seq_length() == 24


@pytest.mark.parametrize("given", [26, -4])
def test_crop(given):
    cache, ids, real = filled()
    tail = text(3, 6, seed=4)
    continued(cache, ids, real, tail)
    bytes_before = cache.nbytes
    cache.crop(given)
    assert cache.nbytes < bytes_before
    ids, real = torch.cat([ids, tail[:, :2]], dim=1), grown(real, torch.cat([ids, tail[:, :2]], dim=1))
    assert cache.get_seq_length() == 26
    continued(cache, ids, real, text(3, 5, seed=5))
    cache.crop(0)
    assert cache.get_seq_length() == 31


def test_a_step_can_be_undone_while_streaming():
    cache, ids, real = filled("streaming", budget=9)
    continued(cache, ids, real, text(3, 1, seed=6), "streaming", 9)
    cache.crop(-1)
    continued(cache, ids, real, text(3, 4, seed=7), "streaming", 9)


def test_reset():
    cache, ids, real = filled()
    cache.reset()
    assert (cache.get_seq_length(), cache.held(), cache.nbytes, len(cache.kept)) == (0, 0, 0, 0)
    found = by_chunks(MODELS["llama"], cache, ids[:2, 4:], real[:2, 4:], [20])
    assert_close(found, reference(MODELS["llama"], SELECTORS[2, 4], ids[:2, 4:], real[:2, 4:], cut=20), real[:2, 4:])


# ---- the policy ----


@given(st.integers(0, 3), st.integers(0, 5), st.none() | st.integers(0, 4), st.lists(st.booleans(), max_size=30))
def test_what_has_left_never_comes_back_and_the_budget_holds(sink, recent, room, marks):
    budget = None if room is None else max(1, sink + recent + room)
    policy = AnchorPolicy(sink, recent, budget)
    marks = [mark and position >= sink for position, mark in enumerate(marks)]
    older = [sum(marks[:position]) for position in range(len(marks) + 1)]
    gone: set[int] = set()
    for context in range(1, len(marks) + 1):
        ring = older[max(0, context - recent)]
        kept = {p for p in range(context) if policy.keeps(p, marks[p], context, older[p], ring)}
        assert not kept & gone
        assert budget is None or len(kept) <= budget
        gone = set(range(context)) - kept


# ---- bad input ----


def test_the_public_name():
    assert sparsekv.AnchorCache is AnchorCache


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 5}, "budget 5: must be 6 tokens or more, sink_size 2 .* recent_size 4"),
        ({"mode": "ring"}, "mode 'ring': must be prefill or streaming"),
        ({"mode": "streaming", "context_length": 8}, "context_length 8: there is none in mode streaming"),
        ({"context_length": 0}, "context_length 0: must be 1 or more"),
        ({"selector": None}, "give a tokenizer or a selector"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(UserError, match=message):
        AnchorCache(MODELS["llama"], **{"selector": SELECTORS[2, 4], **options})


@pytest.mark.parametrize(
    ("name", "changes", "kind"),
    [("gemma3", {}, "sliding_attention"), ("mistral", {"sliding_window": 16}, "sliding_attention")],
)
def test_sliding_layers(name, changes, kind):
    with pytest.raises(UserError, match=f"has {kind} layers"):
        AnchorCache(make_sharp(name, **changes), selector=SELECTORS[2, 4])


@pytest.mark.parametrize("mode", ["prefill", "streaming"])
def test_a_window_that_hides_nothing_changes_nothing(mode):
    """As Phi-3's, which is as long as its positions, or longer."""
    ids, answers = text(2, 40), []
    for window in (None, 2048):
        model = make_sharp("mistral", sliding_window=window)
        cache = AnchorCache(model, selector=SELECTORS[2, 4], budget=9, mode=mode)
        answers.append(model.generate(ids, past_key_values=cache, do_sample=False, max_new_tokens=8, pad_token_id=0))
        assert max(layer.keys.shape[2] for layer in cache.layers) < 30
    assert torch.equal(*answers)


def test_state_space_layers():
    model = MambaForCausalLM(MambaConfig(vocab_size=8, hidden_size=8, state_size=2, num_hidden_layers=1))
    with pytest.raises(UserError, match=r"mamba: has (state-space|linear_attention) layers"):
        AnchorCache(model, selector=SELECTORS[2, 4])


@pytest.mark.parametrize(
    ("rows", "length", "message"),
    [(2, 1, "2 rows: the cache holds 3"), (3, 2025, "24 \\+ 2025 tokens: the model's positions end at 2048")],
)
def test_a_refused_pass_changes_nothing(rows, length, message):
    cache, ids, real = filled(budget=9)
    with pytest.raises(UserError, match=message):
        MODELS["llama"](input_ids=text(rows, length), past_key_values=cache)
    continued(cache, ids, real, text(3, 5, seed=8), budget=9)


@pytest.mark.parametrize(("mode", "length"), [("prefill", 23), ("streaming", 22)])
def test_a_crop_that_cannot_be_undone(mode, length):
    cache, ids, real = filled(mode)
    continued(cache, ids, real, text(3, 5, seed=9), mode)
    held = cache.held()
    with pytest.raises(UserError, match=f"crop to {length} tokens: entries are gone that the text had then"):
        cache.crop(length)
    assert (cache.get_seq_length(), cache.held()) == (29, held)


def test_what_cannot_be_served():
    cache = AnchorCache(MODELS["llama"], selector=SELECTORS[2, 4])
    ids = text(1, 4)
    with pytest.raises(UserError, match="inputs_embeds: AnchorCache decides by token ids"):
        MODELS["llama"](inputs_embeds=torch.zeros(1, 4, 64), past_key_values=cache)
    with pytest.raises(UserError, match="attention_mask: AnchorCache makes its own"):
        MODELS["llama"](input_ids=ids, attention_mask=torch.ones(1, 1, 4, 4), past_key_values=cache)
    with pytest.raises(ValueError, match="serves the model that it was made with"):
        make_sharp("llama")(input_ids=ids, past_key_values=cache)
    flex = make_sharp("llama")
    flex.set_attn_implementation("flex_attention")
    with pytest.raises(UserError, match="attn_implementation flex_attention: AnchorCache serves sdpa and eager"):
        flex(input_ids=ids, past_key_values=AnchorCache(flex, selector=SELECTORS[2, 4]))
