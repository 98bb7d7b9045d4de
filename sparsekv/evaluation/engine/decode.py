"""Answers of many evicted caches at once: greedy or sampled text, or the likelihood of a given text.

Shapes: B rows, Q question tokens, A answer tokens, V vocabulary.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsekv.evaluation.engine.evicted import EvictedCache
from sparsekv.evaluation.engine.growing import GrowingAnswers
from sparsekv.evaluation.engine.model_check import check_plain_logits
from sparsekv.evaluation.engine.padded_cache import PADDED_ATTENTION, PaddedCache
from sparsekv.evaluation.engine.padded_forward import PaddedForward
from sparsekv.evaluation.engine.sampling import Sampler

# Share of rows still going at which the others leave the batch. Before, moving the cache costs more than they do: on a
# GPU another row is nearly free, and a new shape is a new graph.
SHRINK = {"cpu": 0.75, "cuda": 0.5}


@dataclass(frozen=True)
class Row:
    """One answer to give: a question after an evicted context.

    cache : EvictedCache
    ids : Long[1, Q], fed after the cache; for a likelihood, the question and the text to score.
    max_new_tokens : int
        At least 1; 0 for a likelihood.
    seed : int
        Of its own random draws.
    """

    cache: EvictedCache
    ids: Tensor
    max_new_tokens: int = 0
    seed: int = 0

    @property
    def length(self) -> int:
        """Tokens fed after the cache."""
        return self.ids.shape[1]

    @property
    def slots(self) -> int:
        """Cache entries that the row needs in the end."""
        return self.cache.length + self.length + self.max_new_tokens


@torch.inference_mode()
def generate(model: PreTrainedModel, rows: Sequence[Row], stop_ids: Sequence[int], sampler: Sampler) -> list[list[int]]:
    """New tokens of every row, as kvpress's pipeline generates them one row at a time.

    Parameters
    ----------
    model : PreTrainedModel
    rows : sequence of Row
    stop_ids : sequence of int
    sampler : Sampler
    """
    answers = GrowingAnswers([row.max_new_tokens for row in rows], stop_ids)
    alive = list(range(len(rows)))
    cache, ids, positions = _begin(rows)
    steps = max(row.max_new_tokens for row in rows)
    shrink = SHRINK["cuda" if model.device.type == "cuda" else "cpu"]
    with padded_attention_in(model):
        forward = PaddedForward(model, cache)
        for step in range(steps):
            tokens = sampler(forward(ids, positions, steps - step), [rows[row].seed for row in alive], step)
            answers.add(alive, tokens)
            ids, positions = torch.tensor(tokens)[:, None], positions[:, -1:] + 1
            going = [index for index, row in enumerate(alive) if answers.grows(row)]
            if not going:
                break
            if len(going) <= shrink * len(alive):
                cache.keep_rows(going)
                alive, ids, positions = [alive[index] for index in going], ids[going], positions[going]
                forward = PaddedForward(model, cache)
    return answers.tokens


@torch.inference_mode()
def log_likelihoods(model: PreTrainedModel, rows: Sequence[Row], starts: Sequence[int]) -> Iterator[Tensor]:
    """Log-probabilities at the scored tokens of every row.

    Parameters
    ----------
    model : PreTrainedModel
    rows : sequence of Row
    starts : sequence of int
        Index into each row's `ids` from which tokens are scored, at least 1.

    Yields
    ------
    float32[A, V]
        For each scored token, what the tokens before it predict.

    Raises
    ------
    UserError
        For a model whose logits are not its head's output.
    """
    check_plain_logits(model.config, str(model.name_or_path))
    cache, ids, positions = _begin(rows)
    with padded_attention_in(model):
        hidden = model.model(
            input_ids=ids.to(model.device),
            position_ids=positions.to(model.device),
            past_key_values=cache,
            padded_cache=cache,
        ).last_hidden_state
    for row, start, states in zip(rows, starts, hidden, strict=True):
        scored = states[len(states) - row.length :][start - 1 : -1]
        yield model.lm_head(scored).float().log_softmax(-1)


def _begin(rows: Sequence[Row]) -> tuple[PaddedCache, Tensor, Tensor]:
    """The batch's cache, its left-padded ids, Long[B, Q], and their positions: as if nothing was evicted."""
    lengths = [row.length for row in rows]
    longest = max(lengths)
    ids = torch.tensor([[0] * (longest - row.length) + row.ids[0].tolist() for row in rows])
    first = torch.tensor([row.cache.start + row.length - longest for row in rows])
    positions = (first[:, None] + torch.arange(longest)).clamp(min=0)
    room = longest + max(row.max_new_tokens for row in rows)
    return PaddedCache([row.cache for row in rows], lengths, room), ids, positions


@contextlib.contextmanager
def padded_attention_in(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model attends over a `PaddedCache`."""
    before = model.config._attn_implementation
    model.set_attn_implementation(PADDED_ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
