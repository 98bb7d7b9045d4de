"""The models that benchmarks run: the demo model, or an 8B's shape, whose speed does not depend on its weights."""

import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from sparsekv.models import load_model

SHAPES = ("smollm2-135m", "qwen3-8b")
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


def make_model(shape: str, dtype: str, device: str) -> PreTrainedModel:
    """The demo model, or Qwen3-8B's shape with random weights made on the device."""
    if shape == "smollm2-135m":
        return load_model(shape, dtype, device)
    torch.set_default_dtype(getattr(torch, dtype))
    with torch.device(device):
        model = Qwen3ForCausalLM(Qwen3Config(**QWEN3_8B))
    torch.set_default_dtype(torch.float32)
    return model.eval()
