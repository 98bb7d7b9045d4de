"""Adapters: a new one, a trained one on its base, and one that is merged into it.

Whatever cannot be loaded ends in one line that names the flag; weights are read from safetensors only.
"""

import json
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PEFT_TYPE_TO_TUNER_MAPPING, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sparsekv.errors import UserError, gist, named_gist, require
from sparsekv.files import FINAL, RUN_CONFIG, check_new, new_folder
from sparsekv.models import (
    ADAPTER_CONFIG,
    as_typed,
    load_model,
    load_tokenizer,
    model_fingerprint,
    model_without_weights,
    save_model,
)

ADAPTER_WEIGHTS = "adapter_model.safetensors"

logger = logging.getLogger(__name__)


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
    _warn_of_another_base(model, Path(adapter), flag)
    unfit = f"{flag} {adapter}: does not fit {as_typed(str(model.name_or_path))}"
    try:
        wrapped = PeftModel.from_pretrained(model, str(adapter), is_trainable=is_trainable)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{unfit}: {gist(error)}") from error
    except Exception as error:  # whatever peft may raise for an option of another type than it expects
        raise UserError(f"{flag} {adapter}: {ADAPTER_CONFIG} cannot be used ({named_gist(error)})") from error
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
        raise UserError(f"--adapter {adapter}: cannot be merged into its base: {gist(error)}") from error


def check_adapter(config: PreTrainedConfig, adapter: str | Path, trust_remote_code: bool = False) -> None:
    """Raise as `load_adapter` does, without the model's weights.

    Parameters
    ----------
    config : PreTrainedConfig
        Of the base.
    """
    model = model_without_weights(config, trust_remote_code)
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


def adapter_settings(adapter: str | Path, flag: str = "--adapter") -> dict[str, Any]:
    """What adapter_config.json says; raise UserError unless it is of an adapter that merges, with weights beside it."""
    require(Path(adapter).is_dir(), f"{flag} {adapter}: no such folder; give that of a trained adapter")
    hint = f"; give its {FINAL}/" if (Path(adapter) / FINAL / ADAPTER_CONFIG).is_file() else ""
    for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        require((Path(adapter) / file).is_file(), f"{flag} {adapter}: this folder holds no adapter (no {file}){hint}")
    try:
        config = json.loads((Path(adapter) / ADAPTER_CONFIG).read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {adapter}: {ADAPTER_CONFIG} cannot be read ({gist(error)})") from error
    kind: Any = config.get("peft_type") if isinstance(config, dict) else None
    known = kind in list(PEFT_TYPE_TO_TUNER_MAPPING)  # a list, for `kind` may be anything
    require(known, f"{flag} {adapter}: {ADAPTER_CONFIG} has peft_type {kind}; it must be one of peft's, as LORA is")
    merges = hasattr(PEFT_TYPE_TO_TUNER_MAPPING[kind], "merge_and_unload")
    require(merges, f"{flag} {adapter}: adds tokens, not weights ({kind}); give one that can be merged, as LORA is")
    return config


def _warn_of_another_base(model: PreTrainedModel, adapter: Path, flag: str) -> None:
    """An adapter fits any base of the same shapes; what a run of ours began from, it has recorded."""
    try:
        made_from = json.loads((adapter / RUN_CONFIG).read_bytes())["model_fingerprint"]
    except (OSError, ValueError, LookupError, TypeError):
        return  # of elsewhere, or of an older version
    if model.device.type == "meta":
        return  # to be loaded once more
    here = model_fingerprint(str(model.name_or_path), model.config)
    if len(here) == len(made_from) and here != made_from:  # a commit of the Hub and a folder cannot be compared
        logger.warning("%s %s: was trained from other weights than %s has", flag, adapter, model.name_or_path)


def _weight_names(adapter: Path, flag: str) -> set[str]:
    """Names of its weights; raise UserError where they cannot be read, or one is no number."""
    try:
        with safe_open(adapter / ADAPTER_WEIGHTS, "pt") as weights:
            names = set(weights.keys())
            broken = [name for name in sorted(names) if not weights.get_tensor(name).float().isfinite().all()]
    except (OSError, SafetensorError) as error:
        raise UserError(f"{flag} {adapter}: {ADAPTER_WEIGHTS} cannot be read ({gist(error)})") from error
    if broken:
        raise UserError(f"{flag} {adapter}: {broken[0]} is not finite; give an adapter that has not diverged")
    return names


def _untie_adapted(model: PreTrainedModel) -> None:
    """Give the output embeddings a weight of their own where merging an adapter would change that of both."""
    ends: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    adapted = any(isinstance(end, BaseTunerLayer) for end in ends)
    head = getattr(ends[1], "base_layer", ends[1])
    if adapted and head.weight is getattr(ends[0], "base_layer", ends[0]).weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = False
