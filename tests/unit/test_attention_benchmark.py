"""benchmarks/attention.py: what it compares computes the same."""

import argparse
import importlib
from pathlib import Path

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def attention(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("attention")


@pytest.mark.filterwarnings("ignore")  # FlexAttention without a compiler, which the GPU has
def test_every_contender_has_the_mask_of_the_dense_one(attention, monkeypatch):
    monkeypatch.setattr(attention, "compiled_block_mask", create_block_mask)
    monkeypatch.setattr(attention, "compiled_flex", flex_attention)
    torch.manual_seed(0)
    cuts = (50, 90, 131)
    keeps = [attention.random_keep((1, 2, cut), 0.3, torch.device("cpu")) for cut in cuts]
    query, key, value = (torch.randn(1, heads, 200, 16) for heads in (4, 2, 2))
    found = attention.contenders("cuda", keeps, cuts)
    wanted = found.pop("dense mask")(query, key, value)
    causal = found.pop("causal")(query, key, value)
    assert found.keys() == {"two-region", "FlexAttention"}
    for attend in found.values():
        torch.testing.assert_close(attend(query, key.clone(), value), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(causal[:, :, :50], wanted[:, :, :50], atol=1e-5, rtol=1e-5)
    assert (causal - wanted).abs().max() > 0.1


def test_a_row_for_each_contender_with_its_difference(attention):
    options = argparse.Namespace(device="cpu", repeats=1)
    rows = attention.compare(options, 64, 0.3)
    assert [row[0] for row in rows] == ["dense mask", "causal", "two-region"]
    assert [row[1:3] for row in rows] == [["64", "30%"]] * 3
    assert 0 < float(rows[2][-1]) < 1e-5
    assert rows[1][-1] == "–"
