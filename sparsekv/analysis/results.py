"""The files that an analysis leaves, and their reader."""

import json
from pathlib import Path
from typing import Any

import pandas as pd

from sparsekv.errors import UserError, require

SCHEMA_VERSION = 1
NEEDED = {  # by whoever reads it
    *("model", "adapter", "runs", "num_samples", "max_len", "anchors", "token_shares"),
    *("overall", "layers", "difference", "recommendation"),
}


def load_analysis(path: Path) -> dict[str, Any]:
    """The content of an `attention_analysis.json`.

    Raises
    ------
    UserError
        Names the file: corrupt, or of another version of the schema.
    """
    try:
        analysis = json.loads(path.read_text("utf-8"))
        version = analysis["schema_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: corrupt or no analysis; run `sparsekv analyze` again to write it anew") from error
    wanted = f"{path}: its schema_version is {version!r}, and this version of sparsekv reads {SCHEMA_VERSION}"
    require(version == SCHEMA_VERSION, f"{wanted}; run `sparsekv analyze` again")
    lacking = sorted(NEEDED - analysis.keys())
    require(not lacking, f"{path}: corrupt (no {', '.join(lacking)}); run `sparsekv analyze` again to write it anew")
    return analysis


def load_heads(path: Path) -> pd.DataFrame:
    """The table of an `attention_analysis.parquet`: columns run, layer, head, figure, mean, low, high.

    Raises
    ------
    UserError
        Names the file when it cannot be read.
    """
    try:
        return pd.read_parquet(path, columns=["run", "layer", "head", "figure", "mean", "low", "high"])
    except (OSError, ValueError, KeyError) as error:  # pyarrow's errors are kinds of these
        raise UserError(f"{path}: corrupt or missing; run `sparsekv analyze` again to write it anew") from error
