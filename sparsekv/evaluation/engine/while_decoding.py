"""Answers under a press that evicts while decoding: the ordinary way, one context at a time."""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from kvpress import BasePress, CompressionRatioDecodingPress, DecodingPress
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from sparsekv.evaluation.engine.growing import GrowingAnswers
from sparsekv.evaluation.engine.sampling import Sampler


@torch.inference_mode()
def prefill_for_decoding(model: PreTrainedModel, context_ids: Tensor, press: BasePress) -> DynamicCache:
    """The cache of a context, Long[1, C], under the press where it evicts in the prefill too."""
    cache = DynamicCache()
    with contextlib.nullcontext() if isinstance(press, DecodingPress) else press(model):
        model.model(input_ids=context_ids.to(model.device), past_key_values=cache)
    return cache


def kept_while_decoding(press: BasePress, tokens_seen: int) -> int:
    """Tokens that the press is asked to keep in the end."""
    if isinstance(press, CompressionRatioDecodingPress):
        return int(tokens_seen * (1 - press.target_compression_ratio))
    return min(tokens_seen, getattr(press, "target_size", tokens_seen))


@torch.inference_mode()
def generate_with_press(
    model: PreTrainedModel,
    cache: Any,
    context_length: int,
    question_ids: Tensor,
    press: BasePress,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    sampler: Sampler,
    seeds: Sequence[int],
) -> tuple[list[list[int]], int, int]:
    """Decode with the press's hooks in place, as kvpress's pipeline does.

    The generations of one question have the same length at every step, so they are decoded together.

    Parameters
    ----------
    model : PreTrainedModel
    cache : DynamicCache
        Of `prefill_for_decoding`; it is used up.
    context_length : int
    question_ids : Long[1, Q]
    press : BasePress
    max_new_tokens : int
    stop_ids : sequence of int
    sampler : Sampler
    seeds : sequence of int
        One a generation.

    Returns
    -------
    answers : list of lists of int
        One a generation.
    tokens_seen : int
        Length of the longest sequence, with its context.
    held : int
        Bytes of one generation's cache at the end.
    """
    cache.batch_repeat_interleave(len(seeds))
    answers, rows = GrowingAnswers([max_new_tokens] * len(seeds), stop_ids), range(len(seeds))
    ids = question_ids.expand(len(seeds), -1)
    position = torch.arange(context_length, context_length + ids.shape[1])[None]
    devices = [model.device] if model.device.type == "cuda" else []
    with press(model), torch.random.fork_rng(devices):
        torch.manual_seed(sampler.seed(seeds[0]))  # of presses that draw at random
        for step in range(max_new_tokens):
            logits = model(
                input_ids=ids.to(model.device),
                past_key_values=cache,
                position_ids=position.to(model.device),
                logits_to_keep=1,
            ).logits[:, -1]
            tokens = sampler(logits, seeds, step)
            answers.add(rows, tokens)
            if not any(map(answers.grows, rows)):
                break
            ids, position = torch.tensor(tokens)[:, None], position[:, -1:] + 1
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) // len(seeds)
    return answers.tokens, int(position[0, -1]) + 1, held
