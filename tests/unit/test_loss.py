import pytest
import torch
import torch.nn.functional as F
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


def plain(
    student, teacher, labels, head, context, *, lambda_kl, temperature, direction, lambda_context,
    context_labels=None, lambda_ce_context=0.0,
):  # fmt: skip
    """(loss, context loss, ce, kl, context ce, context kl) of the full logits."""
    logits, teacher_logits = head(student).float(), head(teacher).float().detach()
    valid = labels != -100
    ce = F.cross_entropy(logits[valid], labels[valid], reduction="sum")
    kl = divergence(logits[valid] / temperature, teacher_logits[valid] / temperature, direction)
    kl_context = divergence(logits[context] / temperature, teacher_logits[context] / temperature, direction)
    scale = temperature**2
    loss, context_loss = ce + lambda_kl * scale * kl, lambda_context * scale * kl_context
    ce_context = torch.zeros(())
    if lambda_ce_context:
        ce_context = F.cross_entropy(logits[context], context_labels[context], reduction="sum")
        context_loss = context_loss + lambda_ce_context * ce_context
    return loss, context_loss, ce, kl, ce_context, kl_context


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunk_size", [1, 7, 1024])  # 7 leaves an uneven last chunk
@pytest.mark.parametrize("lambda_ce_context", [0.0, 0.6])
def test_equals_the_plain_formula_in_value_and_gradient(direction, temperature, chunk_size, lambda_ce_context):
    student, teacher, labels, context = make_batch()
    head = make_head()
    settings = {"lambda_kl": 0.7, "temperature": temperature, "direction": direction, "lambda_context": 0.3}
    context_labels = torch.randint(23, labels.shape).masked_fill(~context, -100)
    context_labels[context.nonzero()[2]] = -100  # before padding
    settings |= {"context_labels": context_labels, "lambda_ce_context": lambda_ce_context}

    got = distillation_loss(
        student, teacher, labels, head, head, context_mask=context, chunk_size=chunk_size, **settings
    )
    expected = plain(student, teacher, labels, head, context, **settings)
    torch.testing.assert_close(
        (got.loss, got.context_loss, got.ce, got.kl, got.ce_context, got.kl_context), expected, rtol=1e-5, atol=1e-5
    )
    assert (got.tokens, got.context_tokens) == (int((labels != -100).sum()), int(context.sum()))
    assert not any(x.requires_grad for x in (got.ce, got.kl, got.ce_context, got.kl_context))

    inputs = (student, head.weight)  # each part is scaled by its own count, as the caller does
    gradient = torch.autograd.grad(got.loss / got.tokens + got.context_loss / got.context_tokens, inputs)
    reference = torch.autograd.grad(expected[0] / got.tokens + expected[1] / got.context_tokens, inputs)
    torch.testing.assert_close(gradient, reference, rtol=1e-5, atol=1e-5)
    assert gradient[0][(labels == -100) & ~context].eq(0).all()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_bfloat16_states_are_computed_in_fp32(direction):
    student, teacher, labels, context = make_batch(vocabulary=997)
    student, teacher = student.detach().bfloat16().requires_grad_(), teacher.bfloat16()
    head = make_head(vocabulary=997, trainable=False).bfloat16()
    settings = {"lambda_kl": 1.0, "temperature": 1.0, "direction": direction, "lambda_context": 0.5}

    got = distillation_loss(student, teacher, labels, head, head, context_mask=context, chunk_size=8, **settings)
    expected = plain(student, teacher, labels, head, context, **settings)
    assert got.loss.dtype == torch.float32
    torch.testing.assert_close((got.loss, got.context_loss), expected[:2], rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(got.loss + got.context_loss, student)
    (reference,) = torch.autograd.grad(expected[0] + expected[1], student)
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient, reference, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_identical_bfloat16_models_have_no_divergence(direction):
    student, _, labels, _ = make_batch(tokens=64, vocabulary=4001)
    student = student.detach().bfloat16()
    head = make_head(vocabulary=4001).bfloat16()
    got = distillation_loss(student, student, labels, head, head, direction=direction)
    assert abs(got.kl.item()) / got.tokens < 1e-6


@pytest.mark.parametrize("repeats", [4, 64])
def test_kl_per_token_does_not_grow_with_the_length(repeats):
    student, teacher, labels, _ = make_batch()
    head = make_head()
    short = distillation_loss(student, teacher, labels, head, head)
    long = distillation_loss(student.repeat(repeats, 1), teacher.repeat(repeats, 1), labels.repeat(repeats), head, head)
    assert (long.kl / long.tokens).item() == pytest.approx((short.kl / short.tokens).item(), rel=1e-5)
    assert (long.loss / long.tokens).item() == pytest.approx(((short.ce + short.kl) / short.tokens).item(), rel=1e-5)


def test_accumulated_micro_batches_equal_one_batch():
    student, teacher, labels, context = make_batch(tokens=40)
    head = make_head()
    count, context_count = (labels != -100).sum(), context.sum()

    def backward(pieces):
        student.grad = head.weight.grad = None
        for rows in torch.arange(40).chunk(pieces):
            sums = distillation_loss(
                student[rows], teacher[rows], labels[rows], head, head, context_mask=context[rows], lambda_context=0.5
            )
            (sums.loss / count + sums.context_loss / context_count).backward()
        return student.grad.clone(), head.weight.grad.clone()

    torch.testing.assert_close(backward(8), backward(1), rtol=1e-5, atol=1e-7)


def test_numbers_known_beforehand_change_nothing():
    student, teacher, labels, context = make_batch()
    head = make_head()
    numbers = int((labels != -100).sum()), int(context.sum())
    found = []
    for known in (None, numbers):
        student.grad = None
        got = distillation_loss(
            student, teacher, labels, head, head, context_mask=context, lambda_context=0.5, numbers=known
        )
        (got.loss + got.context_loss).backward()
        assert (got.tokens, got.context_tokens) == numbers
        found.append((got.loss, got.context_loss, student.grad))
    torch.testing.assert_close(*found, rtol=0, atol=0)


class CountingHead(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.head, self.rows = head, 0

    def forward(self, hidden):
        self.rows += len(hidden)
        return self.head(hidden)


def test_heads_see_only_the_tokens_that_need_them():
    student, teacher, labels, context = make_batch()
    valid, context_count = int((labels != -100).sum()), int(context.sum())
    for lambda_kl, lambda_context, lambda_ce, states, student_rows, teacher_rows in (
        (1.0, 0.0, 0.0, teacher, valid, valid),
        (0.0, 0.0, 0.0, teacher, valid, 0),
        (1.0, 1.0, 0.0, None, valid, 0),
        (0.0, 1.0, 0.0, teacher, valid + context_count, context_count),
        (0.0, 0.0, 1.0, teacher, valid + context_count, 0),
        (1.0, 1.0, 1.0, None, valid + context_count, 0),
    ):
        heads = CountingHead(make_head()), CountingHead(make_head())
        weights = {"lambda_kl": lambda_kl, "lambda_context": lambda_context, "lambda_ce_context": lambda_ce}
        weights["context_labels"] = torch.zeros_like(labels)
        got = distillation_loss(student, states, labels, *heads, context_mask=context, chunk_size=5, **weights)
        (got.loss + got.context_loss).backward()
        assert (heads[0].rows, heads[1].rows) == (student_rows, teacher_rows)
        assert heads[1].head.weight.grad is None


def test_cross_entropy_on_the_context_needs_its_labels():
    student, teacher, labels, context = make_batch()
    head = make_head()
    with pytest.raises(ValueError, match="needs `context_labels`"):
        distillation_loss(student, teacher, labels, head, head, context_mask=context, lambda_ce_context=1.0)


def test_without_labelled_tokens_the_loss_is_a_differentiable_zero():
    student, teacher, labels, _ = make_batch()
    head = make_head()
    got = distillation_loss(student, teacher, labels.fill_(-100), head, head)
    got.loss.backward()
    assert (got.loss.item(), got.tokens) == (0, 0)
    assert student.grad.eq(0).all()
    assert head.weight.grad.eq(0).all()


def test_evaluation_makes_no_gradient(monkeypatch):
    student, teacher, labels, _ = make_batch()
    head = make_head()
    trained = distillation_loss(student, teacher, labels, head, head)
    monkeypatch.setattr(torch.autograd, "grad", lambda *_: pytest.fail("differentiated under no_grad"))
    with torch.no_grad():
        evaluated = distillation_loss(student, teacher, labels, head, head)
    assert not evaluated.loss.requires_grad
    torch.testing.assert_close(evaluated.loss, trained.loss.detach())


class LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor))])
        return result


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_never_more_than_one_chunk_of_logits(trainable, direction):
    tokens, vocabulary, chunk_size = 128, 501, 16
    student, teacher, labels, context = make_batch(tokens=tokens, vocabulary=vocabulary)
    head = make_head(vocabulary=vocabulary, trainable=trainable)  # hidden 8 < 16: its gradient is smaller than a chunk
    with LargestTensor() as largest:
        got = distillation_loss(
            student, teacher, labels, head, head, direction=direction, chunk_size=chunk_size, temperature=2.0,
            context_mask=context, lambda_context=1.0,
        )  # fmt: skip
        (got.loss + got.context_loss).backward()
    assert largest.elements == chunk_size * vocabulary
