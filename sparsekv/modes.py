"""Switching modules of a model, and seeding one device: what torch and peft do, in a hundredth of their time.

`eval()`, `train()` and `disable_adapter()` walk through thousands of modules, and the GPU has nothing to do meanwhile.
"""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn

ADAPTER_SWITCH = "_disable_adapters"  # peft's, in every module that holds an adapter


@contextlib.contextmanager
def switched(modules: Iterable[nn.Module], attribute: str, value: bool) -> Iterator[None]:
    """Inside, the attribute has this value in each of these modules."""
    changed = [module for module in modules if getattr(module, attribute) is not value]
    try:
        for module in changed:
            object.__setattr__(module, attribute, value)  # past nn.Module's, which looks for parameters first
        yield
    finally:
        for module in changed:
            object.__setattr__(module, attribute, not value)


@contextlib.contextmanager
def training_already(model: nn.Module, base: nn.Module) -> Iterator[None]:
    """Inside, `model.train()` does nothing where both are training; the Trainer calls it in every micro-batch.

    `base` is the model inside of adapters and wrappers, which begin in training mode around a base that does not.
    """
    if not (model.training and base.training):
        yield
        return
    object.__setattr__(model, "train", lambda mode=True: model if mode else type(model).train(model, False))
    try:
        yield
    finally:
        object.__delattr__(model, "train")


def seed_device(device: torch.device, seed: int) -> None:
    """As `torch.manual_seed` for the CPU and one device: that goes through every kind of device, and all of each."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)
