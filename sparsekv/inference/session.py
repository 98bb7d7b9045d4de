"""A model, a cache and the text in it: what `generate` and `chat` do."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    Cache,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextStreamer,
)

from sparsekv.adapters import load_merged
from sparsekv.errors import UserError, require
from sparsekv.inference.anchor_cache import AnchorCache
from sparsekv.inference.config import ChatConfig
from sparsekv.inference.press_cache import PressCache
from sparsekv.inference.reading import CHUNK, read
from sparsekv.inference.static_cache import StaticAnchorCache
from sparsekv.models import check_device, check_ids, load_model, load_tokenizer
from sparsekv.presses import is_decoding, make_press, needs_eager, needs_question, why_not

FAST_ON = "cuda"  # where steps over fixed shapes are faster, and worth the memory of what is to come


@dataclass(frozen=True)
class Held:
    """What a cache holds of a text.

    Attributes
    ----------
    tokens : int
        Of the text that it has read.
    kept : float
        Of them, kept by a head, on average over layers and heads.
    full_bytes, nbytes : int
        Of the keys and values of the whole text, and of the tensors that there are: of fixed shapes, with room.
    """

    tokens: int
    kept: float
    full_bytes: int
    nbytes: int

    @classmethod
    def by(cls, cache: Cache) -> Held:
        """What a cache of one row holds now."""
        layers: list[Any] = [layer for layer in cache.layers if layer.is_initialized]
        tensors = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
        tokens = cache.get_seq_length()
        if isinstance(cache, PressCache):
            kept = [float(real.sum(-1).float().mean()) for real in cache.slots]
        elif isinstance(cache, AnchorCache):
            kept = [int(cache.kept)]
        else:
            kept = [layer.keys.shape[2] for layer in layers]
        full = sum(tokens * tensor.shape[1] * tensor.shape[3] * tensor.element_size() for tensor in tensors)
        nbytes = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
        return cls(tokens, sum(kept) / len(kept), full, nbytes)

    def __str__(self) -> str:
        share = f"{self.kept:,.0f} of {self.tokens:,} tokens kept ({self.kept / self.tokens:.1%})"
        return f"{share}, {self.full_bytes / 2**20:,.1f} MiB → {self.nbytes / 2**20:,.1f} MiB of keys and values"


class TimedStreamer(TextStreamer):
    """Writes text to the standard output as it comes, and remembers when each token came."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)  # type: ignore[arg-type]
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """The prompt at first, then a token a step."""
        self.times.append(time.perf_counter())
        super().put(value)

    @property
    def speed(self) -> str:
        """`57 tokens, 18.9 tokens/s`: from the first token to the last."""
        count, seconds = len(self.times) - 1, self.times[-1] - self.times[1]
        rate = f", {(count - 1) / seconds:.1f} tokens/s" if count > 1 else ""
        return f"{count:,} tokens{rate}"


class OnlyNumbers(LogitsProcessor):
    """Raises UserError where a model that has diverged gives no numbers: there is no token to choose."""

    def __init__(self, config: ChatConfig) -> None:
        self.who = f"--model {config.model}" if config.adapter is None else f"--adapter {config.adapter}"

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # [1, V]
        require(
            not bool(scores.isnan().any()), f"{self.who}: its output is not a number; give one that has not diverged"
        )
        return scores


