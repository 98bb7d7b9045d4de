"""The rules by which anchors are recommended."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sparsekv.analysis.columns import CLASSES
from sparsekv.analysis.recommend import as_yaml, recent_distance, recommend
from sparsekv.analysis.rows import distances
from sparsekv.anchors import AnchorConfig

MAX_LEN = 1024
SHARES = {"special": 0.01, "punctuation": 0.15, "number": 0.02, "whitespace": 0.1, "stopword": 0.2, "content": 0.52}


def figure(mean: float, within: float = 0.1) -> dict:
    return {"mean": mean, "low": mean - within, "high": mean + within}


def figures(positions=(40.0, 0.5), classes=None, distance=None) -> dict:
    """Of a model: relative attention of leading positions (0.5 further on), of classes, and shares of distances."""
    relative = {name: figure(1.5) for name in CLASSES}
    relative |= {name: value if isinstance(value, dict) else figure(value) for name, value in (classes or {}).items()}
    held = distance or dict.fromkeys(distances(MAX_LEN), 1 / len(distances(MAX_LEN)))
    padded = [*positions, *[0.5] * 64][:64]
    return {
        **{f"relative_off_sink.{name}": value for name, value in relative.items()},
        **{f"position_relative.{place}": figure(value) for place, value in enumerate(padded)},
        "position_relative.rest": figure(0.5),
        **{f"distance_share.{start}": figure(share) for start, share in held.items()},
    }


def chosen(*args, given=None, **kwargs) -> AnchorConfig:
    return recommend(figures(*args, **kwargs), SHARES, given or AnchorConfig(), MAX_LEN)[0]


@pytest.mark.parametrize(("mean", "anchor"), [(1.2, True), (1.05, False), (0.5, False)])
@pytest.mark.parametrize("name", ["special", "punctuation"])
def test_a_class_is_an_anchor_where_its_whole_interval_is_above_an_even_spread(name, mean, anchor):
    assert getattr(chosen(classes={name: mean}), f"use_{name}") == anchor


@pytest.mark.parametrize("use", [True, False])
def test_without_evidence_a_class_stays_as_given(use):
    unknown = {"mean": 3.0, "low": None, "high": None}
    config = chosen(classes={"special": unknown}, given=AnchorConfig(use_special=use))
    assert config.use_special == use


@pytest.mark.parametrize(
    ("positions", "size"),
    [((40, 0.5), 1), ((40, 3, 2.2, 2.05), 3), ((1.5, 40), 0), ((2.05,), 0), ((5, 1, 9), 1), ((3,) * 64, 64)],
)
def test_the_sink_ends_where_attention_does(positions, size):
    config = chosen(positions)
    assert (config.use_sink, config.sink_size) == (size > 0, size)


def test_the_recent_window_holds_most_of_the_attention():
    held = dict.fromkeys(distances(MAX_LEN), 0.0) | {0: 0.5, 3: 0.25, 12: 0.06, 512: 0.19}
    assert recent_distance(figures(distance=held)) == 16, "the bucket from 12 ends before 16"
    assert chosen(distance=held).recent_size == 16


def test_far_attention_needs_the_whole_row():
    held = dict.fromkeys(distances(MAX_LEN), 0.0) | {768: 1.0}
    assert recent_distance(figures(distance=held)) >= MAX_LEN


@given(special=st.floats(0.5, 2), punctuation=st.floats(0.5, 2), share=st.floats(0, 0.4), sink=st.integers(0, 64))
def test_anchors_take_a_quarter_of_a_row_at_most(special, punctuation, share, sink):
    """Unless the classes alone take more: then no recent window is added."""
    shares = {**SHARES, "punctuation": share}
    measured = figures((5.0,) * sink, {"special": special, "punctuation": punctuation})
    config, _ = recommend(measured, shares, AnchorConfig(), MAX_LEN)
    always = config.use_special * shares["special"] + config.use_punctuation * shares["punctuation"]
    taken = always + (1 - always) * (config.sink_size + config.recent_size) / MAX_LEN
    assert taken <= 0.25 or config.recent_size == 0
    assert config.use_recent == (config.recent_size > 0)
    wanted = recent_distance(measured)
    if taken <= 0.25 and config.recent_size < wanted:
        one_more = always + (1 - always) * (config.sink_size + config.recent_size + 1) / MAX_LEN
        assert one_more > 0.25 - 1e-9


def test_the_file_is_an_anchor_config_with_its_evidence():
    given_config = AnchorConfig(extra_punctuation="\n'#")
    config, evidence = recommend(figures(classes={"stopword": 1.33}), SHARES, given_config, MAX_LEN)
    text = as_yaml(config, evidence, "Made for a test.")
    assert AnchorConfig(**yaml.safe_load(text)) == config
    assert config.extra_punctuation == "\n'#"
    comments = " ".join(line.removeprefix("# ") for line in text.splitlines() if line.startswith("#"))
    for said in ("Made for a test.", "stopword 1.33", "15.0% of the text", "1.40 … 1.60", "40.0, 0.5", "80%", "25%"):
        assert said in comments, said
    assert max(map(len, text.splitlines())) <= 100


def test_both_numbers_are_said_where_the_window_is_capped():
    config, evidence = recommend(figures(), SHARES, AnchorConfig(), MAX_LEN)
    assert config.recent_size < recent_distance(figures())
    assert f"the last {recent_distance(figures())} tokens" in evidence["use_recent"]
    assert f"{config.recent_size} are left" in evidence["use_recent"]
