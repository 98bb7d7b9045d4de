"""The cache of fixed size against the one that grows: the same logits, whatever is done with it."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kvpress.attention_patch import attention_patch
from tiny import FAMILIES, VOCAB_SIZE, make_sharp, make_tiny_tokenizer
from torch._dynamo.testing import CompileCounter
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sparsekv.anchors import AnchorConfig, AnchorSelector
from sparsekv.errors import UserError
from sparsekv.inference import static_attention, static_cache
from sparsekv.inference.anchor_cache import AnchorCache
from sparsekv.inference.static_cache import StaticAnchorCache

CHANGES = {"gemma3": {"layer_types": ["full_attention"] * 2}}
MODELS = {name: make_sharp(name, **CHANGES.get(name, {})) for name in FAMILIES}
SELECTOR = AnchorSelector(AnchorConfig(sink_size=2, recent_size=4), make_tiny_tokenizer())
ANCHORS = SELECTOR.classes(torch.arange(VOCAB_SIZE)).nonzero()[:, 0]
TOLERANCE = 1e-4


def text(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random ids of which about a quarter are anchors."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCAB_SIZE, (rows, length), generator=generator)
    marks = ANCHORS[torch.randint(3, len(ANCHORS), (rows, length), generator=generator)]
    return torch.where(torch.rand(rows, length, generator=generator) < 0.2, marks, ids)


def left_padded(pads: list[int], length: int) -> torch.Tensor:
    return (torch.arange(length) >= torch.tensor(pads)[:, None]).long()


def pair(model=MODELS["llama"], *, room=40, compiled=False, **options) -> tuple[AnchorCache, StaticAnchorCache]:
    options = {"selector": SELECTOR, **options}
    return AnchorCache(model, **options), StaticAnchorCache(model, **options, room=room, compiled=compiled)


@torch.no_grad()
def read(model, cache, ids, real, sizes, start=0) -> torch.Tensor:
    """Logits of the text from `start` on, in forward passes of these sizes."""
    position, logits = (real.cumsum(-1) - 1).clamp(min=0), []
    for chunk in ids[:, start:].split(sizes, dim=1):
        stop = start + chunk.shape[1]
        out = model(
            input_ids=chunk,
            attention_mask=real[:, :stop],
            position_ids=position[:, start:stop],
            past_key_values=cache,
        )
        logits.append(out.logits)
        start = stop
        assert cache.get_seq_length() == stop
    return torch.cat(logits, dim=1)


def assert_same(found, wanted, real):
    assert (found - wanted)[real != 0].abs().max() < TOLERANCE


cases = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 10**6),
        "sizes": st.lists(st.integers(1, 9), min_size=1, max_size=3),
        "steps": st.integers(0, 6),
        "budget": st.none() | st.integers(6, 12),
        "pad": st.integers(0, 12),
        "late": st.booleans(),
        "holes": st.booleans(),
    }
)


@pytest.mark.parametrize("name", FAMILIES)
@given(case=cases)
@settings(max_examples=15, deadline=None)
def test_logits_are_those_of_the_cache_that_grows(name, case):
    sizes = [12, *case["sizes"], *[1] * case["steps"]]
    length = sum(sizes)
    ids, real = text(3, length, case["seed"]), left_padded([0, case["pad"], 1], length)
    if case["holes"]:  # as where turns of several rows differ in length
        real = real * (torch.rand(3, length, generator=torch.Generator().manual_seed(case["seed"])) < 0.8)
    context = 12 + case["sizes"][0] // 2 if case["late"] else None
    grown, static = pair(MODELS[name], budget=case["budget"], context_length=context)
    wanted = read(MODELS[name], grown, ids, real, sizes)
    assert_same(read(MODELS[name], static, ids, real, sizes), wanted, real)
    assert static.is_static
    assert static.kept.tolist() == grown.kept.tolist()


def test_the_context_matters():
    """What the two share is not a cache that nobody reads."""
    ids, real = text(1, 20), torch.ones(1, 20, dtype=torch.long)
    logits = [read(MODELS["llama"], pair(budget=budget)[1], ids, real, [16, 1, 1, 1, 1]) for budget in (None, 6)]
    assert (logits[0] - logits[1])[:, 16:].abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_k": 20}, {"num_beams": 3}])
def test_generate(options):
    ids, real = text(3, 24), left_padded([0, 7, 3], 24)
    found = []
    for cache in pair():
        torch.manual_seed(0)
        out = MODELS["llama"].generate(
            ids,
            attention_mask=real,
            past_key_values=cache,
            max_new_tokens=9,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
            **{"do_sample": False, **options},
        )
        found.append(out)
    assert (found[0].sequences == found[1].sequences).all()
    assert (torch.stack(found[0].logits) - torch.stack(found[1].logits)).abs().max() < TOLERANCE


def test_assisted_decoding_where_the_context_is_given():
    ids = text(1, 24).repeat(1, 2)
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "prompt_lookup_num_tokens": 4}
    found = [
        MODELS["llama"].generate(ids, past_key_values=cache, **options).tolist() for cache in pair(context_length=40)
    ]
    assert found[0] == found[1]


def test_shapes_and_addresses_stay():
    ids, real = text(2, 30), left_padded([0, 5], 30)
    static = pair(room=18)[1]
    read(MODELS["llama"], static, ids[:, :12], real[:, :12], [12])
    tensors = [tensor for layer in static.layers for tensor in (layer.keys, layer.values)]
    before = [(tensor.data_ptr(), tensor.shape) for tensor in tensors]
    longest = int(static.kept.max())
    read(MODELS["llama"], static, ids, real, [1] * 18, start=12)
    static.reorder_cache(torch.tensor([1, 0]))
    static.crop(-3)
    tensors = [tensor for layer in static.layers for tensor in (layer.keys, layer.values)]
    assert [(tensor.data_ptr(), tensor.shape) for tensor in tensors] == before
    assert static.held() == longest + 18 + 1
    config = MODELS["llama"].config
    assert static.nbytes == 2 * 4 * 2 * config.num_key_value_heads * config.head_dim * 2 * static.held()


@pytest.mark.parametrize("rows", [[2, 0, 0], [1, 2, 0]])
def test_rows_move_with_what_is_known_of_them(rows):
    ids, real = text(3, 30), left_padded([0, 7, 3], 30)
    real[1, 25:27] = 0
    grown, static = pair()
    for cache in (grown, static):
        read(MODELS["llama"], cache, ids[:, :27], real[:, :27], [20, 6, 1])
        cache.reorder_cache(torch.tensor(rows))
    ids, real = ids[rows], real[rows]
    wanted, found = (read(MODELS["llama"], cache, ids, real, [1, 2], start=27) for cache in (grown, static))
    assert_same(found, wanted, real[:, 27:])


@pytest.mark.parametrize("length", [22, -7])
def test_crop(length):
    ids, real = text(3, 29), left_padded([0, 7, 3], 29)
    real[1, 23:26] = 0
    grown, static = pair()
    other = text(3, 29, seed=1)
    for cache in (grown, static):
        read(MODELS["llama"], cache, ids, real, [20, 3, 1, 1, 4])
        cache.crop(length)
    wanted, found = (read(MODELS["llama"], cache, other, real, [6, 1], start=22) for cache in (grown, static))
    assert_same(found, wanted, real[:, 22:])


def test_a_copy_is_a_prefix_for_several_questions():
    ids, real = text(2, 24), left_padded([0, 5], 24)
    grown, static = pair()
    for cache in (grown, static):
        read(MODELS["llama"], cache, ids[:, :18], real[:, :18], [16, 1, 1])
    for seed in (1, 2):
        other = text(2, 24, seed)
        wanted, found = (
            read(MODELS["llama"], copy.deepcopy(cache), other, real, [3, 1, 1, 1], start=18)
            for cache in (grown, static)
        )
        assert_same(found, wanted, real[:, 18:])
    assert static.get_seq_length() == 18


def test_reset_and_another_batch():
    grown, static = pair()
    ids, real = text(3, 20), left_padded([0, 7, 3], 20)
    read(MODELS["llama"], static, ids, real, [16, 4])
    assert static in static_cache._steps
    static.reset()
    assert static not in static_cache._steps, "it would hold the tensors"
    ids, real = text(2, 26, seed=3), left_padded([1, 0], 26)
    wanted = read(MODELS["llama"], grown, ids, real, [20, 5, 1])
    assert_same(read(MODELS["llama"], static, ids, real, [20, 5, 1]), wanted, real)


def test_other_passes_of_the_model_are_its_own():
    """A model that has served such a cache serves every other as before."""
    plain, used = make_sharp("llama"), make_sharp("llama")
    ids, real = text(2, 20), left_padded([0, 5], 20)
    read(used, pair(used)[1], ids, real, [16, 1, 1, 2])
    assert used.config._attn_implementation == "sdpa"
    for cache in (None, "grown"):
        made = [cache and AnchorCache(model, selector=SELECTOR) for model in (plain, used)]
        wanted, found = (
            model(input_ids=ids, attention_mask=real, past_key_values=one).logits
            for model, one in zip((plain, used), made, strict=True)
        )
        assert torch.equal(wanted, found)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_modes_of_torch(mode):
    ids, real = text(1, 20), torch.ones(1, 20, dtype=torch.long)
    grown, static = pair()
    wanted = read(MODELS["llama"], grown, ids, real, [16, 1, 3])
    with mode():
        static_logits = [MODELS["llama"](input_ids=ids[:, :16], past_key_values=static).logits]
    static_logits += [MODELS["llama"](input_ids=ids[:, 16:17], past_key_values=static).logits]
    with mode():
        static_logits += [MODELS["llama"](input_ids=ids[:, 17:], past_key_values=static).logits]
    assert_same(torch.cat(static_logits, 1), wanted, real)


# ---- compiled ----


def compiled_steps(monkeypatch, name: str, backend) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of 8 steps of two generations of different capacity, by the cache that grows and compiled."""
    torch._dynamo.reset()
    model = make_sharp(
        name, num_hidden_layers=4, **({"layer_types": ["full_attention"] * 4} if name == "gemma3" else {})
    )
    plain = torch.compile
    monkeypatch.setattr(torch, "compile", lambda call, **options: plain(call, backend=backend, **options))
    wanted, found = [], []
    for length, room in ((16, 8), (24, 12)):
        ids, real = text(2, length + 8), left_padded([0, 5], length + 8)
        grown, static = pair(model, room=room, compiled=True)
        wanted.append(read(model, grown, ids, real, [length, *[1] * 8])[:, -8:])
        found.append(read(model, static, ids, real, [length, *[1] * 8])[:, -8:])
    return torch.cat(wanted), torch.cat(found)


