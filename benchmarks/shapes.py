"""The models that benchmarks run: the demo model, or a shape with random weights, on which speed does not depend."""

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from sparsekv.models import load_model, load_tokenizer

SHAPES = ("smollm2-135m", "qwen3-8b", "tiny")
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
TINY = QWEN3_8B | {  # does it run at all?
    "vocab_size": 49_152,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def make_model(shape: str, dtype: str, device: str) -> PreTrainedModel:
    """The demo model, or Qwen3 in a shape with random weights made on the device."""
    if shape == "smollm2-135m":
        return load_model(shape, dtype, device)
    torch.set_default_dtype(getattr(torch, dtype))
    with torch.device(device):
        model = Qwen3ForCausalLM(Qwen3Config(**(TINY if shape == "tiny" else QWEN3_8B)))
    torch.set_default_dtype(torch.float32)
    return model.eval()


def make_tokenizer(shape: str) -> PreTrainedTokenizerBase:
    """The demo model's, or words that stand for nothing: no benchmark of a shape needs a file."""
    if shape == "smollm2-135m":
        return load_tokenizer(shape)
    words = WordLevel({f"w{number}": number for number in range(1000)}, unk_token="w0")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="w2", pad_token="w0")
