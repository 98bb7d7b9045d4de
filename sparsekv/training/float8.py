"""Frozen linear layers in float8, which newer GPUs multiply at twice the rate of bfloat16.

Only weights that no gradient is wanted of: an adapter's base. They are rounded once, with a scale for every output
channel, and serve teacher, student and the gradient of activations alike. Activations and gradients are rounded as they
come, with a scale for every token. Products leave in bfloat16.

Why not torchao: its float8 training is made for weights that change. It rounds each of them again in every forward and
every backward pass, and multiplies out their gradient too unless it is compiled. Its float8 inference rounds once, and
has no gradient.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsekv.errors import UserError, gist, require

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max
TINY = 1e-30  # in place of a row's largest number where that is 0: a token without loss has no gradient
MULTIPLE = 16  # of both sizes of a weight, for the GPU's kernels
CAPABILITY = (8, 9)  # Ada; Hopper is 9.0


def use_float8(model: PreTrainedModel) -> None:
    """Let the decoder's frozen linear layers compute in float8, in place; the others stay as they are.

    Their own weights stay too, under their names in the state dict. The copies in float8 are made now and follow no
    later change; they take two bytes a parameter, as much as weights in bfloat16.

    Parameters
    ----------
    model : PreTrainedModel
        Without the adapter's wrapper; its layers may hold an adapter. On its GPU already.

    Raises
    ------
    UserError
        If this machine's GPU cannot, the model is spread over devices, or no layer can be converted.
    """
    places = getattr(model, "hf_device_map", None) or {}
    require(len(set(places.values())) <= 1, "--float8: the model is spread over devices; drop --device_map")
    _check_device(model.device)
    layers: list[Any] = [module for module in model.get_decoder().modules() if _fits(module)]
    kind = type(model).__name__
    require(bool(layers), f"--float8: {kind} has no frozen linear layer with sizes that are multiples of {MULTIPLE}")
    for layer in layers:
        layer.__class__ = FrozenLinear
        layer.float8 = float8_weight(layer.weight)  # in no buffer: DDP sends those at every step


def drop_float8(model: nn.Module) -> None:
    """Undo `use_float8`."""
    layers: list[Any] = [module for module in model.modules() if isinstance(module, FrozenLinear)]
    for layer in layers:
        del layer.float8
        layer.__class__ = nn.Linear


class Float8Weight(NamedTuple):
    """A weight [N, K] ≈ scaleᵀ · rows, in both layouts: kernels want the dimension that is summed last."""

    rows: Tensor  # Float8[N, K]
    columns: Tensor  # Float8[K, N], the same numbers
    scale: Tensor  # Float32[1, N]


class FrozenLinear(nn.Linear):
    """A linear layer whose weight gets no gradient and is multiplied in float8."""

    float8: Float8Weight

    def forward(self, input: Tensor) -> Tensor:
        """[…, K] → […, N], in the dtype that autocast asks for, or else the input's."""
        device = input.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
        rows = input.reshape(-1, input.shape[-1]).to(torch.bfloat16)
        output = FrozenProduct.apply(rows, *self.float8).reshape(*input.shape[:-1], -1).to(dtype)
        return output if self.bias is None else output + self.bias.to(dtype)


class FrozenProduct(torch.autograd.Function):
    """BFloat16[M, K], and the fields of a Float8Weight → BFloat16[M, N], with a gradient for the first of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, columns: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(columns, scale)
        return _product(x, rows, scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        columns, scale = ctx.saved_tensors
        # The weight's scales belong to the dimension that is summed here: they go into the other factor.
        return _product(gradient * scale, columns, scale.new_ones(1, len(columns))), None, None, None


def float8_weight(weight: Tensor) -> Float8Weight:
    """A weight [N, K], rounded."""
    rows, scale = _rounded(weight.detach())
    return Float8Weight(rows, rows.t().contiguous(), scale.reshape(1, -1))


def _product(x: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
    """BFloat16[M, N]: x, Float[M, K], times Float8[N, K] with its scales, transposed."""
    x, x_scale = _rounded(x)  # fast: sums of 14 bits or so on Hopper, where 24 are slow
    return torch._scaled_mm(x, rows.t(), x_scale, scale, out_dtype=torch.bfloat16, use_fast_accum=True)


def _rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Float[M, K] → Float8[M, K] and Float32[M, 1], of which it is the product; LARGEST is the largest of every row."""
    x = x.float().contiguous()
    scale = x.abs().amax(-1, keepdim=True).clamp(min=TINY) / LARGEST
    return (x / scale).to(FLOAT8), scale


def _fits(module: nn.Module) -> bool:
    """Whether a module is a plain linear layer, frozen, of sizes that the kernels take."""
    if type(module) is not nn.Linear or module.weight.requires_grad:
        return False
    return all(size % MULTIPLE == 0 for size in module.weight.shape)


def _check_device(device: torch.device) -> None:
    needed = "needs a GPU of compute capability {}.{} or above (Ada, Hopper or later)".format(*CAPABILITY)
    require(device.type == "cuda", f"--float8: {needed}; the model is on the {device.type.upper()}")
    found = torch.cuda.get_device_capability(device)
    require(found >= CAPABILITY, f"--float8: {needed}; this one has {found[0]}.{found[1]}")
    ones = torch.ones(MULTIPLE, MULTIPLE, dtype=torch.bfloat16, device=device)
    try:
        FrozenProduct.apply(ones, *float8_weight(ones))
    except RuntimeError as error:  # an older torch or CUDA, another maker's GPU
        raise UserError(f"--float8: torch cannot multiply float8 here: {gist(error)}") from error
