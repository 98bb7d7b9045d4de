"""Cross-entropy + λ·KL to a teacher, summed over tokens in fp32, holding the logits of one chunk of tokens at a time.

For 4,096 tokens and a vocabulary of 151,936 one fp32 copy of the logits is 2.3 GiB, and the plain formula keeps several
of them for its backward pass. Here a chunk's logits are made, reduced to a sum, differentiated and dropped before the
next chunk is begun, as in Liger Kernel (https://arxiv.org/abs/2410.10989): the forward pass stores the gradient with
respect to the hidden states, [N, D], and the backward pass only scales it.

With temperature T both distributions of the KL are softmax(logits / T), and the KL is multiplied by T² so that the size
of its gradient does not depend on T (Hinton et al., https://arxiv.org/abs/1503.02531). Its direction is `forward`,
KL(teacher‖student); `reverse`, KL(student‖teacher); or `js`, the Jensen–Shannon divergence, the mean of both's KL to
their mixture (β = ½ in https://arxiv.org/abs/2306.13649).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsekv.training.choices import Direction

Head = Callable[[Tensor], Tensor]
LogitSums = Callable[[Tensor, Tensor | None, Tensor | None, float, Direction], tuple[Tensor, Tensor]]

IGNORE_INDEX = -100


@dataclass(frozen=True)
class LossSums:
    """Sums over tokens, fp32 scalars in nats; divide each by the token count of the whole optimizer step.

    Attributes
    ----------
    loss : Tensor
        Σ CE + λ·T²·KL over the labelled tokens; differentiable.
    context_loss : Tensor
        Σ λ_ce_context·CE + λ_context·T²·KL over the context tokens; differentiable.
    ce, kl, ce_context, kl_context : Tensor
        The parts without λ and T², detached. A part that was not asked for is 0.
    tokens, context_tokens : int
        How many tokens `loss` and `context_loss` sum over.
    """

    loss: Tensor
    context_loss: Tensor
    ce: Tensor
    kl: Tensor
    ce_context: Tensor
    kl_context: Tensor
    tokens: int
    context_tokens: int


def sums_from_logits(
    logits: Tensor, teacher_logits: Tensor | None, targets: Tensor | None, temperature: float, direction: Direction
) -> tuple[Tensor, Tensor]:
    """(Σ CE, Σ KL) over the n rows of Float[n, V] logits, in fp32 whatever their dtype; absent parts are 0."""
    log_p = F.log_softmax(logits, dim=-1, dtype=torch.float32)
    ce = kl = log_p.new_zeros(())
    if targets is not None:
        ce = F.nll_loss(log_p, targets, reduction="sum")
    if teacher_logits is not None:
        if temperature != 1:
            log_p = F.log_softmax(logits.float() / temperature, dim=-1)
            teacher_logits = teacher_logits.float() / temperature
        kl = _divergence(log_p, F.log_softmax(teacher_logits, dim=-1, dtype=torch.float32), direction)
    return ce, kl


def distillation_loss(
    student_hidden: Tensor,
    teacher_hidden: Tensor | None,
    labels: Tensor,
    student_head: nn.Module,
    teacher_head: Head,
    *,
    lambda_kl: float = 1.0,
    temperature: float = 1.0,
    direction: Direction = "forward",
    context_mask: Tensor | None = None,
    lambda_context: float = 0.0,
    context_labels: Tensor | None = None,
    lambda_ce_context: float = 0.0,
    chunk_size: int = 1024,
    logit_sums: LogitSums = sums_from_logits,
    numbers: tuple[int, int] | None = None,
) -> LossSums:
    """Sum the loss of a micro-batch over its tokens; nothing is averaged, so gradient accumulation stays exact.

    Parameters
    ----------
    student_hidden : Float[N, D]
        The student's last hidden states.
    teacher_hidden : Float[N, D], optional
        The teacher's; never differentiated. None: no KL.
    labels : Long[N]
        The token that each hidden state is to predict (already shifted); -100 carries neither CE nor KL.
    student_head : nn.Module
        Float[n, D] → Float[n, V]. A module, not any callable, because its trainable parameters get gradients too.
    teacher_head : callable
        Float[n, D] → Float[n, V]; not called when no KL is asked for.
    lambda_kl, lambda_context : float
        Weight of the KL on labelled and on context tokens. 0: no KL there.
    temperature, direction
        Of the KL: see the head of this file.
    context_mask : Bool[N], optional
        Tokens whose loss is `context_loss`.
    context_labels : Long[N], optional
        The token that each of these is to predict, -100 where there is none; needed for `lambda_ce_context`, the weight
        of their CE.
    chunk_size : int
        Tokens whose logits live at once.
    logit_sums : callable
        `sums_from_logits`, or the same compiled.
    numbers : (int, int), optional
        How many tokens carry a label and how many are context tokens, where that is known without asking the device.
    """
    labelled, in_context = numbers or (None, None)
    objective = partial(_Objective, student_head, teacher_head, temperature, direction, logit_sums)
    sums = partial(_sums, student_hidden, teacher_hidden, chunk_size)
    loss, ce, kl, tokens = sums(labels, labels != IGNORE_INDEX, labelled, objective(1.0, lambda_kl))
    lambda_context = 0.0 if teacher_hidden is None else lambda_context
    if context_mask is None or not (lambda_context or lambda_ce_context):
        zero = torch.zeros_like(ce)
        return LossSums(loss, zero, ce, kl, zero, zero, tokens, 0)
    in_loss = objective(lambda_ce_context, lambda_context)
    context_loss, ce_context, kl_context, context_tokens = sums(context_labels, context_mask, in_context, in_loss)
    return LossSums(loss, context_loss, ce, kl, ce_context, kl_context, tokens, context_tokens)


def _sums(
    student_hidden: Tensor,
    teacher_hidden: Tensor | None,
    chunk_size: int,
    labels: Tensor | None,
    mask: Tensor,
    number: int | None,
    objective: "_Objective",
) -> tuple[Tensor, Tensor, Tensor, int]:
    """(loss, ce, kl, number) over the tokens of Bool[N] `mask`: no others ever reach a head."""
    rows = (mask.nonzero() if number is None else torch.nonzero_static(mask, size=number)).squeeze(-1)
    hidden = student_hidden[rows.to(student_hidden.device)]
    teacher = None
    if teacher_hidden is not None and objective.weight_kl:
        teacher = teacher_hidden[rows.to(teacher_hidden.device)]
    targets = None
    if objective.weight_ce:
        if labels is None:
            raise ValueError("cross-entropy on the context needs `context_labels`")
        targets = labels[rows]
    parameters = [p for p in objective.student_head.parameters() if p.requires_grad]
    grad_enabled = torch.is_grad_enabled()
    loss, ce, kl = _ChunkedSum.apply(objective, chunk_size, grad_enabled, hidden, teacher, targets, *parameters)
    return loss, ce, kl, len(rows)


@dataclass(frozen=True)
class _Objective:
    """The loss of one chunk of tokens, from hidden states to sums."""

    student_head: nn.Module
    teacher_head: Head
    temperature: float
    direction: Direction
    logit_sums: LogitSums
    weight_ce: float
    weight_kl: float

    def __call__(self, hidden: Tensor, teacher: Tensor | None, targets: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, ce, kl) of Float[n, D] hidden states and Long[n] targets, fp32, on the device of `hidden`."""
        logits = self.student_head.forward(hidden)  # past its hooks: FSDP's would take the gathered weights away
        teacher_logits = None
        if teacher is not None:
            with torch.no_grad():
                teacher_logits = self.teacher_head(teacher).to(logits.device)
        if targets is not None:
            targets = targets.to(logits.device)
        ce, kl = self.logit_sums(logits, teacher_logits, targets, self.temperature, self.direction)
        loss = self.weight_ce * ce + self.weight_kl * self.temperature**2 * kl
        return loss.to(hidden.device), ce.to(hidden.device), kl.to(hidden.device)


