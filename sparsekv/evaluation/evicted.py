"""What eviction costs: the same continuation scored with the full cache and with each evicted one.

A context is prefilled once with full attention; a press only reads what the prefill computed, so every cell is made
from that one prefill, as at inference (the press compresses the cache, later tokens see what is left).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from kvpress import BasePress
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from sparsekv.presses import make_press

NO_PRESS = "no_press"


@dataclass(frozen=True)
class Sample:
    """A context and its continuation.

    context : Long[C], prefilled with full attention, then evicted.
    suffix : Long[S], sees the evicted cache.
    answer_start : index into `suffix` (at least 1) from which tokens are scored.
    task : what the sample belongs to.
    """

    context: Tensor
    suffix: Tensor
    answer_start: int
    task: str


@dataclass(frozen=True)
class Score:
    """One sample in one cell.

    nll : nats a scored token, teacher-forced.
    exact : whether every scored token is the most likely one, which is when greedy decoding gives the whole answer.
    """

    task: str
    press: str
    compression_ratio: float
    nll: float
    exact: bool


@dataclass
class _Recorder(BasePress):
    """A press that evicts nothing and remembers what presses read, layer by layer."""

    layers: list[tuple[nn.Module, Tensor, Tensor, Tensor, dict]] = field(default_factory=list)

    def compress(
        self,
        module: nn.Module,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        attentions: Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        self.layers.append((module, hidden_states, keys, values, kwargs))
        return keys, values


@torch.inference_mode()
def evaluate_cells(
    model: PreTrainedModel,
    samples: Iterable[Sample],
    cells: Sequence[tuple[str, float]],
    progress: Callable[[], None] = lambda: None,
) -> Iterator[Score]:
    """Score every sample in every cell.

    Parameters
    ----------
    model : PreTrainedModel
        In eval mode; for an adapter, its base model with the adapter's layers in place.
    samples : iterable of Sample
    cells : sequence of (press name, compression ratio)
        `("no_press", 0.0)` is the full cache.
    progress : callable
        Called once a sample.

    Raises
    ------
    UserError
        If a press is unknown or a ratio out of range.
    """
    presses = [(name, ratio, None if name == NO_PRESS else make_press(name, ratio)) for name, ratio in cells]
    for sample in samples:
        recorder = _Recorder()
        with recorder(model):
            context = sample.context[None].to(model.device)
            model.get_decoder()(input_ids=context, past_key_values=DynamicCache(), use_cache=True)
        for name, ratio, press in presses:
            nll, exact = _score_suffix(model, sample, _evict(recorder, press))
            yield Score(sample.task, name, ratio, nll, exact)
        progress()


def _evict(recorder: _Recorder, press: BasePress | None) -> DynamicCache:
    cache = DynamicCache()
    for layer, (module, hidden_states, keys, values, kwargs) in enumerate(recorder.layers):
        if press is not None:
            keys, values = press.compress(module, hidden_states, keys, values, None, kwargs)
        cache.update(keys, values, layer)
    return cache


def _score_suffix(model: PreTrainedModel, sample: Sample, cache: DynamicCache) -> tuple[float, bool]:
    suffix, start = sample.suffix.to(model.device), len(sample.context)
    positions = torch.arange(start, start + len(suffix), device=model.device)  # as if nothing was evicted
    logits = model(input_ids=suffix[None], past_key_values=cache, position_ids=positions[None]).logits[0]
    predicted, answer = logits[sample.answer_start - 1 : -1].float(), suffix[sample.answer_start :]
    return float(F.cross_entropy(predicted, answer)), bool((predicted.argmax(-1) == answer).all())