class Session:
    """One text that grows, of what is read and what the model writes, and its cache.

    Parameters
    ----------
    config : ChatConfig

    Raises
    ------
    UserError
        Names the flag: what cannot be loaded, or served. Later: text beyond the model's positions or vocabulary.
    """

    def __init__(self, config: ChatConfig) -> None:
        check_device(config.device, "--device")
        device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.config, self.tokenizer = config, load_tokenizer(config.model, config.trust_remote_code)
        press = _press(config, self.tokenizer)
        model: Any = load_model(config.model, config.dtype, device, config.trust_remote_code)
        if config.adapter is not None:
            model = load_merged(model, config.adapter)
        if press is not None:
            reason = why_not(config.keep, model)
            require(reason is None, f"--keep {reason}")
            if needs_eager(press):
                model.set_attn_implementation("eager")
        self.model: PreTrainedModel = model
        self.cache: Cache = DynamicCache(config=model.config)
        if config.keep == "anchors":
            mode: Literal["prefill", "streaming"] = "streaming" if config.streams else "prefill"
            self.cache = AnchorCache(model, self.tokenizer, config.anchors, mode=mode, budget=config.budget)
        self.press, self.ids = press, torch.zeros(1, 0, dtype=torch.long, device=model.device)
        ends = model.generation_config.eos_token_id
        self.ends = {self.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
        model.generation_config = _how_to_write(config, sorted(self.ends))  # and nothing of what the model brings
        torch.manual_seed(config.seed)

    def fix_shapes(self, room: int) -> None:
        """Of nothing but the context and `room` tokens after it: on a GPU, let steps be fast where they can."""
        if isinstance(self.cache, AnchorCache) and not self.config.streams and self.model.device.type == FAST_ON:
            budget, selector = self.config.budget, self.cache.selector
            with suppress(UserError):  # attention other than sdpa, or several devices
                self.cache = StaticAnchorCache(self.model, room=room, budget=budget, selector=selector)

    def require_room(self, more: int, what: str) -> None:
        """Raise UserError unless so many more tokens, and an answer to them, fit into the model's positions."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        tokens, new = self.ids.shape[1] + more, self.config.max_new_tokens
        fits = limit is None or tokens + new <= limit
        require(fits, f"{what}: {tokens} tokens and --max_new_tokens {new} are more than the model's {limit} positions")

    def read(self, ids: Tensor) -> None:
        """Read Long[1, L]; the first text that is read is the context, which is evicted."""
        self._append(ids)
        if self.press is not None and self.cache.get_seq_length() == 0:
            self.cache = self._pressed(self.press)
        read(self.model, self.cache, self.ids, chunk=CHUNK if self.config.streams else None)

    def _append(self, ids: Tensor) -> None:
        check_ids(ids, self.model.config, self.config.model)
        self.ids = torch.cat([self.ids, ids.to(self.ids.device)], dim=1)

    def _pressed(self, press: Any) -> PressCache:
        try:
            return PressCache.prefill(self.model, self.ids, press)
        except UserError as error:
            raise UserError(f"--keep {self.config.keep}: {error}") from error
        except Exception as error:  # whatever its checks, files and shapes may raise
            said = f"--keep {self.config.keep}: fails on a context of {self.ids.shape[1]} tokens ({error})"
            raise UserError(f"{said}; take another press, or a longer text") from error

    def answer(self, ids: Tensor) -> TimedStreamer:
        """Read Long[1, L], at least one token, and write what the model says to it."""
        self.read(ids[:, :-1])
        self._append(ids[:, -1:])
        streamer = TimedStreamer(self.tokenizer)
        model: Any = self.model
        mask = torch.ones_like(self.ids)
        numbers = LogitsProcessorList([OnlyNumbers(self.config)])
        self.ids = model.generate(
            self.ids, attention_mask=mask, past_key_values=self.cache, streamer=streamer, logits_processor=numbers
        )
        if int(self.ids[0, -1]) in self.ends:  # what follows an answer in the template says it
            self.ids = self.ids[:, :-1]
        return streamer


def _how_to_write(config: ChatConfig, ends: list[int]) -> GenerationConfig:
    """Greedy, or drawn as the options say; `ends` are the tokens that end an answer."""
    drawn = {"temperature": config.temperature, "top_p": config.top_p, "top_k": 0} if config.temperature else {}
    return GenerationConfig(
        max_new_tokens=config.max_new_tokens,
        do_sample=bool(drawn),
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
        **drawn,
    )


def _press(config: ChatConfig, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The press of --keep, or None."""
    if config.keep in ("anchors", "full"):
        return None
    assert config.ratio is not None
    try:
        # First: what is missing of such a press would be asked for, and the press then refused.
        decodes = is_decoding(config.keep)
        require(not decodes, f"--keep {config.keep}: it evicts while the answer is written; take another press")
        press = make_press(config.keep, config.ratio, tokenizer)
    except UserError as error:
        message = str(error).replace("--presses", "--keep").replace("--ratios", "--ratio")
        raise UserError(message) from error
    require(press is not None, f"--keep {config.keep}: for the full cache say --keep full")
    require(not needs_question(press), f"--keep {config.keep}: it reads the question too; take another press")
    return press
