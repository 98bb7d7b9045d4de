"""A cache that a press shrinks, against attention under a dense mask of what it holds."""

import copy

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny import FAMILIES, SHAPE, VOCAB_SIZE, make_sharp, make_tiny_tokenizer
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    CohereConfig,
    DynamicCache,
)

from sparsekv.attention import dense_attention, two_region_mask
from sparsekv.errors import UserError
from sparsekv.inference.press_cache import PressCache
from sparsekv.presses import make_press

CHANGES = {"gemma3": {"layer_types": ["full_attention"] * 2}}
MODELS = {name: make_sharp(name, **CHANGES.get(name, {})) for name in FAMILIES}
TOKENIZER = make_tiny_tokenizer()
UNIFORM = ["knorm", "snapkv:window_size=4", "anchor", "pyramidkv:window_size=4:beta=2"]
PER_HEAD = ["expected_attention", "adakv_snapkv:window_size=4"]
TOLERANCE = 1e-4


def text(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(5, VOCAB_SIZE, (rows, length), generator=torch.Generator().manual_seed(seed))


def prefilled(name: str, spec: str, ratio: float, context: torch.Tensor) -> PressCache:
    return PressCache.prefill(MODELS[name], context, make_press(spec, ratio, TOKENIZER))


@torch.no_grad()
def keeps_of(model, cache: PressCache, context: torch.Tensor) -> list[torch.Tensor]:
    """For each layer, Bool[B, G, C]: the entries held, known by their keys."""
    full = DynamicCache()
    model(input_ids=context, past_key_values=full)
    keeps = []
    for whole, layer, real in zip(full.layers, cache.layers, cache.slots, strict=True):
        same = (whole.keys[:, :, :, None] - layer.keys[:, :, None]).abs().amax(-1) < 1e-5
        keeps.append((same & real[:, :, None]).any(-1))
        assert torch.equal(keeps[-1].sum(-1), real.sum(-1))
    return keeps


@torch.no_grad()
def reference(model, ids: torch.Tensor, keeps: list[torch.Tensor]) -> torch.Tensor:
    """Logits where queries after the context see, in each layer, the entries kept and what came since."""

    def attend(module, query, key, value, attention_mask, scaling, **kwargs):
        keep = keeps[module.layer_idx]
        mask = two_region_mask([keep], [keep.shape[-1]], ids.shape[1])
        return dense_attention(query, key, value, mask, scaling).transpose(1, 2), None

    AttentionInterface.register("press_cache_reference", attend)
    model.set_attn_implementation("press_cache_reference")
    try:
        return model(input_ids=ids, use_cache=False).logits
    finally:
        model.set_attn_implementation("sdpa")


def assert_continues_exactly(name: str, cache: PressCache, context, tail, sizes, keeps=None) -> None:
    model, ids = MODELS[name], torch.cat([context, tail], dim=1)
    keeps = keeps_of(model, cache, context) if keeps is None else keeps
    with torch.no_grad():
        found = [model(input_ids=chunk, past_key_values=cache).logits for chunk in tail.split(sizes, dim=1)]
    wanted = reference(model, ids, keeps)[:, context.shape[1] :]
    assert (torch.cat(found, dim=1) - wanted).abs().max() < TOLERANCE
    assert cache.get_seq_length() == ids.shape[1]


def assert_holds_only(cache: PressCache, longest: list[int]) -> None:
    """Each layer's tensors have room for its longest head and no more."""
    for layer, width in zip(cache.layers, longest, strict=True):
        rows, heads, _, dim = layer.keys.shape
        for tensor in (layer.keys, layer.values):
            assert tensor.untyped_storage().nbytes() == rows * heads * width * dim * 4
    assert cache.nbytes == sum(t.untyped_storage().nbytes() for x in cache.layers for t in (x.keys, x.values))


@pytest.mark.parametrize("name", FAMILIES)
@given(
    seed=st.integers(0, 10**6),
    spec=st.sampled_from(UNIFORM + PER_HEAD),
    ratio=st.sampled_from([0.0, 0.3, 0.8]),
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=3),
)
@settings(max_examples=8, deadline=None)
def test_logits_are_those_of_a_dense_mask(name, seed, spec, ratio, sizes):
    assume((name, spec) != ("gemma3", "expected_attention"))  # kvpress's does not read its rotary embedding
    context, tail = text(2, 30, seed), text(2, sum(sizes), seed + 1)
    cache = prefilled(name, spec, ratio, context)
    assert cache.get_seq_length() == 30
    keeps = keeps_of(MODELS[name], cache, context)
    longest = [int(keep.sum(-1).max()) for keep in keeps]
    assert_holds_only(cache, longest)
    assert cache.kept.tolist() == [sum(int(keep[row].sum()) for keep in keeps) for row in range(2)]
    assert_continues_exactly(name, cache, context, tail, sizes, keeps)
    assert_holds_only(cache, [width + sum(sizes) for width in longest])


@pytest.mark.parametrize(("spec", "uneven"), [("knorm", "none"), (UNIFORM[-1], "layers"), (PER_HEAD[0], "heads")])
def test_budgets_differ_where_the_press_says_so(spec, uneven):
    cache = prefilled("llama", spec, 0.5, text(2, 40))
    assert (len({layer.keys.shape[2] for layer in cache.layers}) > 1) == (uneven != "none")
    counts = [real.sum(-1) for real in cache.slots]
    assert all((count == count[0, 0]).all() for count in counts) == (uneven != "heads")
    assert sum(int(count.sum()) for count in counts) == pytest.approx(2 * 2 * 2 * 20, abs=8)
    assert MODELS["llama"].model.layers[0].self_attn.__dict__.get("masked_key_indices") is None


