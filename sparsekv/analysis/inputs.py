"""All that an analysis is given, loaded and checked before anything is written; only the weights come later."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from sparsekv.adapters import check_adapter
from sparsekv.analysis.config import AnalysisConfig
from sparsekv.analysis.head_statistics import HeadStatistics
from sparsekv.analysis.results import SCHEMA_VERSION
from sparsekv.analysis.samples import SampleFolder
from sparsekv.data import build_datasets, parse_sources
from sparsekv.errors import UserError, require
from sparsekv.files import check_writable, writing
from sparsekv.fingerprint import fingerprint
from sparsekv.models import check_device, check_ids, load_config, load_tokenizer, resolve_model
from sparsekv.version import versions


@dataclass(frozen=True)
class Inputs:
    """What an analysis works with.

    Attributes
    ----------
    tokenizer : PreTrainedTokenizerBase
    rows : Long[n, L]
        Token ids.
    statistics : HeadStatistics
    folder : SampleFolder
    """

    tokenizer: PreTrainedTokenizerBase
    rows: Tensor
    statistics: HeadStatistics
    folder: SampleFolder


def prepare(config: AnalysisConfig) -> Inputs:
    """Check what can be checked without the weights. Writes nothing.

    Raises
    ------
    UserError
        A model, adapter, device or data that cannot work, rows that are too long for the model, a folder that cannot
        be written or holds another analysis.
    """
    out = Path(config.output_dir)
    with writing(out):  # a path that is too long cannot even be looked up
        check_writable(out, "--output_dir")
    check_device(device(config), "--device")
    model_config = load_config(config.model, config.trust_remote_code)
    positions = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    fits = positions is None or config.max_len <= positions
    require(fits, f"--max_len {config.max_len}: {config.model} has {positions} positions")
    if config.adapter is not None:
        check_adapter(model_config, config.adapter, config.trust_remote_code)
    tokenizer = load_tokenizer(config.model, config.trust_remote_code)
    rows, data_fingerprint = _rows(config, tokenizer)
    check_ids(rows, model_config, config.model)
    statistics = HeadStatistics(config.max_len, config.anchors)
    described = _describe(config, model_config) | {
        "data_fingerprint": data_fingerprint,
        "figures": list(statistics.names),
    }
    folder = SampleFolder(out, described)
    folder.check()
    return Inputs(tokenizer, rows, statistics, folder)


def device(config: AnalysisConfig) -> str:
    """The device asked for, or a GPU if there is one."""
    return config.device or ("cuda" if torch.cuda.is_available() else "cpu")


def _rows(config: AnalysisConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, str]:
    """Long[n, L] and their fingerprint: rows as training makes them, none of them held out."""
    sources = parse_sources(config.data)
    try:
        rows, _, found = build_datasets(
            sources, tokenizer, config.max_len, config.num_samples, 0, config.seed, config.data_subset
        )
    except UserError as error:  # which speaks of the option as training has it
        raise UserError(str(error).replace("--max_seq_len", "--max_len")) from error
    return torch.tensor(rows[:]["input_ids"]), found


def _describe(config: AnalysisConfig, model_config: PreTrainedConfig) -> dict[str, Any]:
    """All that decides the figures, except the rows: options under their own names."""
    source = Path(resolve_model(config.model))
    commit = str(getattr(model_config, "_commit_hash", None))  # of a model from the Hub
    options = ("model", "adapter", "data", "data_subset", "num_samples", "max_len", "seed", "dtype", "runs")
    return {
        "schema_version": SCHEMA_VERSION,
        **{name: getattr(config, name) for name in options},
        "anchors": asdict(config.anchors),
        "model_fingerprint": fingerprint(source) if source.is_dir() else commit,
        "adapter_fingerprint": None if config.adapter is None else fingerprint(Path(config.adapter)),
        "versions": versions(("torch", "transformers")),
    }
