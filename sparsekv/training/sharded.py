"""Weights that FSDP2 divides among GPUs: asked for one module ahead."""

import itertools
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


def gather_ahead(decoder: nn.Module) -> None:
    """Let each part of `decoder` that FSDP2 divides ask for the weights of the next one before it computes.

    By itself FSDP2 asks for a layer's weights when the processor comes to that layer. Where the processor is hardly
    ahead of the GPU, as in a compiled step, the GPU then waits for them. What is held at a time grows by one layer.
    Backward passes ask ahead without this. Modules that are not divided stay as they are.
    """
    parts = [module for module in decoder.modules() if isinstance(module, FSDPModule)]
    for part, following in itertools.pairwise(parts):
        part.set_modules_to_forward_prefetch([following])


class GatherAheadCallback(TrainerCallback):
    """Calls `gather_ahead` once the model is divided, which is when training begins."""

    def __init__(self, decoder: nn.Module) -> None:
        self.decoder = decoder

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        gather_ahead(self.decoder)
