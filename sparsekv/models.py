"""Loading base models and their tokenizers, and saving a model.

Whatever cannot be loaded ends in one line that names the flag; weights are read from safetensors only.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sparsekv.demo_model import DEMO_MODEL, demo_model_folder, demo_model_place
from sparsekv.errors import UserError, gist, named_gist
from sparsekv.fingerprint import fingerprint

DTYPES = ("float32", "bfloat16", "float16")
PLACEMENTS = ("auto", "balanced", "balanced_low_0", "sequential")  # accelerate's ways to spread a model
ADAPTER_CONFIG = "adapter_config.json"
READ = {  # what each is made of
    AutoConfig: "config.json",
    AutoTokenizer: "config.json, tokenizer.json and tokenizer_config.json",
    AutoModelForCausalLM: "config.json and generation_config.json",
    GenerationConfig: "config.json and generation_config.json",
}


def resolve_model(name: str) -> str:
    """Local folder or Hub id that `name` stands for.

    Parameters
    ----------
    name : str
        ``smollm2-135m`` (the demo model, fetched on first use), a local folder, or a Hub id.

    Raises
    ------
    UserError
        A folder without a model, or neither a folder nor a possible Hub id. Whether the id exists shows at loading.
    """
    if name == DEMO_MODEL:
        return str(demo_model_folder())
    folder = Path(name).expanduser()
    if folder.is_dir():
        if (folder / "config.json").is_file():
            return str(folder)
        if (folder / ADAPTER_CONFIG).is_file():
            raise UserError(f"--model {name}: this folder holds an adapter; pass the base model it was trained from")
        raise UserError(f"--model {name}: this folder holds no model (no config.json)")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--model {name}: no such folder, and not a Hub id; pass one or {DEMO_MODEL}") from error
    return name


def load_tokenizer(name: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Tokenizer of the model that `name` stands for (see `resolve_model`)."""
    source = resolve_model(name)
    # Without tokenizer files transformers makes up an empty tokenizer.
    if Path(source).is_dir() and not any(Path(source).glob("tokenizer*")):
        raise UserError(f"--model {name}: this folder holds no tokenizer (no tokenizer.json)")
    return _load(AutoTokenizer, name, source, trust_remote_code=trust_remote_code)