@pytest.mark.parametrize("spec", ["knorm", PER_HEAD[0]])
@pytest.mark.parametrize("beams", [1, 3])
def test_generate(spec, beams):
    model, context = MODELS["llama"], text(1, 30)
    cache = prefilled("llama", spec, 0.5, context)
    keeps = [keep.expand(beams, -1, -1) for keep in keeps_of(model, cache, context)]
    cache.batch_repeat_interleave(beams)
    ids = torch.cat([context, text(1, 4, seed=1)], dim=1)
    options = {"num_beams": beams, "num_return_sequences": beams, "length_penalty": 0.0} if beams > 1 else {}
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=8,
        eos_token_id=None,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    scores = reference(model, out.sequences, keeps)[:, 33:-1].log_softmax(-1)
    if beams == 1:
        assert torch.equal(scores.argmax(-1), out.sequences[:, 34:])
    else:
        total = scores.gather(2, out.sequences[:, 34:, None])[..., 0].sum(-1)
        assert (total - out.sequences_scores).abs().max() < TOLERANCE


@pytest.mark.parametrize("spec", ["knorm", PER_HEAD[0]])
def test_rows_copies_and_crops(spec):
    context = text(3, 30)
    cache = prefilled("qwen3", spec, 0.5, context)
    cache.batch_select_indices(torch.tensor([2, 0]))
    context = context[[2, 0]]
    keeps = keeps_of(MODELS["qwen3"], cache, context)
    other, tail = copy.deepcopy(cache), text(2, 6, seed=1)
    assert_continues_exactly("qwen3", cache, context, tail, [6], keeps)
    cache.crop(-4)
    assert cache.get_seq_length() == 32
    again = torch.cat([tail[:, :2], text(2, 3, seed=2)], dim=1)
    with torch.no_grad():
        found = MODELS["qwen3"](input_ids=again[:, 2:], past_key_values=cache).logits
    wanted = reference(MODELS["qwen3"], torch.cat([context, again], dim=1), keeps)[:, -3:]
    assert (found - wanted).abs().max() < TOLERANCE
    assert_continues_exactly("qwen3", other, context, text(2, 5, seed=3), [2, 3], keeps)


def test_questions_of_different_lengths():
    context, tail = text(2, 30), text(2, 6, seed=1)
    real = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    cache = prefilled("llama", PER_HEAD[0], 0.5, context)
    keeps = keeps_of(MODELS["llama"], cache, context)
    position = 30 + (real.cumsum(-1) - 1).clamp(min=0)
    mask = torch.cat([torch.ones_like(context), real], dim=1)
    with torch.no_grad():
        found = MODELS["llama"](
            input_ids=tail, attention_mask=mask, position_ids=position, past_key_values=cache
        ).logits
    short = torch.cat([context[1:], tail[1:, 2:]], dim=1)
    wanted = reference(MODELS["llama"], short, [keep[1:] for keep in keeps])[:, 30:]
    assert (found[1:, 2:] - wanted).abs().max() < TOLERANCE


# ---- bad input ----


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("decoding_knorm", "acts while decoding"),
        ("key_rerotation_streaming_llm", "moves keys to other positions"),
        ("observed_attention", "load with attn_implementation eager"),
        ("duo_attention", "^DuoAttentionPress: no attention pattern is published for this model"),
    ],
)
def test_presses_that_cannot_be_served(spec, message):
    with pytest.raises(UserError, match=message):
        prefilled("llama", spec, 0.5, text(1, 30))


def test_presses_that_would_make_other_queries_than_the_layers_are_not_served():
    torch.manual_seed(0)
    cohere = AutoModelForCausalLM.from_config(CohereConfig(**SHAPE)).eval()
    with pytest.raises(UserError, match=r"^PyramidKVPress: it makes queries .* CohereForCausalLM does otherwise"):
        PressCache.prefill(cohere, text(1, 60), make_press("pyramidkv:window_size=4", 0.5))
    assert PressCache.prefill(cohere, text(1, 60), make_press("snapkv:window_size=4", 0.5)).kept < 60 * 4


def test_what_cannot_be_served():
    model = MODELS["llama"]
    with pytest.raises(UserError, match="2049 tokens: the model's positions end at 2048"):
        prefilled("llama", "knorm", 0.5, text(1, 2049))
    with pytest.raises(UserError, match="holds no context; make one"):
        model(input_ids=text(1, 4), past_key_values=PressCache(model))
    with pytest.raises(UserError, match="has sliding_attention layers"):
        PressCache.prefill(make_sharp("gemma3"), text(1, 30), make_press("knorm", 0.5))
    bloom = BloomForCausalLM(BloomConfig(vocab_size=320, hidden_size=64, n_layer=1, n_head=4))
    with pytest.raises(UserError, match="bloom: has ALiBi"):
        PressCache.prefill(bloom, text(1, 30), make_press("knorm", 0.5))
    cache = prefilled("llama", "knorm", 0.5, text(2, 30))
    with pytest.raises(UserError, match="3 rows: the cache holds 2"):
        model(input_ids=text(3, 1), past_key_values=cache)
    with pytest.raises(UserError, match="crop to 29 tokens: entries are gone"):
        cache.crop(29)
