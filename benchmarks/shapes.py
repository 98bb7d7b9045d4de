"""The models that benchmarks run: the demo model, or a shape with random weights, on which speed does not depend."""

import copy

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from sparsekv.models import load_model, load_tokenizer

QWEN3_8B = {
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "intermediate_size": 12_288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "eos_token_id": None,  # random weights would stop anywhere
}
QWEN3_32B = QWEN3_8B | {
    "hidden_size": 5120,
    "intermediate_size": 25_600,
    "num_hidden_layers": 64,
    "num_attention_heads": 64,
}
TINY = QWEN3_8B | {  # does it run at all?
    "vocab_size": 49_152,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
RANDOM = {"qwen3-8b": QWEN3_8B, "qwen3-32b": QWEN3_32B, "tiny": TINY}
SHAPES = ("smollm2-135m", *RANDOM)


def make_model(shape: str, dtype: str, device: str, sharded: bool = False) -> PreTrainedModel:
    """The demo model, or Qwen3 in a shape with random weights made on the device, the same in every layer.

    With `sharded` all layers of a shape share their memory, until FSDP gives each its own when it divides them: so a
    model can be made on a GPU that it does not fit, and it is the same model.
    """
    if shape == "smollm2-135m":
        return load_model(shape, dtype, device)
    torch.set_default_dtype(getattr(torch, dtype))
    with torch.device(device):
        model = Qwen3ForCausalLM(Qwen3Config(**RANDOM[shape] | {"num_hidden_layers": 1}))
    torch.set_default_dtype(torch.float32)
    repeat_layer(model, RANDOM[shape]["num_hidden_layers"], sharded)
    return model.eval()


def repeat_layer(model: PreTrainedModel, count: int, shared: bool) -> None:
    """Make one decoder layer `count` layers, of copies of its weights or of the same memory.

    All have the model's configuration, as in any model of transformers: it says by which function they attend.
    """
    first, layers = model.get_decoder().layers[0], model.get_decoder().layers
    for number in range(1, count):
        weights = {id(w): nn.Parameter(w.data if shared else w.data.clone()) for w in first.parameters()}
        instead = {**weights, id(model.config): model.config}  # of what the first layer has
        layers.append(copy.deepcopy(first, instead))
        layers[number].self_attn.layer_idx = number
    model.config.num_hidden_layers = count
    model.config.layer_types *= count


def make_tokenizer(shape: str) -> PreTrainedTokenizerBase:
    """The demo model's, or words that stand for nothing: no benchmark of a shape needs a file."""
    if shape == "smollm2-135m":
        return load_tokenizer(shape)
    words = WordLevel({f"w{number}": number for number in range(1000)}, unk_token="w0")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="w2", pad_token="w0")
