"""Two-layer random models of every family, and a tokenizer that fits them: made in memory in milliseconds."""

import copy
import itertools
import json
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from sparsekv.training.anchor import AnchorConfig
from sparsekv.training.config import TrainConfig

VOCAB_SIZE = 320
SPECIALS = ["<|pad|>", "<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|eos|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8, "query_pre_attn_scalar": 16},
    ),
}


def make_tiny(name: str, **changes) -> PreTrainedModel:
    """A model of the family `name` with the same random weights at every call: float32, SDPA, eval mode."""
    model_class, config_class, options = FAMILIES[name]
    config = config_class(**{**SHAPE, **options, **changes}, attn_implementation="sdpa")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model_class(config).to(torch.float32).eval()


def make_sharp(name: str, **changes) -> PreTrainedModel:
    """A tiny model whose attention is far from even, and whose values differ in length."""
    model = make_tiny(name, **changes)
    with torch.no_grad():
        for layer in model.get_decoder().layers:
            normed = hasattr(layer.self_attn, "q_norm")
            sharpened = layer.self_attn.q_norm if normed else layer.self_attn.q_proj
            sharpened.weight *= 6 if normed else 200
            layer.self_attn.v_proj.weight[:, :20] *= 10
    return model


def attend_as_ever(attention: nn.Module) -> None:
    """Let a layer attend by SDPA, whatever its model is told."""
    config = copy.deepcopy(attention.config)

    class Fixed(type(config)):
        _attn_implementation = property(lambda self: "sdpa", lambda self, name: None)

    config.__class__ = Fixed
    attention.config = config


def make_tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of `VOCAB_SIZE` ids, learned from the language reference that CPython carries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(itertools.islice(topics.values(), 20), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIALS[0],
        bos_token=SPECIALS[1],
        eos_token=SPECIALS[2],
        extra_special_tokens=SPECIALS[3:],
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def logits(model) -> torch.Tensor:
    """[2, 40, V]: what a tiny model says to two fixed rows."""
    ids = torch.randint(0, VOCAB_SIZE, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.eval()(ids).logits


def save_tiny(folder: Path, name: str = "llama", **changes) -> str:
    """Save a tiny model and its tokenizer as a model folder; returns the folder's name."""
    make_tiny(name, **changes).save_pretrained(folder)
    make_tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def save_with_ends(folder: Path, text: str) -> str:
    """As `save_tiny`; the tokens of a text are ends of a turn that only the generation configuration names."""
    save_tiny(folder)
    ends = make_tiny_tokenizer().encode(text, add_special_tokens=False)
    GenerationConfig(bos_token_id=1, eos_token_id=[2, *ends], pad_token_id=0).save_pretrained(folder)
    return str(folder)


def run_options(folder: Path) -> dict:
    """Options of a training run of a second, on a tiny model and text that are saved to `folder`."""
    documents = [text[:3000] for text in itertools.islice(topics.values(), 60)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), "utf-8")
    return {
        "model": save_tiny(folder / "base"),
        "data": str(folder / "text.jsonl"),
        "max_seq_len": 48,
        "num_train_samples": 16,
        "num_validation_samples": 4,
        "max_steps": 4,
        "batch_size": 2,
        "grad_accum": 2,
        "lr": 0.01,
        "lr_warmup_fraction": 0.0,
        "lora_r": 4,
        "lora_alpha": 8,
        "save_steps": 2,
        "eval_steps": 2,
        "logging_steps": 1,
        "device_map": "cpu",
        "anchors": {"sink_size": 2, "recent_size": 4},
    }


def train_config(options: dict, output_dir: Path, **changes) -> TrainConfig:
    """The options with changes, as `sparsekv.training.run.train` takes them."""
    values = {**options, "output_dir": str(output_dir), **changes}
    return TrainConfig(**{**values, "anchors": AnchorConfig(**values["anchors"])})


def as_flags(options: dict) -> list[str]:
    """The same options as arguments of `sparsekv train`."""
    flat = {name: value for name, value in options.items() if name != "anchors"}
    flat |= {f"anchors.{name}": value for name, value in options.get("anchors", {}).items()}
    return [text for name, value in flat.items() for text in (f"--{name}", str(value))]


def messages(stderr: str) -> list[str]:
    """The lines written to stderr besides progress bars."""
    return [line for line in stderr.splitlines() if line.strip() and "it/s]" not in line and "s/it]" not in line]
