"""kvpress's scores without waiting for the GPU, and by a layer's own queries.

kvpress pins a window by reading the largest score back from the GPU, and builds the average rotation of future queries
on the CPU. Once a layer, that leaves the GPU idle while Python prepares the next kernels. These presses compute the
same scores on the device. In a layer whose queries kvpress makes otherwise than the layer does, they are the layer's.

Shapes: B batch, G key/value heads, H query heads, C context tokens, W those of a window.
"""

import copy
import math
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.nn.functional as F
from kvpress import (
    AdaKVPress,
    BasePress,
    CriticalAdaKVPress,
    CriticalKVPress,
    ExpectedAttentionPress,
    KVzipPress,
    SnapKVPress,
    TOVAPress,
)
from torch import Tensor, nn

from sparsekv.presses.queries import Rotary, kvpress_knows, own_queries

WRAPPERS = (AdaKVPress, CriticalAdaKVPress, CriticalKVPress)


def without_waiting(press: Any) -> Any:
    """The press itself, or one that gives the same scores without waiting for the GPU, by queries of any layer."""
    for kind in (SnapKV, TOVA, ExpectedAttention, KVzip):
        if type(press) is kind.__base__:
            return kind(**{setting.name: getattr(press, setting.name) for setting in fields(press)})
    if type(press) in WRAPPERS:
        press = copy.copy(press)
        press.press = without_waiting(press.press)
    return press


def asks_layers(press: BasePress) -> bool:
    """Whether `without_waiting` gives a press that scores by queries of any layer."""
    inner: Any = press.press if type(press) in WRAPPERS else press
    return type(without_waiting(inner)) is not type(inner)