def _divergence(student: Tensor, teacher: Tensor, direction: Direction) -> Tensor:
    """Σ over rows of the divergence between distributions given as log-probabilities, Float[n, V]."""

    def kl(p: Tensor, q: Tensor) -> Tensor:  # KL(p‖q); torch takes the pair the other way round
        return F.kl_div(q, p, reduction="sum", log_target=True)

    if direction == "forward":
        return kl(teacher, student)
    if direction == "reverse":
        return kl(student, teacher)
    mixture = torch.logaddexp(student, teacher) - math.log(2)
    return (kl(teacher, mixture) + kl(student, mixture)) / 2


class _ChunkedSum(torch.autograd.Function):
    """Sums over chunks of rows, each differentiated while its logits exist.

    Checkpointing each chunk would be equal, but makes the logits of student and teacher a second time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        objective: _Objective,
        chunk_size: int,
        grad_enabled: bool,  # the caller's: in here autograd is always off
        hidden: Tensor,
        teacher: Tensor | None,
        targets: Tensor | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:
        differentiate = grad_enabled and any(ctx.needs_input_grad)
        gradients = [torch.zeros_like(x) for x in (hidden, *parameters)] if differentiate else []
        totals = hidden.new_zeros(3, dtype=torch.float32)
        for start in range(0, len(hidden), chunk_size):
            rows = slice(start, start + chunk_size)
            with torch.set_grad_enabled(differentiate):
                chunk = hidden[rows].detach().requires_grad_(differentiate)
                sums = objective(chunk, _take(teacher, rows), _take(targets, rows))
            totals += torch.stack([x.detach() for x in sums])
            if differentiate:
                new = torch.autograd.grad(sums[0], (chunk, *parameters))
                for total, gradient in zip((gradients[0][rows], *gradients[1:]), new, strict=True):
                    total += gradient
            del sums  # and with it the chunk's graph, before the next one is made
        ctx.save_for_backward(*gradients)
        loss, ce, kl = totals.unbind()
        ctx.mark_non_differentiable(ce, kl)
        return loss, ce, kl

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden, *parameters = (gradient * grad_outputs[0].to(gradient.device) for gradient in ctx.saved_tensors)
        return None, None, None, hidden, None, None, *parameters


def _take(tensor: Tensor | None, rows: slice) -> Tensor | None:
    return None if tensor is None else tensor[rows]
