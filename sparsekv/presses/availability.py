"""Why a press cannot run here, as far as that shows without running it or asking the network."""

from collections.abc import Iterator
from pathlib import Path

import kvpress
from huggingface_hub import constants
from kvpress import BasePress
from kvpress.presses.duo_attention_press import PATTERNS_DICT
from kvpress.presses.lukv_press import BUDGET_CURVE_URLS
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from sparsekv.presses.parameters import nested
from sparsekv.presses.queries import all_known, reads_queries
from sparsekv.presses.registry import make_press
from sparsekv.presses.without_waiting import asks_layers


def why_not(press: str | BasePress, model: PreTrainedModel) -> str | None:
    """One line that says why this press cannot run on this model and machine; None where nothing is known against it.

    A press is given as `--presses` takes it, or as it is, and then called by its type. Files that it takes from a hub
    count as missing when they are not cached and ``HF_HUB_OFFLINE`` is set.

    Raises
    ------
    UserError
        If there is no such press or parameter.
    """
    name, made = (press, make_press(press, 0.0)) if isinstance(press, str) else (type(press).__name__, press)
    reasons = () if made is None else _reasons(made, model)
    return next((f"{name}: {reason}" for reason in reasons if reason), None)


def _reasons(press: BasePress, model: PreTrainedModel) -> Iterator[str | None]:
    """What each check says, until one says something."""
    yield _missing_queries(press, model)
    for part in nested(press):
        yield _unknown_model(part, model)
        yield _missing_files(part, model)
        yield _adapter_in_the_way(part, model)


def _missing_queries(press: BasePress, model: PreTrainedModel) -> str | None:
    """Presses that make a layer's queries, of a layer that makes them otherwise."""
    if asks_layers(press) or not any(map(reads_queries, nested(press))) or all_known(model):
        return None
    return f"it makes queries or turns keys as Llama does, and {type(model).__name__} does otherwise"


def _unknown_model(press: BasePress, model: PreTrainedModel) -> str | None:
    """Presses with a table of models: they know a model by the name it was loaded by."""
    name = model.config.name_or_path
    if isinstance(press, kvpress.DuoAttentionPress) and not press.on_the_fly_scoring and name not in PATTERNS_DICT:
        return f"no attention pattern is published for {name or 'this model'}, only for {', '.join(PATTERNS_DICT)}"
    if isinstance(press, kvpress.LUKVPress):
        models = [known for known, scorer in BUDGET_CURVE_URLS if scorer == type(press.press).__name__]
        if name not in models:
            return f"no budget curve is published for {name or 'this model'}, only for {', '.join(models)}"
    return None


def _missing_files(press: BasePress, model: PreTrainedModel) -> str | None:
    """Files that the press itself loads."""
    if not constants.HF_HUB_OFFLINE:
        return None
    if isinstance(press, kvpress.DuoAttentionPress | kvpress.LUKVPress) and not _hub_files(press, model):
        return "its data is fetched from GitHub, and HF_HUB_OFFLINE is set"
    for kind, name in _hub_files(press, model):
        if not (name and Path(name).is_dir()) and not _is_cached(kind, name):
            return f"the {kind} {name or 'without a name'} is not cached, and HF_HUB_OFFLINE is set"
    return None


def _hub_files(press: BasePress, model: PreTrainedModel) -> list[tuple[str, str]]:
    """(kind of repository, its id) of what the press loads from the Hugging Face hub."""
    name = model.config.name_or_path or ""
    short = name.split("/")[-1]
    match press:
        case kvpress.QFilterPress():
            return [("model", f"nthngdy/{short.replace('Meta-Llama', 'Llama')}_qfilt")]
        case kvpress.KVzapPress():
            return [("model", f"nvidia/KVzap-{press.model_type}-{short}")]
        case kvpress.FastKVzipPress():
            return [("model", "Jang-Hyun/Fast-KVzip")]
        case kvpress.ExpectedAttentionStatsPress(stats_folder=None):
            data = f"{press.dataset_name}_{press.num_samples}_{press.sample_seq_len}_{press.n_sink}"
            return [("model", f"alessiodevoto/exp_att_stats_{name.replace('/', '_')}_{data.replace('/', '_')}")]
        case kvpress.DuoAttentionPress(on_the_fly_scoring=True):
            return [("dataset", "kmfoda/booksum")]
        case kvpress.RestoreKVPress():
            plus = "_plus" if press.kvzip_plus_normalization else ""
            return [("model", f"higokri/RestoreKV-{short}{plus}"), ("model", name)]
        case kvpress.KVzipPress():  # KVgrad too: the tokenizer, by the model's name
            return [("model", name)]
    return []


def _is_cached(kind: str, name: str) -> bool:
    folder = Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}" / "snapshots"
    return folder.is_dir() and any(folder.iterdir())


def _adapter_in_the_way(press: BasePress, model: PreTrainedModel) -> str | None:
    """RestoreKV loads an adapter of its own and switches every adapter off while the model answers."""
    adapted = any(isinstance(module, BaseTunerLayer) for module in model.modules())
    if isinstance(press, kvpress.RestoreKVPress) and adapted and not getattr(model, "_hf_peft_config_loaded", False):
        return "it switches the model's adapter off; merge the adapter into the model first (sparsekv merge)"
    return None