def load_config(name: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Configuration of the model that `name` stands for (see `resolve_model`)."""
    return _load(AutoConfig, name, resolve_model(name), trust_remote_code=trust_remote_code)


def load_generation_config(name: str) -> GenerationConfig:
    """Generation settings of the model that `name` stands for (see `resolve_model`), as it has them once loaded."""
    source = _local_if_offline(resolve_model(name))
    with _one_line(name, READ[GenerationConfig]):
        try:
            return GenerationConfig.from_pretrained(source)
        except OSError:  # there is no such file
            return GenerationConfig.from_pretrained(source, config_file_name="config.json")


def load_model(
    name: str, dtype: str = "auto", device_map: str | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Causal LM that `name` stands for (see `resolve_model`), in eval mode.

    Parameters
    ----------
    dtype : {"auto", "float32", "bfloat16", "float16"}
        ``auto`` keeps the one the checkpoint was saved in.
    device_map : str, optional
        A device (``cpu``, ``cuda``, ``cuda:1``) or one of accelerate's placements (``auto``, ``balanced``, …);
        ``None`` loads to the CPU.

    Raises
    ------
    UserError
        Names ``--model``, ``--dtype``, ``--device_map`` or ``--trust_remote_code`` and what is wrong with it.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: choose auto, {', '.join(DTYPES)}")
    check_device(device_map, "--device_map")
    source = resolve_model(name)
    model, report = _load(
        AutoModelForCausalLM,
        name,
        source,
        dtype=dtype,
        device_map=device_map,
        trust_remote_code=trust_remote_code,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reported below, in one line
    )
    unfit = sorted([*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])])
    if unfit:  # transformers fills these with random numbers
        raise UserError(f"--model {name}: {len(unfit)} weights are missing or of another shape, e.g. {unfit[0]}")
    model.name_or_path = source  # adapters name their base by it; a cached snapshot's folder would not do
    _name_head_dim(model.config.get_text_config())
    return model


def _name_head_dim(config: Any) -> None:
    """kvpress's critical presses read it; Qwen2 and Phi-3 leave it out, as it follows from the other two."""
    width, heads = (getattr(config, name, None) for name in ("hidden_size", "num_attention_heads"))
    if getattr(config, "head_dim", None) is None and isinstance(width, int) and isinstance(heads, int):
        config.head_dim = width // heads


def other_layers(config: PreTrainedConfig) -> set[str]:
    """Kinds of a text model's layers beside full attention: sliding_attention, …; no window hides what has a place."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types:
        return {*layer_types} - {"full_attention"}
    window = getattr(config, "sliding_window", None)
    used = getattr(config, "use_sliding_window", True)
    slides = used and window is not None and window < getattr(config, "max_position_embeddings", math.inf)
    return {"sliding_attention"} if slides else set()


def logit_changes(config: PreTrainedConfig) -> list[str]:
    """Settings by which a text model scales or caps its logits after the head; empty where they are its output."""
    names = ("logits_scaling", "logit_scale", "final_logit_softcapping")
    return [name for name in names if getattr(config, name, None) not in (None, 1, 1.0)]


def model_fingerprint(name: str, config: PreTrainedConfig) -> str:
    """Of what a folder holds; of a model from the Hub its commit."""
    source = Path(resolve_model(name))
    return fingerprint(source) if source.is_dir() else str(getattr(config, "_commit_hash", None))


def model_without_weights(config: PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """Causal LM of a configuration, on the meta device; raise UserError for one that no model can be built from."""
    with torch.device("meta"), _one_line(as_typed(str(config.name_or_path)), READ[AutoConfig]):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def save_model(model: PreTrainedModel | PeftModel, folder: Path, name: str) -> None:
    """Write a model, or an adapter, that `--model name` led to.

    Raises
    ------
    UserError
        Its generation settings contradict each other: transformers loads such a model with a warning, and saves none.
    """
    try:
        model.save_pretrained(str(folder))
    except ValueError as error:
        lines = [line for line in str(error).splitlines() if line.startswith("- ")] or str(error).splitlines()
        raise UserError(f"--model {name}: its generation_config.json is not valid ({lines[0]})") from error


def check_ids(ids: Tensor, config: PreTrainedConfig, name: str) -> None:
    """Raise UserError unless `--model name` has an embedding for each of the token ids that occur.

    A tokenizer may know more: tokens that were added to it, and never occur, do no harm.

    Parameters
    ----------
    ids : Long[...]
    config : PreTrainedConfig
        Of the model.
    """
    known = _vocabulary_size(config)
    if known is None or bool((ids < known).all()):
        return
    raise UserError(f"--model {name}: its tokenizer makes token {ids.max()}, and the model knows {known} of them")


def may_make_unknown_ids(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> bool:
    """Whether a tokenizer has a token without an embedding; `check_ids` looks whether one occurs."""
    known = _vocabulary_size(config)
    return known is not None and max(tokenizer.get_vocab().values(), default=0) >= known


def _vocabulary_size(config: PreTrainedConfig) -> int | None:
    return getattr(config.get_text_config(), "vocab_size", None)


def _load(auto_class: Any, name: str, source: str, **options: Any) -> Any:
    """`auto_class.from_pretrained(source)`."""
    with _one_line(name, READ[auto_class]):
        return auto_class.from_pretrained(_local_if_offline(source), **options)


@contextmanager
def _one_line(name: str, files: str) -> Iterator[None]:
    """What is raised inside becomes one line naming `--model`; `files` are those that decide how loading goes."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        if "trust_remote_code" in str(error):
            raise UserError(
                f"--model {name}: runs Python code of its own; read it, then pass --trust_remote_code true"
            ) from error
        raise UserError(f"--model {name}: {gist(error)}") from error
    except Exception as error:  # whatever transformers may raise for JSON that holds something else than it expects
        raise UserError(f"--model {name}: cannot be loaded ({named_gist(error)}); look at its {files}") from error


def as_typed(source: str) -> str:
    """What the user called the model at `source`: not the folder, for the demo model."""
    return DEMO_MODEL if Path(source) == demo_model_place() else source


def _local_if_offline(source: str) -> str:
    """`source`, or its cached copy when the Hub cannot be reached: one request, where transformers retries a minute."""
    if Path(source).is_dir():
        return source
    try:
        HfApi().model_info(source, timeout=10)
        return source
    except RepositoryNotFoundError as error:
        raise UserError(f"--model {source}: no such model on the Hub (or none you may see)") from error
    except (httpx.HTTPError, OfflineModeIsEnabled, HfHubHTTPError):
        pass
    try:
        return snapshot_download(source, local_files_only=True)
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"--model {source}: the Hub cannot be reached and nothing is cached; pass a local folder or {DEMO_MODEL}"
        ) from error


def check_device(device_map: str | None, flag: str) -> None:
    """Raise UserError, naming the flag, unless `device_map` is a placement or a device that exists here."""
    if device_map is None or device_map in PLACEMENTS:
        return
    try:
        device = torch.device(device_map)
    except RuntimeError as error:
        raise UserError(f"{flag} {device_map}: choose cpu, cuda, cuda:N, {', '.join(PLACEMENTS)}") from error
    accelerator = torch.accelerator.current_accelerator() or torch.device("cpu")
    present = torch.accelerator.device_count() if device.type == accelerator.type else 0
    if device.type != "cpu" and (device.index or 0) >= present:
        raise UserError(f"{flag} {device_map}: this machine has {present} such devices; use cpu or auto")
