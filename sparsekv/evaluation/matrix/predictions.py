"""What a finished cell says: every prediction with its scores, and what it cost."""

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sparsekv.evaluation.benchmarks.schema import Benchmark
from sparsekv.evaluation.comparison.results import CONTEXT, SCORE
from sparsekv.version import commit, versions

PACKAGES = ("torch", "transformers", "kvpress")


def predicted_rows(benchmark: Benchmark, records: Sequence[Mapping[str, Any]], ratio: float) -> list[dict[str, Any]]:
    """The benchmark's rows with their predictions, as its scorers take them; one for each journal record."""
    return [
        {
            **benchmark.rows[record["row"]],
            **{name: record[name] for name in ("row", "generation", "nll", "kl")},
            "predicted_answer": record["text"] or "",
            "compression_ratio": ratio,
        }
        for record in records
    ]


def predictions_csv(benchmark: Benchmark, rows: Sequence[Mapping[str, Any]]) -> str:
    """predictions.csv: every column, of the context its number, and one `score:<metric>` for each metric."""
    dropped = {"context", "nll", "kl"}
    table = [
        {name: value for name, value in row.items() if name not in dropped}
        | {CONTEXT: benchmark.contexts[row["row"]]}
        | {f"{SCORE}{metric}": score for metric, score in benchmark.score(row).items()}
        for row in rows
    ]
    columns = list(dict.fromkeys(name for row in table for name in row))
    columns.sort(key=lambda name: name.startswith(SCORE))
    file = io.StringIO()
    # All text in quotes: by itself the csv module leaves a lone carriage return bare.
    writer = csv.DictWriter(file, columns, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    writer.writeheader()
    writer.writerows({name: _plain(value) for name, value in row.items()} for row in table)
    return file.getvalue()


def profile(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """profile.json: bytes of a context's cache on average, seconds and tokens in all, the largest peak of a process."""
    records = list(records)
    tokens = sum(record["num_tokens"] for record in records)
    seconds = {name: sum(record[name] for record in records) for name in ("prefill_seconds", "decode_seconds")}
    kinds = records[0]["kv_bytes"]
    return {
        "kv_bytes": {kind: sum(record["kv_bytes"][kind] for record in records) / len(records) for kind in kinds},
        **seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds["decode_seconds"] if seconds["decode_seconds"] else None,
        "peak_memory_bytes": max(record["peak_memory_bytes"] for record in records),
        "device": ", ".join(sorted({record["device"] for record in records})),
        "rows": len({record["row"] for record in records}),
        "commit": commit(),
        "versions": versions(PACKAGES),
    }


def _plain(value: Any) -> Any:
    """Lists and the like as JSON; the csv module writes the rest."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | tuple | dict) else value
