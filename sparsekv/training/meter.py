"""Figures of training between two log lines."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from sparsekv.training.anchor import AnchorSelector
from sparsekv.training.eviction import ForwardEviction
from sparsekv.training.loss import LossSums
from sparsekv.training.plan import EvictionPlan

# Dense bf16 peak in FLOP/s by the makers' data sheets; a longer name comes before one that it contains.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
}


class Meter:
    """Sums over micro-batches, reduced over processes when flushed.

    Parameters
    ----------
    model : PreTrainedModel
        The base model, to count floating-point operations.
    trains_all : bool
        Whether every parameter is trained, and not only an adapter.
    has_teacher : bool
        Whether a teacher reads every row, too.
    """

    def __init__(self, model: PreTrainedModel, trains_all: bool, has_teacher: bool) -> None:
        embedding: Any = model.get_input_embeddings()
        tied = model.config.get_text_config().tie_word_embeddings  # then the same weights are the head's
        parameters = sum(p.numel() for p in model.parameters()) - (0 if tied else embedding.weight.numel())
        # 2 FLOPs a parameter and token each for student, the gradient of activations, that of weights where all are
        # trained, and the teacher. Attention's own work is left out.
        self.flops_per_token = 2 * parameters * (2 + trains_all + has_teacher)
        self._reset()

    def _reset(self) -> None:
        self.sums: Tensor | None = None  # stays on the device: reading a number there would wait for it
        self.requested = self.actual = 0.0
        self.batches = 0
        self.tokens = 0
        self.started = time.perf_counter()

    def add(
        self,
        sums: LossSums,
        counts: Tensor,
        inputs: dict[str, Tensor],
        plan: EvictionPlan,
        eviction: ForwardEviction | None,
        selector: AnchorSelector,
        selection: Tensor,
    ) -> None:
        """Count one micro-batch.

        `counts` is Long[2], the tokens that `sums.loss` and `sums.context_loss` are divided by; `eviction` is None when
        nothing was evicted (control).
        """
        input_ids, attention_mask = inputs["input_ids"], inputs.get("attention_mask")
        context = plan.cuts[-1] if plan.cuts else input_ids.shape[1]
        anchors = selector(input_ids[:, :context], None if attention_mask is None else attention_mask[:, :context])
        requested = 1.0 if eviction is None else sum(plan.keep_ratios) / len(plan.keep_ratios)
        actual = 1.0 if eviction is None else eviction.keep_ratio()
        tokens, context_tokens = counts.to(sums.ce.device).clamp(min=1)  # the last layer's, not always the first one's
        in_context = sums.ce_context / context_tokens, sums.kl_context / context_tokens
        parts = sums.ce / tokens, sums.kl / tokens, *in_context, selection.detach(), anchors.double().mean()
        row = torch.stack([part.double().to(anchors.device) for part in parts])
        self.sums = row if self.sums is None else self.sums + row
        self.requested, self.actual, self.batches = self.requested + requested, self.actual + actual, self.batches + 1
        self.tokens += input_ids.numel()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside (an evaluation, a save) is not training time."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.started += time.perf_counter() - began

    def flush(self, accelerator: Accelerator, steps: int) -> dict[str, float]:
        """The figures since the last call, over all processes and `steps` optimizer steps.

        `ce` and `kl` are means over steps of the mean over the step's tokens, as the other parts of the loss are over
        theirs: weighted, they sum to it (docs/training.md, Files of a run).
        """
        if self.sums is None:
            return {}
        device = self.sums.device
        known = torch.tensor([self.requested, self.actual, self.batches, self.tokens], dtype=torch.float64)
        totals = torch.cat([self.sums.to(accelerator.device), known.to(accelerator.device)])
        totals = accelerator.reduce(totals, reduction="sum").tolist()
        ce, kl, ce_context, kl_context, selection, anchors, requested, actual, batches, seen = totals
        rate = seen / (time.perf_counter() - self.started)
        logs = {
            "ce": ce / steps,
            "kl": kl / steps,
            "ce_context": ce_context / steps,
            "kl_context": kl_context / steps,
            "selection": selection / steps,
            "requested_keep_ratio": requested / batches,
            "actual_keep_ratio": actual / batches,
            "anchor_share": anchors / batches,
            "tokens_per_second": rate,
        }
        if device.type == "cuda":
            logs["peak_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
            name = torch.cuda.get_device_name(device)
            peak = next((flops for known, flops in PEAK_FLOPS.items() if known in name), None)
            if peak:
                logs["mfu"] = rate * self.flops_per_token / (peak * accelerator.num_processes)
        self._reset()
        return logs
