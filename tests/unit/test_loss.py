import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparsekv.training.loss import distillation_loss

DIRECTIONS = ("forward", "reverse", "js")


def make_head(hidden=8, vocabulary=23, trainable=True, seed=1):
    torch.manual_seed(seed)
    return nn.Linear(hidden, vocabulary, bias=False).requires_grad_(trainable)


def make_batch(tokens=37, hidden=8, vocabulary=23, seed=0):
    """Student and teacher states, labels with every third token unlabelled, those of the first half as context."""
    torch.manual_seed(seed)
    student, teacher = 2 * torch.randn(2, tokens, hidden)
    labels = torch.randint(vocabulary, (tokens,))
    labels[::3] = -100
    context = (labels == -100) & (torch.arange(tokens) < tokens // 2)
    return student.requires_grad_(), teacher, labels, context


def divergence(student_logits, teacher_logits, direction):
    """Σ over tokens, from the definitions: Σ_v p log(p / q)."""
    p, q = teacher_logits.float().softmax(-1), student_logits.float().softmax(-1)
    mixture = (p + q) / 2
    pairs = {"forward": [(p, q)], "reverse": [(q, p)], "js": [(p, mixture), (q, mixture)]}[direction]
    return sum((a * (a / b).log()).sum() for a, b in pairs) / len(pairs)


def plain(student, teacher, labels, head, context, *, lambda_kl, temperature, direction, lambda_context):
    """(loss, context loss, ce, kl, context kl) of the full logits."""
    logits, teacher_logits = head(student).float(), head(teacher).float().detach()
    valid = labels != -100
    ce = F.cross_entropy(logits[valid], labels[valid], reduction="sum")
    kl = divergence(logits[valid] / temperature, teacher_logits[valid] / temperature, direction)
    kl_context = divergence(logits[context] / temperature, teacher_logits[context] / temperature, direction)
    scale = temperature**2
    return ce + lambda_kl * scale * kl, lambda_context * scale * kl_context, ce, kl, kl_context


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunk_size", [1, 7, 1024])  # 7 leaves an uneven last chunk
def test_equals_the_plain_formula_in_value_and_gradient(direction, temperature, chunk_size):
    student, teacher, labels, context = make_batch()
    head = make_head()
    settings_ = {"lambda_kl": 0.7, "temperature": temperature, "direction": direction, "lambda_context": 0.3}

    got = distillation_loss(
        student, teacher, labels, head, head, context_mask=context, chunk_size=chunk_size, **settings_
    )
    expected = plain(student, teacher, labels, head, context, **settings_)
    torch.testing.assert_close(
        (got.loss, got.context_loss, got.ce, got.kl, got.kl_context), expected, rtol=1e-5, atol=1e-5
    )
    assert (got.tokens, got.context_tokens) == (int((labels != -100).sum()), int(context.sum()))
    assert not (got.ce.requires_grad or got.kl.requires_grad or got.kl_context.requires_grad)

    inputs = (student, head.weight)  # each part is scaled by its own count, as the caller does
    gradient = torch.autograd.grad(got.loss / got.tokens + got.context_loss / got.context_tokens, inputs)
    reference = torch.autograd.grad(expected[0] / got.tokens + expected[1] / got.context_tokens, inputs)
    torch.testing.assert_close(gradient, reference, rtol=1e-5, atol=1e-5)
    assert gradient[0][(labels == -100) & ~context].eq(0).all()


@settings(deadline=None, max_examples=25)
@given(direction=st.sampled_from(DIRECTIONS), temperature=st.floats(0.5, 4), seed=st.integers(0, 99))
def test_analytic_gradient_passes_gradcheck_by_finite_differences(direction, temperature, seed):
    """In fp32, so by one directional derivative with a wide step."""
    student, teacher, labels, _ = make_batch(tokens=5, seed=seed)
    head = make_head(trainable=False)

    def loss(states):
        return distillation_loss(
            states, teacher, labels, head, head, temperature=temperature, direction=direction, chunk_size=2
        ).loss

    direction_ = F.normalize(torch.randn_like(student), dim=None) if False else torch.randn_like(student)
    direction_ = direction_ / direction_.norm()
    (gradient,) = torch.autograd.grad(loss(student), student)
    with torch.no_grad():
        numeric = (loss(student + 0.01 * direction_) - loss(student - 0.01 * direction_)) / 0.02
    assert (gradient * direction_).sum().item() == pytest.approx(numeric.item(), rel=0.02, abs=0.02)