def _window_attention(module: Any, hidden_states: Tensor, keys: Tensor, window: int, rotary: Rotary) -> Tensor:
    """What the last queries attend to before them, [B, H, W, C − W] (as `SnapKVPress.compute_window_attention`)."""
    if kvpress_knows(module, hidden_states, rotary):
        return SnapKVPress.compute_window_attention(module, hidden_states, keys, window, rotary)
    if rotary is not None:
        rotary = rotary[0][:, -window:], rotary[1][:, -window:]
    query, scaling = own_queries(module, hidden_states[:, -window:], rotary)
    logits = query @ keys.repeat_interleave(query.shape[1] // keys.shape[1], dim=1).mT * scaling
    logits = logits + torch.full_like(logits, -math.inf).triu(keys.shape[2] - window + 1)
    return logits.softmax(-1, dtype=torch.float32).to(query.dtype)[..., :-window]


def _check_longer(keys: Tensor, least: int) -> None:
    if keys.shape[2] <= least:
        raise ValueError(f"{keys.shape[2]} tokens: more than {least} are needed")


def _pinned(scores: Tensor, first: int = 0, last: int = 0) -> Tensor:
    """Scores [B, G, C] with so many entries before and after them that are never evicted."""
    top = (scores.detach().amax() + 1).expand(*scores.shape[:2], max(first, last))
    return torch.cat((top[..., :first], scores, top[..., :last]), dim=-1)


@dataclass
class SnapKV(SnapKVPress):
    """`SnapKVPress`: what the last `window_size` queries attend to, smoothed (https://arxiv.org/abs/2404.14469)."""

    def score(
        self,
        module: nn.Module,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        attentions: Tensor | None,
        kwargs: dict[str, Any],
    ) -> Tensor:
        """[B, G, C]; raises ValueError for a context that is no longer than the window."""
        _check_longer(keys, self.window_size)
        rotary = kwargs["position_embeddings"]
        attended = _window_attention(module, hidden_states, keys, self.window_size, rotary).mean(dim=-2)
        smooth = F.avg_pool1d(attended, kernel_size=self.kernel_size, padding=self.kernel_size // 2, stride=1)
        return _pinned(smooth.unflatten(1, (keys.shape[1], -1)).mean(2), last=self.window_size)


@dataclass
class TOVA(TOVAPress):
    """`TOVAPress`: what the last query attends to, over all heads (https://arxiv.org/abs/2401.06104)."""

    def score(
        self,
        module: nn.Module,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        attentions: Tensor | None,
        kwargs: dict[str, Any],
    ) -> Tensor:
        """[B, G, C]."""
        rotary = kwargs["position_embeddings"]
        attended = _window_attention(module, hidden_states, keys, 1, rotary)
        return _pinned(attended.mean(1).repeat(1, keys.shape[1], 1), last=1)


def _turns_at(module: Any, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of positions, in the dtype of a tensor, by a layer's rotary embedding, which stays as it is.

    One of dynamic frequencies keeps those of the farthest position it was ever asked for.
    """
    return copy.deepcopy(module.rotary_emb)(like, positions)


def _mean_of_two(cos: Tensor, sin: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Two rotations [1, 1, R] whose mean is that of all n, [1, n, R].

    Pair by pair, the mean is (e^{i(φ + δ)} + e^{i(φ − δ)}) / 2 with φ its angle and cos δ its length. Both are
    rotations, as the mean is not, so that a norm after them has the same factor as after each of the n.
    """
    wide = cos.float(), sin.float()
    scale = torch.hypot(*wide)[:, :1]  # 1, or a factor on both, as YaRN's
    x, y = (part.mean(1, keepdim=True) for part in wide)
    angle, apart = torch.atan2(y, x), (torch.hypot(x, y) / scale).clamp(max=1).acos()
    both = (angle + apart, angle - apart)
    return [((scale * turn.cos()).to(cos.dtype), (scale * turn.sin()).to(cos.dtype)) for turn in both]


@dataclass
class ExpectedAttention(ExpectedAttentionPress):
    """`ExpectedAttentionPress`: what queries like the ones seen will attend to (https://arxiv.org/abs/2510.00636)."""

    _rotations: dict[Any, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def apply_avg_rope(
        self, module: nn.Module, mu: Tensor, cov: Tensor | None, q_len: int
    ) -> tuple[Tensor, Tensor | None]:
        """Mean [B, H, D] and covariance [B, H, D, D] of the queries, turned as they will be on average."""
        rotation = self._average_rotation(module, mu, q_len)
        mu = mu @ rotation.T
        return mu, None if cov is None else rotation @ (cov @ rotation.T)

    @torch.no_grad()
    def _average_rotation(self, module: Any, mu: Tensor, q_len: int) -> Tensor:
        """[D, D], over the positions of future queries; the same for all layers of one rotary embedding."""
        known = (module.rotary_emb, q_len, mu.dtype, mu.device)
        if known not in self._rotations:
            positions = torch.arange(q_len, q_len + self.n_future_positions, device=mu.device)[None]
            cos, sin = (x[0].mean(0) for x in _turns_at(module, mu, positions))
            half = len(cos) // 2
            turn = torch.eye(len(cos), device=cos.device, dtype=cos.dtype).roll(half, dims=0)
            turn[:half] *= -1  # as in rotate_half
            self._rotations[known] = (cos.diag() + turn * sin).to(mu.device)
        return self._rotations[known]

    def _own_statistics(
        self, module: Any, hidden_states: Tensor, rotary: Rotary
    ) -> tuple[float, Tensor, Tensor | None]:
        """Divisor of the logits, mean [B, H, D] and covariance [B, H, D, D] of a layer's own queries, turned."""
        length, tokens = hidden_states.shape[1], hidden_states[:, self.n_sink :]
        if rotary is None:
            query, scaling = own_queries(module, tokens, None)
        else:
            positions = torch.arange(length, length + self.n_future_positions, device=hidden_states.device)[None]
            cos, sin = (x.to(hidden_states.device) for x in _turns_at(module, hidden_states, positions))
            shape = (-1, tokens.shape[1], -1)
            turns = [(cos.expand(shape), sin.expand(shape)) for cos, sin in _mean_of_two(cos, sin)]
            (query, scaling), (other, _) = (own_queries(module, tokens, turn) for turn in turns)
            query = (query + other) / 2
        mean = query.mean(2, keepdim=True)
        centered = query - mean
        covariance = centered.mT @ centered / query.shape[2] if self.use_covariance else None
        return 1 / scaling, mean.squeeze(2), covariance

    def score(
        self,
        module: nn.Module,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        attentions: Tensor | None,
        kwargs: dict[str, Any],
    ) -> Tensor:
        """[B, G, C]; raises ValueError for a context that is no longer than the first tokens."""
        _check_longer(keys, self.n_sink)
        keys, values = keys[:, :, self.n_sink :], values[:, :, self.n_sink :]
        width = keys.shape[-1]
        rotary = kwargs["position_embeddings"]
        if kvpress_knows(module, hidden_states, rotary):
            divisor = math.sqrt(width)
            mean, covariance = self.get_query_statistics(module, hidden_states)
        else:
            divisor, mean, covariance = self._own_statistics(module, hidden_states, rotary)
        by_group = (keys.shape[1], -1)
        logits = keys[:, :, None] @ mean.unflatten(1, by_group)[..., None] / divisor
        logits = logits.squeeze(-1)  # [B, G, query heads of the group, C]
        if covariance is not None:
            spread = keys[:, :, None] @ covariance.unflatten(1, by_group)
            logits = logits + (spread * keys[:, :, None]).sum(-1) / divisor**2 / 2
        scores = logits.softmax(-1).mean(2)
        if self.use_vnorm:
            scores = (scores + self.epsilon) * values.norm(dim=-1)
        return _pinned(scores, first=self.n_sink)


class KVzip(KVzipPress):
    """`KVzipPress`: the most that an entry is attended to while the context is repeated (https://arxiv.org/abs/2505.23416)."""

    def _compute_cross_attention(
        self, module: Any, hidden_states: Tensor, keys: Tensor, kwargs: dict[str, Any]
    ) -> Tensor:
        """What the repeating tokens R attend to: first tokens, a part of the context, themselves: [B, G, H/G, R, …]."""
        rotary = kwargs["position_embeddings"]
        if kvpress_knows(module, hidden_states, rotary):
            return super()._compute_cross_attention(module, hidden_states, keys, kwargs)
        query, scaling = own_queries(module, hidden_states, rotary)
        sink, repeating = min(self.n_sink, self.start_idx), query.shape[2]
        parts = keys[:, :, :sink], keys[:, :, self.start_idx : self.end_idx], keys[:, :, -repeating:]
        logits = query.unflatten(1, (keys.shape[1], -1)) @ torch.cat(parts, dim=2)[:, :, None].mT * scaling
        self._mask_causal(logits, repeating)
        return logits.softmax(-1)
