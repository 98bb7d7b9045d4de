"""A batch of evicted caches holds every row's entries, and nothing that is seen beside them."""

from itertools import pairwise

import pytest
import torch

from sparsekv.evaluation.engine.evicted import LayerEntries
from sparsekv.evaluation.engine.padded_cache import LIKE_LENGTH, PaddedLayer

HEADS, DIM, ROOM = 2, 3, 7


def make_rows(lengths, by_head):
    draw = torch.Generator().manual_seed(0)
    rows = []
    for row, length in enumerate(lengths):
        keys, values = torch.rand(2, HEADS, length, DIM, generator=draw)
        counts = torch.tensor([length, max(0, length - row)]) if by_head and row % 2 else None
        rows.append(LayerEntries(keys, values, counts))
    return rows


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("lengths", [[5], [9, 4, 6, 1], [2, 8, 8, 3, 20]])
def test_layout(lengths, by_head):
    rows, questions = make_rows(lengths, by_head), [1 + row % 3 for row in range(len(lengths))]
    layer = PaddedLayer(rows, questions, ROOM, torch.zeros(1, dtype=torch.long))
    width, total = max(lengths), layer.keys.shape[2]
    assert total >= width + ROOM
    for row, (entries, question) in enumerate(zip(rows, questions, strict=True)):
        own = slice(width - lengths[row], width)
        for padded, kept in ((layer.keys[row], entries.keys), (layer.values[row], entries.values)):
            assert torch.equal(padded[:, own], kept)
            assert padded.count_nonzero() == kept.count_nonzero()
        real = torch.zeros(HEADS, total, dtype=torch.bool)
        counts = [lengths[row]] * HEADS if entries.counts is None else entries.counts.tolist()
        for head, count in enumerate(counts):
            real[head, own.start : own.start + count] = True
        real[:, width + max(questions) - question :] = True
        assert torch.equal(layer.real[row].expand(HEADS, -1), real)


@pytest.mark.parametrize(
    "lengths", [[100] * 5, [100, 90, 70, 71, 69, 40, 70, 30, 30, 8], [10, 20, 90, 30], [50, 3] * 20]
)
def test_segments_hold_every_row_and_are_few(lengths):
    layer = PaddedLayer(make_rows(lengths, False), [1] * len(lengths), ROOM, torch.zeros(1, dtype=torch.long))
    segments = layer.segments()
    assert [row for rows, _ in segments for row in range(rows.start, rows.stop)] == list(range(len(lengths)))
    for rows, first in segments:
        assert all(lengths[row] <= layer.width - first for row in range(rows.start, rows.stop))
    starts = [max(lengths[rows.start :]) for rows, _ in segments]
    assert all(after < LIKE_LENGTH * before for before, after in pairwise(starts))
