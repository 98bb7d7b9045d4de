"""What torch's flash attention computes, on a CPU."""

import itertools

import torch

from sparsekv.attention import causal_attention


def rows_of_different_lengths(query, key, value, query_starts, key_starts, *others, scale):
    """What flash attention computes of packed rows, one by one: [tokens, heads, D] each."""
    *longest, dropout, causal, debug = others
    assert (dropout, causal, debug) == (0.0, True, False)
    out, sizes = [], ([], [])
    for queries, keys in zip(*(itertools.pairwise(x.tolist()) for x in (query_starts, key_starts)), strict=True):
        q, k, v = (x[slice(*at)].transpose(0, 1)[None] for x, at in ((query, queries), (key, keys), (value, keys)))
        out.append(causal_attention(q, k, v, scale, 0.0)[0].transpose(0, 1))
        for found, (start, stop) in zip(sizes, (queries, keys), strict=True):
            found.append(stop - start)
    assert all(most >= max(found) for most, found in zip(longest, sizes, strict=True))
    return (torch.cat(out),)
