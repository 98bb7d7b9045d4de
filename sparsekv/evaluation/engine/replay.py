"""KVzip at every ratio: its passes score the context once, whatever is then evicted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from kvpress import KVzipPress
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from sparsekv.evaluation.engine.evicted import EvictedCache, take_masked, without_masked
from sparsekv.evaluation.engine.memory import is_out_of_memory
from sparsekv.presses.without_waiting import KVzip


class Replay(KVzip):
    """A `KVzipPress` that takes the cache of a prefill, and reads the model's tokenizer once.

    Parameters
    ----------
    press : KVzipPress
        Its settings are taken, but for the ratio.
    model : PreTrainedModel
    """

    def __init__(self, press: KVzipPress, model: PreTrainedModel) -> None:
        super().__init__(**{field.name: getattr(press, field.name) for field in fields(press)})
        with self(model):  # reads the chat template; without a forward pass it does no more
            self.template: tuple[int, Any] = self.prefix_length, self._suffix_ids
        self.tokenizer = AutoTokenizer.from_pretrained(model.config.name_or_path)

    def caches(
        self, model: PreTrainedModel, context_ids: Tensor, cache: Any, ratios: Sequence[float]
    ) -> list[EvictedCache]:
        """The context's cache at each ratio.

        Parameters
        ----------
        model : PreTrainedModel
        context_ids : Long[1, C]
        cache : DynamicCache
            Of a full prefill of the context.
        ratios : sequence of float
            Above 0.
        """
        self.prefix_length, self._suffix_ids = self.template
        self._context_ids, self._cache = context_ids, cache
        self._ratios = ratios
        self._evicted: list[EvictedCache] = []
        try:
            self._perform_kvzip_compression(model, self.tokenizer)
            return self._evicted
        finally:
            self._evicted = []  # this object outlives the caches
            self._reset_internal_parameters()

    def compress_post(self, model: PreTrainedModel) -> None:
        """Called once all passes are done: KVzip's own choice, at each ratio."""
        for ratio in self._ratios:
            self.compression_ratio = ratio
            super().compress_post(model)
            layers = [
                (layer.keys, layer.values, masked)
                for layer, masked in zip(self._cache.layers, take_masked(model), strict=True)
            ]
            evicted = EvictedCache(self.context_length)
            for (keys, values, _), entries in zip(layers, without_masked(layers), strict=True):
                evicted.add(entries, keys.nbytes + values.nbytes)
            self._evicted.append(evicted)


@dataclass(frozen=True, eq=False)
class ReplayAt:
    """KVzip at one ratio, above 0."""

    replay: Replay
    ratio: float


def evict_by_replay(
    model: PreTrainedModel, context_ids: Tensor, cache: Any, presses: Mapping[Any, ReplayAt]
) -> dict[Any, EvictedCache | Exception]:
    """Each key's cache, or the exception that its press raised; see `Replay.caches`."""
    outcome: dict[Any, EvictedCache | Exception] = {}
    for replay in {id(press.replay): press.replay for press in presses.values()}.values():
        keys = [key for key, press in presses.items() if press.replay is replay]
        try:
            made = replay.caches(model, context_ids, cache, [presses[key].ratio for key in keys])
            outcome |= zip(keys, made, strict=True)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            outcome |= dict.fromkeys(keys, error)
    return outcome
