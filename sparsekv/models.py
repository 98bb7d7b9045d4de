"""Loading base models, adapters and tokenizers, and merging an adapter into its base.

Whatever cannot be loaded ends in one line that names the flag; weights are read from safetensors only.
"""

import json
import warnings
from collections.abc import Iterator, Sequence
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
from peft import PEFT_TYPE_TO_TUNER_MAPPING, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from sparsekv.demo_model import DEMO_MODEL, demo_model_folder, demo_model_place
from sparsekv.errors import UserError, require
from sparsekv.files import check_new, new_folder

DTYPES = ("float32", "bfloat16", "float16")
PLACEMENTS = ("auto", "balanced", "balanced_low_0", "sequential")  # accelerate's ways to spread a model
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
READ = {  # what each is made of
    AutoConfig: "config.json",
    AutoTokenizer: "config.json, tokenizer.json and tokenizer_config.json",
    AutoModelForCausalLM: "config.json and generation_config.json",
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
    return model


def attach_lora(
    model: PreTrainedModel, r: int, alpha: float, target_modules: Sequence[str], dropout: float = 0.0
) -> PeftModel:
    """Wrap `model` with a fresh LoRA adapter on the linear layers named in `target_modules` (e.g. ``q_proj``).

    Raises
    ------
    UserError
        `r` below 1, or a target that matches no linear layer; the message lists those that exist.
    """
    if r < 1:
        raise UserError(f"--lora_r {r}: must be at least 1")
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    unknown = [t for t in target_modules if not any(f".{name}".endswith(f".{t}") for name in linear)]
    if unknown or not target_modules:
        exist = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linear}))
        given, wrong = (" ".join(unknown), "no such layer in this model") if unknown else ("[]", "name a layer")
        raise UserError(f"--lora_targets {given}: {wrong}; it has {exist}")
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=r,
        lora_alpha=alpha,  # type: ignore[arg-type]  # only ever divided by r
        target_modules=list(target_modules),
        lora_dropout=dropout,
    )
    return get_peft_model(model, config)


def load_adapter(
    model: PreTrainedModel, adapter: str | Path, flag: str = "--adapter", is_trainable: bool = False
) -> PeftModel:
    """Wrap `model` with the trained adapter in folder `adapter`, which `flag` led to; frozen unless `is_trainable`.

    Raises
    ------
    UserError
        No adapter there, one that adds tokens instead of weights, or one that was trained on another base: every
        weight must find its place.
    """
    adapter_settings(adapter, flag)
    saved = _weight_names(Path(adapter), flag)
    unfit = f"{flag} {adapter}: does not fit {_as_typed(str(model.name_or_path))}"
    try:
        wrapped = PeftModel.from_pretrained(model, str(adapter), is_trainable=is_trainable)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{unfit}: {_gist(error)}") from error
    except Exception as error:  # whatever peft may raise for an option of another type than it expects
        raise UserError(f"{flag} {adapter}: {ADAPTER_CONFIG} cannot be used ({_named(error)})") from error
    if stray := saved ^ set(get_peft_model_state_dict(wrapped)):  # peft itself ignores both kinds
        raise UserError(f"{unfit}: only one of them has {min(stray)}")
    return wrapped


def load_merged(model: PreTrainedModel, adapter: str | Path) -> PreTrainedModel:
    """`model` with the trained adapter in folder `adapter` merged into its weights.

    Embeddings that are one weight become two where the adapter changes one of them.

    Raises
    ------
    UserError
        As `load_adapter`; or a kind of adapter whose weights depend on the text.
    """
    wrapped: Any = load_adapter(model, adapter)
    _untie_adapted(model)
    try:
        return wrapped.merge_and_unload()
    except (RuntimeError, ValueError) as error:
        raise UserError(f"--adapter {adapter}: cannot be merged into its base: {_gist(error)}") from error


def _untie_adapted(model: PreTrainedModel) -> None:
    """Give the output embeddings a weight of their own where merging an adapter would change that of both."""
    ends: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    adapted = any(isinstance(end, BaseTunerLayer) for end in ends)
    head = getattr(ends[1], "base_layer", ends[1])
    if adapted and head.weight is getattr(ends[0], "base_layer", ends[0]).weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = False


def adapter_settings(adapter: str | Path, flag: str = "--adapter") -> dict[str, Any]:
    """What adapter_config.json says; raise UserError unless it is of an adapter that merges, with weights beside it."""
    for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        require((Path(adapter) / file).is_file(), f"{flag} {adapter}: this folder holds no adapter (no {file})")
    try:
        config = json.loads((Path(adapter) / ADAPTER_CONFIG).read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {adapter}: {ADAPTER_CONFIG} cannot be read ({_gist(error)})") from error
    kind: Any = config.get("peft_type") if isinstance(config, dict) else None
    known = kind in list(PEFT_TYPE_TO_TUNER_MAPPING)  # a list, for `kind` may be anything
    require(known, f"{flag} {adapter}: {ADAPTER_CONFIG} has peft_type {kind}; it must be one of peft's, as LORA is")
    merges = hasattr(PEFT_TYPE_TO_TUNER_MAPPING[kind], "merge_and_unload")
    require(merges, f"{flag} {adapter}: adds tokens, not weights ({kind}); give one that can be merged, as LORA is")
    return config


def _weight_names(adapter: Path, flag: str) -> set[str]:
    try:
        with safe_open(adapter / ADAPTER_WEIGHTS, "pt") as weights:
            return set(weights.keys())
    except (OSError, SafetensorError) as error:
        raise UserError(f"{flag} {adapter}: {ADAPTER_WEIGHTS} cannot be read ({_gist(error)})") from error


def check_adapter(config: PreTrainedConfig, adapter: str | Path, trust_remote_code: bool = False) -> None:
    """Raise as `load_adapter` does, without the model's weights.

    Parameters
    ----------
    config : PreTrainedConfig
        Of the base.
    """
    with torch.device("meta"), _one_line(_as_typed(str(config.name_or_path)), READ[AutoConfig]):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: nothing is copied into a model without weights
        load_adapter(model, adapter)


def merge_adapter(model_name: str, adapter: str | Path, output_dir: str | Path) -> None:
    """Write base + adapter as one plain model with its tokenizer to `output_dir`, in the base's dtype.

    The folder is written beside its place and moved there whole. Logits equal those of the adapted model up to the
    rounding of the merged weights to that dtype.

    Raises
    ------
    UserError
        The adapter does not fit, or `output_dir` holds something or cannot be written.
    """
    check_new(Path(output_dir))
    merged = load_merged(load_model(model_name), adapter)
    tokenizer = load_tokenizer(model_name)
    with new_folder(Path(output_dir)) as folder:
        save_model(merged, folder, model_name)
        tokenizer.save_pretrained(folder)


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
        raise UserError(f"--model {name}: {_gist(error)}") from error
    except Exception as error:  # whatever transformers may raise for JSON that holds something else than it expects
        raise UserError(f"--model {name}: cannot be loaded ({_named(error)}); look at its {files}") from error


def _as_typed(source: str) -> str:
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


def _gist(error: Exception) -> str:
    """First line of the message that is no heading, without its final period, 200 characters at most."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if not line.endswith(":")), type(error).__name__).rstrip(".")[:200]


def _named(error: Exception) -> str:
    """With its type, for a message that was not written for users."""
    return f"{type(error).__name__}: {_gist(error)}"