@pytest.mark.parametrize("name", FAMILIES)
def test_one_compilation_for_all_layers_and_all_steps(name, monkeypatch):
    counter = CompileCounter()
    wanted, found = compiled_steps(monkeypatch, name, counter)
    assert (wanted - found).abs().max() < TOLERANCE
    assert counter.frame_count == 1


def test_kvpress_may_be_imported_later(monkeypatch):
    """It wraps what is registered then, also inside of what is compiled."""
    wrapped = attention_patch(static_attention._attend)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, static_attention.STATIC_ATTENTION, wrapped)
    test_one_compilation_for_all_layers_and_all_steps("llama", monkeypatch)


@pytest.mark.slow
def test_compiled_by_inductor(monkeypatch):
    wanted, found = compiled_steps(monkeypatch, "qwen3", "inductor")
    assert (wanted - found).abs().max() < TOLERANCE


# ---- the attention ----


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(0, 9), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_the_reference_is_attention_over_repeated_heads(rows, group, new, held, seed):
    torch.manual_seed(seed)
    entries = [(torch.zeros(rows, 2, 16, 8), torch.zeros(rows, 2, 16, 8))]
    lengths, real = torch.full((rows,), held), torch.ones(rows, new, dtype=torch.bool)
    for tensor in entries[0]:
        tensor[:, :, :held] = torch.randn(rows, 2, held, 8)
    query, key, value = (torch.randn(rows, heads, new, 8) for heads in (2 * group, 2, 2))
    keys, values = (torch.cat([old[:, :, :held], x], 2) for old, x in zip(entries[0], (key, value), strict=True))
    started = static_attention.StaticPass.of(entries, lengths, real)
    token = static_attention._active.set(started)
    found = torch.ops.sparsekv.static_attention(query, key, value, torch.tensor(0), 0.3)
    static_attention._active.reset(token)
    keys, values = (x.repeat_interleave(group, 1) for x in (keys, values))
    mask = torch.ones(new, held + new, dtype=torch.bool).tril(held)
    logits = (query @ keys.transpose(2, 3) * 0.3).masked_fill(~mask, -torch.inf)
    assert torch.allclose(found, (logits.softmax(-1) @ values).transpose(1, 2), atol=1e-5)


