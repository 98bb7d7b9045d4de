"""The forward pass over a padded cache; on a GPU, its one-token step as a CUDA graph.

An eager step is bound by the launches of its kernels, whatever the batch: a graph launches them at once.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsekv.cuda_graph import capture
from sparsekv.evaluation.engine.padded_cache import PaddedCache

WORTH_A_GRAPH = 8  # steps still to come: capturing one costs about as much as three


class PaddedForward:
    """Logits of the next token of every row of a padded cache, whose rows stay the same.

    Parameters
    ----------
    model : PreTrainedModel
        With padded attention in place.
    cache : PaddedCache
    """

    def __init__(self, model: PreTrainedModel, cache: PaddedCache) -> None:
        self.model, self.cache = model, cache
        self._graph: torch.cuda.CUDAGraph | None = None
        self._may_capture = model.device.type == "cuda" and len(cache.filled) == 1

    def __call__(self, ids: Tensor, positions: Tensor, steps_left: int) -> Tensor:
        """Feed tokens, Long[B, S], at their positions; returns the last token's logits, [B, V].

        The logits are overwritten by the next call.
        """
        if ids.shape[1] == 1 and self._graph is None and self._may_capture and steps_left >= WORTH_A_GRAPH:
            with torch.cuda.device_of(self.cache.padded[0].keys):
                self._capture(ids, positions)
        if ids.shape[1] == 1 and self._graph is not None:
            self._ids.copy_(ids)
            self._positions.copy_(positions)
            self._graph.replay()
            logits = self._logits
        else:
            logits = self._run(ids.to(self.model.device), positions.to(self.model.device))
        self.cache.advance(ids.shape[1])
        return logits

    def _run(self, ids: Tensor, positions: Tensor) -> Tensor:
        output: Any = self.model(
            input_ids=ids,
            position_ids=positions,
            past_key_values=self.cache,
            padded_cache=self.cache,
            logits_to_keep=1,
        )
        return output.logits[:, -1]

    def _capture(self, ids: Tensor, positions: Tensor) -> None:
        """Capture the step: it writes its column as often as it runs, with the same entries."""
        self._ids, self._positions = ids.to(self.model.device), positions.to(self.model.device)

        def step() -> Tensor:
            return self._run(self._ids, self._positions)

        captured = capture(step, step)
        if captured is None:
            self._may_capture = False
        else:
            self._graph, self._logits = captured
