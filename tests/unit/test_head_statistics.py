"""Every figure equals a slow reference that reads its definition off the dense attention of `output_attentions`."""

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsekv import observe
from sparsekv.analysis.head_statistics import HeadStatistics
from sparsekv.anchors import AnchorConfig
from sparsekv.errors import UserError
from sparsekv.observe import observing
from sparsekv.tokens import TokenClass
from tests.tiny import make_sharp

CLASSES = [name.lower() for name in TokenClass.__members__]
CONFIGS = [
    AnchorConfig(sink_size=2, recent_size=5),
    AnchorConfig(sink_size=1, recent_size=40, use_sink=False),
    AnchorConfig(sink_size=0, recent_size=0),
    AnchorConfig(sink_size=8, recent_size=300, use_recent=False),
]


def row(length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, classes without stopwords, static anchors."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(5, 300, (1, length), generator=generator)
    classes = torch.randint(0, 6, (length,), generator=generator, dtype=torch.uint8)
    classes[classes == TokenClass.STOPWORD] = TokenClass.CONTENT
    return ids, classes, classes == TokenClass.PUNCTUATION


def measured(model: PreTrainedModel, length: int, config: AnchorConfig) -> dict[str, np.ndarray]:
    statistics, (ids, classes, static) = HeadStatistics(length, config), row(length)
    figures = []
    with (
        torch.no_grad(),
        observing(model, lambda _, q, k, v, scaling: figures.append(statistics(q, k, v, scaling, classes, static))),
    ):
        model.get_decoder()(input_ids=ids, use_cache=False)
    assert figures[0].dtype == torch.float32
    assert figures[0].shape == (4, len(statistics.names))
    return dict(zip(statistics.names, figures[0].T.numpy(), strict=True))


def dense(model: PreTrainedModel, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Eager attention [H, L, L], and the same weighted by the norms of the cached values, renormalised."""
    ids, *_ = row(length)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(ids, output_attentions=True, use_cache=True)
    plain = output.attentions[0][0].double().numpy()
    norms = output.past_key_values.layers[0].values[0].double().norm(dim=-1).numpy().repeat(2, axis=0)
    valued = plain * norms[:, None, :]
    return plain, valued / valued.sum(-1, keepdims=True)


def fewest(weights: np.ndarray, share: float) -> int:
    """Entries, the largest first, until they hold `share` of the sum."""
    held = 0.0
    for count, weight in enumerate(sorted(weights, reverse=True), 1):
        held += weight
        if held >= share * weights.sum():
            return count
    raise AssertionError


def reference(
    plain: np.ndarray, valued: np.ndarray, classes: np.ndarray, static: np.ndarray, config: AnchorConfig
) -> dict[str, float]:
    """The figures of one head from its dense [L, L] attention."""
    length = len(plain)
    later = range(length // 2, length)
    expected = np.array([sum(1 / (q + 1) for q in range(k, length)) for k in range(length)])
    figures = {
        **dict(class_figures(plain, valued, expected, classes, config.sink_size)),
        **dict(zone_figures(plain, valued, later, config)),
        **dict(anchor_figures(plain, valued, later, static, config)),
        **dict(query_figures(plain, valued, later)),
        **dict(stability_figures(plain)),
    }
    relative = plain.sum(0) / expected
    figures |= {f"position_relative.{p}": relative[p] for p in range(min(64, length))}
    if length > 64:
        figures["position_relative.rest"] = plain[:, 64:].sum() / expected[64:].sum()
    for prefix, attention in (("", plain), ("value_", valued)):
        for percent in (80, 95):
            received = attention[later].sum(0)
            figures[f"{prefix}tokens_for_{percent}"] = fewest(received, percent / 100) / length
    return figures


def class_figures(plain, valued, expected, classes, sink) -> Iterator[tuple[str, float]]:
    for index, name in enumerate(CLASSES):
        members = classes == index
        share = plain[:, members].sum() / len(plain) if members.any() else math.nan
        value_share = valued[:, members].sum() / len(plain) if members.any() else math.nan
        even = expected[members].sum() / len(plain) if members.any() else math.nan
        yield f"share.{name}", share
        yield f"expected.{name}", even
        yield f"relative.{name}", share / even
        off = np.where(members & (np.arange(len(plain)) >= sink))[0]
        received = plain[:, off].sum() / plain[:, sink:].sum() if len(off) else math.nan
        yield f"relative_off_sink.{name}", received / (expected[off].sum() / expected[sink:].sum() or 1)
        yield f"value_share.{name}", value_share
        yield f"value_relative.{name}", value_share / even


def zone_figures(plain, valued, later, config) -> Iterator[tuple[str, float]]:
    sink = config.sink_size
    sums = {f"{prefix}zone.{zone}": 0.0 for prefix in ("", "value_") for zone in ("sink", "early", "middle", "recent")}
    starts = [d for d in [0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192] if d < len(plain)]
    distance = dict.fromkeys(starts, 0.0)
    for q in later:
        between = [k for k in range(q + 1) if k >= sink and q - k >= config.recent_size]
        for k in range(q + 1):
            if k < sink:
                zone = "sink"
            elif q - k < config.recent_size:
                zone = "recent"
            else:
                zone = "early" if between.index(k) < len(between) // 2 else "middle"
            sums[f"zone.{zone}"] += plain[q, k] / len(later)
            sums[f"value_zone.{zone}"] += valued[q, k] / len(later)
            if k >= sink:
                distance[max(start for start in starts if start <= q - k)] += plain[q, k]
    yield from sums.items()
    for start, held in distance.items():
        yield f"distance_share.{start}", held / sum(distance.values())


def anchor_figures(plain, valued, later, static, config) -> Iterator[tuple[str, float]]:
    sink = config.sink_size if config.use_sink else 0
    window = config.recent_size if config.use_recent else 0
    sums = np.zeros(3)
    for q in later:
        anchors = [k for k in range(q + 1) if static[k] or k < sink or q - k < window]
        sums += plain[q, anchors].sum(), valued[q, anchors].sum(), len(anchors) / (q + 1)
    yield from zip(("anchor_share", "value_anchor_share", "anchor_tokens"), sums / len(later), strict=True)


def query_figures(plain, valued, later) -> Iterator[tuple[str, float]]:
    count = min(len(later), 64)
    queries = [later[0] + (i + 1) * len(later) // count - 1 for i in range(count)]
    for prefix, attention in (("", plain), ("value_", valued)):
        seen = [attention[q, : q + 1] for q in queries]
        for percent in (80, 95):
            yield (
                f"{prefix}query_tokens_for_{percent}",
                np.mean([fewest(weights, percent / 100) / len(weights) for weights in seen]),
            )
        yield (
            f"{prefix}support",
            np.mean([math.exp(-sum(p * math.log(p) for p in weights if p > 0)) for weights in seen]),
        )
        if not prefix:
            for top in (16, 64, 256):
                yield f"top_{top}", np.mean([np.sort(weights)[::-1][:top].sum() for weights in seen])


def stability_figures(plain) -> Iterator[tuple[str, float]]:
    half = len(plain) // 2
    exposure = np.array([sum(1 / (q + 1) for q in range(k, half)) for k in range(half)])
    importance = plain[:half, :half].sum(0) / exposure
    bounds = [half + i * (len(plain) - half) // 8 for i in range(9)]
    for percent in (50, 30):
        kept = np.argsort(-importance)[: half * percent // 100]
        retained = []
        for start, end in itertools.pairwise(bounds):
            later = plain[start:end, :half]
            retained.append(later[:, kept].sum() / later.sum())
        yield f"retained_{percent}", min(retained)
        yield f"retained_mean_{percent}", np.mean(retained)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("length", [16, 61, 201])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"sink{config.sink_size}-recent{config.recent_size}")
def test_every_figure_is_its_definition(name: str, length: int, config: AnchorConfig) -> None:
    model = make_sharp(name, num_hidden_layers=1)
    figures = measured(model, length, config)
    _, classes, static = row(length)
    plain, valued = dense(model, length)
    for head in range(4):
        wanted = reference(plain[head], valued[head], classes.numpy(), static.numpy(), config)
        assert set(wanted) == set(figures)
        for figure, value in wanted.items():
            assert figures[figure][head] == pytest.approx(value, abs=1e-5, rel=1e-5, nan_ok=True), figure


def test_the_reference_is_not_even() -> None:
    """Heads of the tiny models are so different from even attention that a figure of it would be noticed."""
    for name in ("llama", "qwen3"):
        figures = measured(make_sharp(name, num_hidden_layers=1), 201, CONFIGS[0])
        assert (figures["support"] < 60).all()
        assert (abs(figures["value_zone.early"] - figures["zone.early"]) > 1e-3).any()


@pytest.mark.parametrize("elements", [1, 4 * 201 * 13, 4 * 201 * 100, 2**30])
def test_figures_do_not_depend_on_the_blocks(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_sharp("llama", num_hidden_layers=1)
    whole = measured(model, 201, CONFIGS[0])
    monkeypatch.setitem(observe.BLOCK_ELEMENTS, "cpu", elements)
    for name, figure in measured(model, 201, CONFIGS[0]).items():
        np.testing.assert_allclose(figure, whole[name], atol=1e-5, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("length", [64, 200])
def test_even_attention_is_one_everywhere(length: int) -> None:
    statistics = HeadStatistics(length, AnchorConfig(sink_size=4, recent_size=8))
    _, classes, static = row(length)
    key, value = torch.randn(1, 2, length, 8), torch.nn.functional.normalize(torch.randn(1, 2, length, 8), dim=-1)
    figures = statistics(torch.zeros(1, 4, length, 8), key, value, 1.0, classes, static)
    for name, figure in zip(statistics.names, figures.T, strict=True):
        if "relative" in name and not name.endswith("stopword"):
            torch.testing.assert_close(figure, torch.ones(4), atol=1e-5, rtol=0, msg=name)
        if name == "anchor_share":
            torch.testing.assert_close(figure, figures[:, statistics.names.index("anchor_tokens")])


def test_shares_sum_to_one() -> None:
    figures = measured(make_sharp("qwen3", num_hidden_layers=1), 201, CONFIGS[0])
    for prefix in ("share.", "expected.", "value_share.", "zone.", "value_zone.", "distance_share."):
        total = np.nansum([figure for name, figure in figures.items() if name.startswith(prefix)], axis=0)
        np.testing.assert_allclose(total, 1, atol=1e-5, err_msg=prefix)


def test_every_name_is_described() -> None:
    statistics = HeadStatistics(100, AnchorConfig())
    assert tuple(statistics.descriptions) == statistics.names
    assert all(meaning and "\n" not in meaning for meaning in statistics.descriptions.values())


def test_bad_lengths() -> None:
    with pytest.raises(UserError, match="--max_len 15: must be at least 16"):
        HeadStatistics(15, AnchorConfig())
    statistics = HeadStatistics(20, AnchorConfig())
    flags = torch.zeros(30, dtype=torch.bool)
    with pytest.raises(ValueError, match="one row of 20 tokens"):
        statistics(torch.zeros(1, 2, 30, 4), *[torch.zeros(1, 1, 30, 4)] * 2, 1.0, flags.long(), flags)