# ---- bad input ----


def test_more_tokens_than_room():
    ids, real = text(1, 30), torch.ones(1, 30, dtype=torch.long)
    grown, static = pair(room=4)
    wanted = read(MODELS["llama"], grown, ids[:, :20], real[:, :20], [16, 2, 1, 1])
    found = read(MODELS["llama"], static, ids[:, :18], real[:, :18], [16, 2])
    with pytest.raises(UserError, match="room 4: 3 more tokens where 2 fit; make a cache with more room"):
        read(MODELS["llama"], static, ids[:, :21], real[:, :21], [3], start=18)
    found = torch.cat([found, read(MODELS["llama"], static, ids[:, :20], real[:, :20], [1, 1], start=18)], 1)
    assert_same(found, wanted, real[:, :20])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda cache: cache.crop(15), "crop to 15 tokens: entries are gone"),
        (lambda cache: cache.batch_repeat_interleave(2), "6 rows: the cache holds 3"),
        (lambda cache: cache.batch_select_indices(torch.tensor([0])), "1 rows: the cache holds 3"),
        (lambda cache: MODELS["llama"](input_ids=text(2, 1), past_key_values=cache), "2 rows: the cache holds 3"),
        (
            lambda cache: MODELS["llama"](input_ids=text(3, 1), past_key_values=cache, output_hidden_states=True),
            "output_hidden_states: StaticAnchorCache gives logits only",
        ),
    ],
)
def test_what_is_refused_changes_nothing(change, message):
    ids, real = text(3, 20), left_padded([0, 7, 3], 20)
    grown, static = pair()
    wanted = read(MODELS["llama"], grown, ids, real, [16, 1, 3])
    read(MODELS["llama"], static, ids[:, :17], real[:, :17], [16, 1])
    with pytest.raises(UserError, match=message):
        change(static)
    assert_same(read(MODELS["llama"], static, ids, real, [3], start=17), wanted[:, 17:], real[:, 17:])


def test_what_cannot_be_served():
    with pytest.raises(UserError, match="room 0: must be 1 or more"):
        pair(room=0)
    eager = make_sharp("llama")
    eager.set_attn_implementation("eager")
    with pytest.raises(UserError, match="attn_implementation eager: StaticAnchorCache serves sdpa"):
        StaticAnchorCache(eager, selector=SELECTOR, room=4)
    spread = make_sharp("llama")
    spread.model.norm.to("meta")
    with pytest.raises(UserError, match="a model on cpu, meta: StaticAnchorCache serves models on one device"):
        StaticAnchorCache(spread, selector=SELECTOR, room=4)
