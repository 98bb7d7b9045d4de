"""Presses by name and parameters, what each needs, and what the anchors' press keeps."""

from pathlib import Path

import kvpress
import pytest
import torch
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st
from kvpress import (
    AdaKVPress,
    BasePress,
    CompressionRatioDecodingPress,
    DecodingPress,
    ExpectedAttentionPress,
    FinchPress,
    KVPressTextGenerationPipeline,
    KVzipPress,
    PrefillDecodingPress,
    ScorerPress,
    SnapKVPress,
)
from kvpress.utils import compute_n_kept
from peft import LoraConfig, get_peft_model
from tiny import make_tiny, save_tiny
from transformers import DynamicCache, LlamaForCausalLM

from sparsekv.anchors import AnchorConfig, AnchorSelector
from sparsekv.errors import UserError
from sparsekv.presses import (
    PRESSES,
    AnchorPress,
    is_decoding,
    make_press,
    needs_eager,
    needs_question,
    shares_prefill,
    why_not,
)
from sparsekv.presses.parameters import nested

CAM = [name for name in PRESSES if name.startswith("cam_")]
NAMES = [f"{name}:target_size=100" if name in CAM else name for name in PRESSES if name != "no_press"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model loaded from a folder, since some presses load its tokenizer by its name."""
    return LlamaForCausalLM.from_pretrained(save_tiny(tmp_path_factory.mktemp("base"))).eval()


# ---- names ----


@pytest.mark.parametrize("spec", NAMES)
def test_every_name_makes_a_fresh_press_of_that_ratio(spec):
    one, other = make_press(spec, 0.3), make_press(spec, 0.5)
    assert not {id(part) for part in nested(one)} & {id(part) for part in nested(other)}
    if spec.split(":")[0] not in CAM:
        assert ratio_of(one) == pytest.approx(0.3)
        assert ratio_of(other) == pytest.approx(0.5)
    assert make_press(spec, 0) is not None


def ratio_of(press):
    """Share of the cache that the press will evict."""
    if isinstance(press, DecodingPress):
        assert press.base_press.compression_ratio == 0
        return press.target_compression_ratio
    if isinstance(press, kvpress.ComposedPress):
        tokens, channels = press.presses
        assert tokens.compression_ratio == pytest.approx(channels.compression_ratio)
        return 1 - (1 - tokens.compression_ratio) * (1 - channels.compression_ratio)
    if isinstance(press, kvpress.DuoAttentionPress):
        return press.head_compression_ratio
    return press.compression_ratio


def test_every_press_class_of_kvpress_has_a_name_or_a_reason():
    reasons = {
        BasePress: "abstract",
        ScorerPress: "abstract",
        kvpress.DMSPress: "evicts below a threshold",
        kvpress.SimLayerKVPress: "evicts below a threshold",
        kvpress.PerLayerCompressionPress: "takes a ratio a layer",
        PrefillDecodingPress: "two presses, one after the other",
        DecodingPress: "with target_size",
    }
    exported = {value for value in vars(kvpress).values() if isinstance(value, type) and issubclass(value, BasePress)}
    named = {type(part) for spec in NAMES for part in nested(make_press(spec, 0.3))}
    assert exported - named == set(reasons)


def test_kvpress_evaluations_names_mean_the_same():
    press = make_press("expected_attention", 0.3)
    assert isinstance(press, AdaKVPress)
    assert press.press == ExpectedAttentionPress(0.3, epsilon=1e-2)
    assert make_press("expected_attention_head", 0.3) == ExpectedAttentionPress(0.3)
    assert make_press("kvzip_plus", 0.3).kvzip_plus_normalization
    assert make_press("think", 0.3).key_channel_compression_ratio == 0.6


def test_no_press_is_none():
    assert make_press("no_press", 0.0) is None


@pytest.mark.parametrize(
    ("name", "near"),
    [("snap_kv", "snapkv"), ("streamingllm", "streaming_llm"), ("expected_atention", "expected_attention")],
)
def test_unknown_names_are_refused_with_near_ones(name, near):
    with pytest.raises(UserError, match=f"--presses names '{name}'; did you mean {near}") as error:
        make_press(name, 0.5)
    assert "\n" not in str(error.value)


def test_a_name_near_to_none_lists_all():
    with pytest.raises(UserError, match=", ".join(sorted(PRESSES))):
        make_press("zzz", 0.5)


@pytest.mark.parametrize("name", ["kvzap_mlp", "kvzap_linear", "cam_adakv_snapkv", "kvcompose_unstructured"])
def test_names_of_kvpress_that_cannot_be_a_cell_are_refused_with_what_to_take(name):
    with pytest.raises(UserError, match=f"--presses names '{name}': .* take ") as error:
        make_press(name, 0.5)
    instead = str(error.value).split("take ")[1].split(" or ")
    assert all(make_press(f"{spec}:target_size=9" if spec in CAM else spec, 0.5) for spec in instead)


@pytest.mark.parametrize("ratio", [-0.1, 1, 1.5])
def test_ratios_out_of_range_are_refused(ratio):
    with pytest.raises(UserError, match=rf"--ratios {ratio}: must be in \[0, 1\)"):
        make_press("knorm", ratio)


def test_think_cannot_evict_more_than_the_keys():
    assert make_press("think", 0.5).compression_ratio == 0.5
    with pytest.raises(UserError, match=r"--ratios 0.6: think evicts at most 0.5"):
        make_press("think", 0.6)
    assert make_press("snap_think", 0.75).presses[1].key_channel_compression_ratio == 1
    with pytest.raises(UserError, match=r"--ratios 0.8: snap_think evicts at most 0.75"):
        make_press("snap_think", 0.8)


# ---- parameters ----


@pytest.mark.parametrize(
    ("spec", "where", "value"),
    [
        ("snapkv:window_size=32:kernel_size=3", lambda p: (p.window_size, p.kernel_size), (32, 3)),
        (
            "adakv_snapkv:alpha_safeguard=0.5:window_size=8",
            lambda p: (p.alpha_safeguard, p.press.window_size),
            (0.5, 8),
        ),
        ("critical_snapkv:first_stage_ratio=0.1", lambda p: (p.first_stage_ratio, type(p.press)), (0.1, SnapKVPress)),
        ("critical_expected_attention:epsilon=0.5", lambda p: (p.epsilon, p.press.epsilon), (0.5, 0.0)),
        ("snap_think:kernel_size=7", lambda p: p.presses[0].kernel_size, 7),
        ("kvzip:layerwise=true", lambda p: p.layerwise, True),
        ("compactor:blending=0.2:chunk_size=64", lambda p: (p.blending, p._non_causal_press.chunk_size), (0.2, 64)),
        ("cur:leverage_type=key", lambda p: p.leverage_type, "key"),
        ("random:seed=4", lambda p: p.seed, 4),
        ("anchor:recent_size=8:use_punctuation=false", lambda p: p.anchors, AnchorConfig(True, False, recent_size=8)),
        ("expected_attention_stats:stats_folder=/a=b", lambda p: p.stats_folder, "/a=b"),
        ("decoding_knorm:compression_interval=9", lambda p: p.compression_interval, 9),
        ("decoding_snapkv:window_size=9", lambda p: p.base_press.window_size, 9),
        ("cam_tova:target_size=30:merge_budget=5", lambda p: (p.target_size, p.merge_budget), (30, 5)),
    ],
)
def test_parameters_reach_the_press_that_has_them(spec, where, value):
    press = make_press(spec, 0.3)
    assert where(press) == value
    assert type(press) is type(make_press(spec.split(":")[0] + (":target_size=9" if "cam" in spec else ""), 0.3))
    assert not isinstance(press, ScorerPress) or press.compression_ratio == 0.3


def test_decoding_presses_keep_a_share_or_with_a_target_a_number_of_tokens():
    assert type(make_press("decoding_knorm", 0.3)) is CompressionRatioDecodingPress
    press = make_press("decoding_knorm:target_size=512:compression_interval=16", 0.3)
    assert type(press) is DecodingPress
    assert (press.target_size, press.compression_interval) == (512, 16)
    with pytest.raises(
        UserError, match="'cam_knorm' keeps a number of tokens, not a share; write cam_knorm:target_size"
    ):
        make_press("cam_knorm", 0.3)


def test_a_seed_is_no_count():
    assert make_press("random:seed=-1", 0.5).seed == -1


@pytest.mark.parametrize("spec", ["streaming_llm:n_sink=0", "anchor:sink_size=0:recent_size=0", "cur:num_sinks=0"])
def test_what_may_be_0(spec):
    assert make_press(spec, 0.5)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("snapkv:window=32", r"no parameter 'window'; its parameters are kernel_size, window_size"),
        (
            "snapkv:compression_ratio=0.5",
            r"no parameter 'compression_ratio'; its parameters are kernel_size, window_size",
        ),
        (
            "adakv_snapkv:press=knorm",
            r"no parameter 'press'; its parameters are alpha_safeguard, kernel_size, window_size",
        ),
        ("knorm:x=1", r"no parameter 'x'; it has no parameters"),
        ("no_press:x=1", r"no_press has no parameters"),
        ("snapkv:window_size=wide", r"window_size must be int, not 'wide'"),
        ("snapkv:window_size=1.5", r"window_size must be int, not '1.5'"),
        ("snapkv:window_size=-3", r"window_size must be 1 or more, not -3"),
        ("streaming_llm:n_sink=-3", r"n_sink must be 0 or more, not -3"),
        ("snapkv:window_size=0", r"window_size must be 1 or more, not 0"),
        ("decoding_snapkv:window_size=0", r"window_size must be 1 or more, not 0"),
        ("snapkv:kernel_size=0", r"kernel_size must be 1 or more, not 0"),
        ("snapkv:kernel_size=4", r"kernel_size must be odd, not 4"),
        ("pyramidkv:beta=0", r"beta must be 1 or more, not 0"),
        ("block_keydiff:block_size=0", r"block_size must be 1 or more, not 0"),
        ("chunkkv:chunk_length=0", r"chunk_length must be 1 or more, not 0"),
        ("compactor:chunk_size=0", r"chunk_size must be 1 or more, not 0"),
        ("leverage:sketch_dimension=0", r"sketch_dimension must be 1 or more, not 0"),
        ("lagkv:lag_size=0", r"lag_size must be 1 or more, not 0"),
        ("cur:local_window_size=0", r"local_window_size must be 1 or more, not 0"),
        ("expected_attention:n_future_positions=0", r"n_future_positions must be 1 or more, not 0"),
        ("cur:leverage_type=both", r"leverage_type must be Literal\[.*\], not 'both'"),
        ("snapkv:window_size", r"'window_size' is not param=value"),
        ("snapkv:", r"'' is not param=value"),
        ("adakv_snapkv:alpha_safeguard=3", r"alpha_safeguard should be in \[0, 1\]"),
    ],
)
def test_bad_parameters_are_refused_in_one_line(spec, message):
    with pytest.raises(UserError, match=f"--presses '{spec}': {message}") as error:
        make_press(spec, 0.3)
    assert "\n" not in str(error.value)


# ---- what a press needs ----


@pytest.mark.parametrize("spec", NAMES)
def test_what_runs_the_model_again_or_acts_while_decoding_has_a_prefill_of_its_own(spec):
    press = make_press(spec, 0.3)
    own = isinstance(press, KVzipPress | kvpress.FastKVzipPress | kvpress.KVComposePress | DecodingPress)
    assert shares_prefill(press) is not own
    assert is_decoding(spec) is isinstance(press, DecodingPress)
    assert needs_eager(press) is (spec == "observed_attention")
    assert needs_question(press) is (spec == "finch")


def test_a_press_within_counts():
    assert needs_eager(AdaKVPress(kvpress.ObservedAttentionPress(0.5)))
    assert not shares_prefill(kvpress.ComposedPress([SnapKVPress(0.5), kvpress.FastKVzipPress(0.5)]))
    assert not shares_prefill(kvpress.DMSPress(SnapKVPress()))


@pytest.mark.parametrize("spec", NAMES)
def test_every_press_runs_in_kvpress_own_pipeline_or_why_not_says_why(model, tiny_tokenizer, spec):
    press, reason = make_press(spec, 0.4, tiny_tokenizer), why_not(spec, model)
    model.set_attn_implementation("eager" if needs_eager(press) else "sdpa")
    if isinstance(press, DecodingPress):
        press.compression_interval, press.hidden_states_buffer_size = 70, 128
    if isinstance(press, FinchPress):
        press.window_size, press.delimiter_token_id = 20, -1
    if reason is None:
        assert evicts(model, tiny_tokenizer, press)
    else:
        assert reason.startswith(f"{spec}: ")
        assert "\n" not in reason
        with pytest.raises((AssertionError, KeyError, OSError, RuntimeError, ValueError)):
            evicts(model, tiny_tokenizer, press)


def evicts(model, tokenizer, press):
    """Whether the press has evicted something, by a shorter or other cache than the full one or by masks."""
    pipeline = KVPressTextGenerationPipeline(model=model, tokenizer=tokenizer)
    inputs = pipeline.preprocess("The tide table, newly printed, hangs by the door. " * 16, ["Where?"], "", 10_000)
    whole, cache = DynamicCache(), DynamicCache()
    for used, one, tokens in ((None, whole, 1), (press, cache, 80 if isinstance(press, DecodingPress) else 2)):
        try:
            pipeline._forward(inputs, max_new_tokens=tokens, press=used, cache=one)
        except RuntimeError as error:  # layers keep different numbers: kvpress decodes them with flash attention only
            layers_differ = isinstance(press, kvpress.KVComposePress | kvpress.PyramidKVPress)
            if not layers_differ or "size of tensor" not in str(error):
                raise
    modules = [layer.self_attn for layer in model.model.layers]
    masked = any(module.masked_key_indices is not None for module in modules)
    for module in modules:
        module.masked_key_indices = None
    shapes = [[layer.keys.shape for layer in one.layers] for one in (whole, cache)]
    return masked or shapes[0] != shapes[1] or not torch.equal(whole.layers[0].keys, cache.layers[0].keys)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("qfilter", "the model nthngdy/{}_qfilt is not cached"),
        ("decoding_qfilter", "the model nthngdy/{}_qfilt is not cached"),
        ("kvzap_mlp_layer", "the model nvidia/KVzap-mlp-{} is not cached"),
        ("kvzap_mlp_layer:model_type=linear", "the model nvidia/KVzap-linear-{} is not cached"),
        ("RestoreKV", "the model higokri/RestoreKV-{} is not cached"),
        ("RestoreKV_plus", "the model higokri/RestoreKV-{}_plus is not cached"),
        ("fastkvzip", "the model Jang-Hyun/Fast-KVzip is not cached"),
        ("duo_attention_on_the_fly", "the dataset kmfoda/booksum is not cached"),
    ],
)
def test_files_that_are_missing_offline_are_named(model, tmp_path, monkeypatch, spec, reason):
    reason = reason.format(Path(model.config.name_or_path).name)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert why_not(spec, model) == f"{spec}: {reason}, and HF_HUB_OFFLINE is set"
    kind, name = reason.removeprefix("the ").split()[:2]
    (tmp_path / f"{kind}s--{name.replace('/', '--')}" / "snapshots" / "0123").mkdir(parents=True)
    assert why_not(spec, model) is None, "cached"


def test_missing_files_may_be_fetched_where_there_is_a_hub(model, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.socket.connect", None)  # nothing is asked
    assert why_not("qfilter", model) is None


def test_published_statistics_are_looked_up_by_kvpress_own_name(model):
    press = make_press("expected_attention_stats", 0.3)
    with pytest.MonkeyPatch.context() as patch:
        asked = []
        stats = "kvpress.presses.expected_attention_with_stats.ExpectedAttentionStats"
        patch.setattr(f"{stats}.from_pretrained", lambda name: asked.append(name) or pytest.skip)
        with pytest.raises(AttributeError):
            press.post_init_from_model(model)
    assert f"the model {asked[0]} is not cached" in why_not("expected_attention_stats", model)
    assert why_not("expected_attention_stats:stats_folder=/statistics", model) is None


def test_presses_with_a_table_of_models_know_their_own(monkeypatch):
    model = make_tiny("llama")
    assert "no attention pattern is published for this model, only for togethercomputer" in why_not(
        "duo_attention", model
    )
    assert why_not("lukv", model).endswith("for this model, only for meta-llama/Llama-3.1-8B-Instruct")
    for spec, name in (("duo_attention", "Meta-Llama-3.1-8B-Instruct"), ("lukv", "Llama-3.1-8B-Instruct")):
        model.config.name_or_path = f"meta-llama/{name}"
        assert "fetched from GitHub, and HF_HUB_OFFLINE is set" in why_not(spec, model)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        assert why_not(spec, model) is None
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_kvzip_needs_the_model_to_have_a_name(model):
    assert (
        why_not("kvzip", make_tiny("llama"))
        == "kvzip: the model without a name is not cached, and HF_HUB_OFFLINE is set"
    )
    assert why_not("kvzip", model) is None


def test_restorekv_would_switch_a_trained_adapter_off(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    model = make_tiny("llama")
    assert why_not("RestoreKV", model) is None
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).get_base_model()
    assert why_not("RestoreKV", adapted).startswith("RestoreKV: it switches the model's adapter off; merge")
    assert why_not("kvzip", adapted) is None


@pytest.mark.parametrize("spec", ["nothing", "snapkv:width=3"])
def test_why_not_refuses_what_make_press_refuses(model, spec):
    with pytest.raises(UserError, match="--presses"):
        why_not(spec, model)


# ---- the anchors' press ----


class Flags:
    """A selector whose anchors are the tokens that are not 0."""

    def __init__(self, sink_size):
        self.config = AnchorConfig(sink_size=sink_size)

    def __call__(self, tokens):
        return tokens.bool()


def kept_by(press, heads, length):
    """Positions that the press keeps of a context, a list of sets by row; the same for every head."""
    batch = len(press.input_ids)
    position = torch.arange(length, dtype=torch.float).view(1, 1, -1, 1).expand(batch, heads, -1, 4).contiguous()
    module = torch.nn.Module()
    module.head_dim = 4
    keys, _ = press.compress(module, position, position, position, None, {})
    rows = [[{int(x) for x in head[:, 0]} for head in row] for row in keys]
    assert all(head == row[0] for row in rows for head in row)
    return [row[0] for row in rows]


@settings(max_examples=100, deadline=None)
@given(
    flags=st.lists(st.lists(st.booleans(), min_size=12, max_size=12), min_size=1, max_size=3),
    ratio=st.floats(0.05, 0.95),
    sink_size=st.integers(0, 4),
)
def test_anchor_press_keeps_sinks_then_the_newest_anchors_then_the_newest_rest(flags, ratio, sink_size):
    ids = torch.tensor(flags, dtype=torch.long)
    longer = torch.cat((ids, 1 - ids), dim=1)
    press = AnchorPress(ratio, selector=Flags(sink_size), input_ids=longer)
    for row, kept in zip(flags, kept_by(press, 2, 12), strict=True):
        anchors = [i for i, anchor in enumerate(row) if anchor]
        newest_first = anchors[sink_size:][::-1], [i for i in range(12) if not row[i]][::-1]
        order = anchors[:sink_size][::-1] + newest_first[0] + newest_first[1]
        assert kept == set(order[: compute_n_kept(12, ratio)])


def test_anchor_press_sees_the_recent_anchors_of_the_context_not_of_all_tokens(tiny_tokenizer):
    config = AnchorConfig(use_special=False, use_punctuation=False, sink_size=2, recent_size=3)
    ids = torch.randint(50, 256, (1, 40), generator=torch.Generator().manual_seed(0))
    press = AnchorPress(0.75, selector=AnchorSelector(config, tiny_tokenizer), input_ids=ids)
    assert kept_by(press, 2, 20) == [{0, 1, 17, 18, 19}]


def test_without_sinks_anchor_press_protects_none():
    selector, ids = Flags(4), torch.tensor([[1, 1, 0, 0, 1, 1, 1, 1]])
    assert kept_by(AnchorPress(0.5, selector=selector, input_ids=ids), 2, 8) == [{0, 1, 4, 5}]
    selector.config = AnchorConfig(use_sink=False, sink_size=4)
    assert kept_by(AnchorPress(0.5, selector=selector, input_ids=ids), 2, 8) == [{4, 5, 6, 7}]


def test_anchor_press_without_its_inputs_says_so(tiny_tokenizer):
    ids, keys = torch.ones(1, 4, dtype=torch.long), torch.ones(1, 1, 4, 2)
    selector = AnchorSelector(AnchorConfig(), tiny_tokenizer)
    for press in (AnchorPress(0.5, input_ids=ids), AnchorPress(0.5, selector=selector), make_press("anchor", 0.5)):
        with pytest.raises(ValueError, match="needs `tokenizer` or `selector`, and `input_ids`"):
            press.score(None, None, keys, None, None, {})


@torch.no_grad()
def test_anchor_press_reads_the_tokens_of_every_prefill_and_leaves_nothing_behind(tiny_tokenizer):
    model, press = make_tiny("llama"), make_press("anchor:recent_size=4", 0.5, tiny_tokenizer)
    for seed in range(2):
        ids = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(seed))
        cache, whole = DynamicCache(), DynamicCache()
        with press(model):
            model.model(ids, past_key_values=cache)
        model.model(ids, past_key_values=whole)
        assert cache.get_seq_length() == 20
        alone = AnchorPress(0.5, selector=AnchorSelector(AnchorConfig(recent_size=4), tiny_tokenizer), input_ids=ids)
        score = alone.score(None, None, whole.layers[0].keys, None, None, {})
        index = score.topk(20, dim=-1).indices[..., None].expand(-1, -1, -1, whole.layers[0].keys.shape[-1])
        assert torch.equal(cache.layers[0].keys, whole.layers[0].keys.gather(2, index))
        assert press.input_ids is None
    assert not model.get_input_embeddings()._forward_pre_hooks


def test_anchor_press_counts_ids_that_only_the_model_calls_special(tiny_tokenizer):
    model, ids = make_tiny("llama"), torch.full((1, 8), 100)
    ids[0, 2] = 99
    for special, kept in ((None, {5, 6, 7}), (99, {2, 6, 7})):
        model.generation_config.eos_token_id = [2, special] if special else 2
        press = make_press("anchor:recent_size=2:use_sink=false:use_punctuation=false", 0.6, tiny_tokenizer)
        press.post_init_from_model(model)
        press.input_ids = ids
        assert kept_by(press, 2, 8) == [kept]
