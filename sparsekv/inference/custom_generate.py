"""`generate` for stock transformers: what `sparsekv export` writes, with all that it needs, into a model's folder.

`SETTINGS` and `classify_vocabulary` are replaced there: the exported file carries the model's anchors.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import PreTrainedModel

from sparsekv.anchors import AnchorConfig, AnchorSelector
from sparsekv.errors import require
from sparsekv.inference.anchor_cache import AnchorCache
from sparsekv.inference.reading import CHUNK, read

SETTINGS: dict[str, Any] = {"anchors": {}, "mode": "prefill", "budget": None, "vocab_size": 0}


def generate(*args: Any, model: PreTrainedModel, **options: Any) -> Any:
    """`model.generate` with an `AnchorCache`.

    Parameters
    ----------
    model : PreTrainedModel
    mode, budget, context_length
        As of `AnchorCache`; by default as exported.
    **options
        Those of `model.generate`. Give `attention_mask` where rows are padded. `past_key_values`: the cache of an
        earlier call, for a further turn; with `return_dict_in_generate` the output has it.

    Returns
    -------
    What `model.generate` returns.
    """
    inputs = [x for x in (*args, options.pop("inputs", None), options.pop("input_ids", None)) if x is not None]
    require(len(inputs) == 1, "input_ids: give the tokens of the text, once")
    ids: torch.Tensor = inputs[0]
    chosen = {name: options.pop(name, SETTINGS.get(name)) for name in ("mode", "budget", "context_length")}
    cache = options.pop("past_key_values", None)
    if not isinstance(cache, AnchorCache):
        stale = cache is not None and cache.get_seq_length() > 0
        require(not stale, f"past_key_values {type(cache).__name__}: give the cache of an earlier call, or none")
        cache = AnchorCache(model, selector=_selector(model), **chosen)
    mask = options.pop("attention_mask", None)
    mask = torch.ones_like(ids) if mask is None else mask
    _read_context(model, cache, ids, mask, options)
    stock: Any = type(model)  # the model's own `generate` may be this very function
    return stock.generate(model, ids, attention_mask=mask, past_key_values=cache, **options)


def _read_context(
    model: PreTrainedModel, cache: AnchorCache, ids: torch.Tensor, mask: torch.Tensor, options: dict[str, Any]
) -> None:
    """Read what is known to be context once for all beams, and without the mask that one pass would need."""
    streaming = cache.mode == "streaming"
    end = ids.shape[1] - 1 if streaming else min(cache.context_length or 0, ids.shape[1] - 1)
    if end <= cache.get_seq_length():
        return
    read(model, cache, ids[:, :end], mask[:, :end], CHUNK if streaming else None)
    config = options.get("generation_config") or model.generation_config
    copies = [options.get(name) or getattr(config, name, None) or 1 for name in ("num_beams", "num_return_sequences")]
    if max(copies) > 1:
        cache.batch_repeat_interleave(max(copies))


def _selector(model: PreTrainedModel) -> AnchorSelector:
    """The exported anchors."""
    size = model.config.get_text_config().vocab_size
    fits = size == SETTINGS["vocab_size"]
    require(fits, f"a model of {size} tokens: this generate.py is of one with {SETTINGS['vocab_size']}; export yours")
    return _anchors()


@functools.cache
def _anchors() -> AnchorSelector:
    tokenizer: Any = None  # what it would say of the vocabulary is in this file
    return AnchorSelector(AnchorConfig(**SETTINGS["anchors"]), tokenizer)
