"""The next token of every row: the most likely one, or a draw that depends on the row alone."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Parameters
    ----------
    temperature : float
        0: greedy.
    top_p : float
        Draw from the most likely tokens that together have at least this probability (nucleus sampling,
        arXiv:1904.09751).
    top_k : int
        Draw from this many most likely tokens; 0: from all.
    num_generations : int
        Answers a question.
    seed : int
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    num_generations: int = 1
    seed: int = 0


@dataclass(frozen=True)
class Sampler:
    """Draws by `Sampling`, from a generator of each row's own: no draw depends on the batch."""

    sampling: Sampling = Sampling()

    def __call__(self, logits: Tensor, seeds: Sequence[int], step: int) -> list[int]:
        """One token a row, from logits [B, V]; `seeds` are the rows', `step` counts from 0."""
        if self.sampling.temperature == 0:
            return logits.argmax(-1).tolist()
        scaled, order = (logits.float() / self.sampling.temperature).sort(dim=-1, descending=True)
        if self.sampling.top_k:
            scaled, order = scaled[:, : self.sampling.top_k], order[:, : self.sampling.top_k]
        probability = scaled.softmax(-1)
        before = probability.cumsum(-1) - probability  # of all that is more likely
        reached = probability.masked_fill(before >= self.sampling.top_p, 0.0).cumsum(-1)
        draws = torch.stack([self._uniform(seed, step) for seed in seeds]).to(logits.device)[:, None]
        chosen = (reached <= draws * reached[:, -1:]).sum(-1, keepdim=True).clamp(max=reached.shape[1] - 1)
        return order.gather(-1, chosen)[:, 0].tolist()

    def seed(self, *of: int) -> int:
        """Of a generator, from the run's seed and these numbers alone: the row's seed, and a step where it has one."""
        key = hashlib.sha256(" ".join(map(str, (self.sampling.seed, *of))).encode()).digest()
        return int.from_bytes(key[:7], "little")

    def _uniform(self, seed: int, step: int) -> Tensor:
        """In [0, 1)."""
        return torch.rand((), generator=torch.Generator().manual_seed(self.seed(seed, step)))
