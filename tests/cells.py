"""Finished cell folders as `sparsekv eval` leaves them, without a model."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml


def write_cell(
    out: Path,
    press: str,
    ratio: float,
    scores: Mapping[str, Sequence[Any]],
    *,
    data: tuple[str, Any] = ("ruler-local", 4096),
    model: str = "tiny",
    adapter: str | None = None,
    metrics: Sequence[str] = ("string_match",),
    answer: str = 'a\n"b", c',
    contexts: Sequence[int] = (),
    **settings: Any,
) -> Path:
    """A cell whose rows are numbered through `scores`, task by task.

    Parameters
    ----------
    scores : mapping
        Task → for each row its score; or a list of scores, one a generation; or a dict of scores by metric.
    answer : str
        What was predicted for every row.
    contexts : sequence of int
        For each row the number of its context; without, the file says none, as those of before did.
    """
    parts = (data[0], data[1], model, press.replace(":", "_"), f"{ratio:.2f}")
    folder = out / "__".join(str(part) for part in parts if part)
    folder.mkdir(parents=True)
    common = {"model": model, "adapter": adapter, "benchmark": data[0], "benchmark_fingerprint": "f", "seed": 0}
    common |= {"num_samples": None, "query_aware": False, "lower_is_better": ["nll", "kl"]}
    config = {"dataset": data[0], "data_dir": data[1], "model": model, "press_name": press, "compression_ratio": ratio}
    config["sparsekv"] = common | settings
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    flat = [(task, score) for task, group in scores.items() for score in group]
    columns = ["row", "generation", "task", "predicted_answer", *(["context"] if contexts else [])]
    columns += [f"score:{name}" for name in metrics]
    with (folder / "predictions.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, columns)
        table.writeheader()
        for row, (task, given) in enumerate(flat):
            for generation, score in enumerate(given if isinstance(given, list) else [given]):
                by_metric = score if isinstance(score, dict) else {metrics[0]: score}
                named = {f"score:{name}": value for name, value in by_metric.items()}
                named |= {"context": contexts[row]} if contexts else {}
                table.writerow(dict(zip(columns, (row, generation, task, answer), strict=False)) | named)
    (folder / "metrics.json").write_text("{}")
    (folder / "profile.json").write_text(json.dumps({"commit": "abc1234"}))
    return folder
