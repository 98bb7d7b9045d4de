"""Any .jsonl or .parquet file with kvpress's columns is a benchmark."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sparsekv.errors import UserError
from sparsekv.evaluation.benchmarks.schema import COLUMNS
from sparsekv.evaluation.benchmarks.scoring.by_column import METRICS
from sparsekv.evaluation.benchmarks.scoring.string_match import clean
from sparsekv.sources import is_text

SUFFIXES = (".jsonl", ".parquet")
AVERAGE = "all tasks"  # what the comparison calls the average over tasks
LONGEST_ANSWER = 2**20  # tokens: no model has more positions to spare


def file_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of the user's file in its order: `COLUMNS`, and ``metric`` where the row has one.

    Raises
    ------
    UserError
        Names the file and the line or row: it cannot be read, is not UTF-8, not JSON or parquet, is empty, misses a
        column, or holds a value that cannot be used.
    """
    reader = {".jsonl": _read_jsonl, ".parquet": _read_parquet}[path.suffix]
    try:
        rows = [_row(record, f"--benchmark {path}, {place}") for place, record in reader(path)]
    except OSError as error:
        raise UserError(f"--benchmark {path}: it cannot be read ({error.strerror or error})") from error
    if not rows:
        raise UserError(f"--benchmark {path}: the file is empty")
    return rows


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield f"line {number}", json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                byte = f"byte 0x{line[error.start]:02x}"
                raise UserError(f"--benchmark {path}, line {number}: it is not UTF-8 text ({byte})") from error
            except (ValueError, RecursionError) as error:
                reason = getattr(error, "msg", None) or error
                raise UserError(f"--benchmark {path}, line {number}: it is not JSON ({reason})") from error


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        with path.open("rb") as file:
            parquet = pq.ParquetFile(file)
            columns = parquet.schema_arrow.names
            if twice := [name for name in COLUMNS if columns.count(name) > 1]:
                raise UserError(f"--benchmark {path}: it has the column {twice[0]} twice")
            table = parquet.read()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UserError(f"--benchmark {path}: it is not a parquet file") from error
    names = [name for name in (*COLUMNS, "metric") if name in table.column_names]
    try:
        records = table.select(names).to_pylist()
    except UnicodeDecodeError as error:
        raise UserError(f"--benchmark {path}: it holds text that is not UTF-8") from error
    yield from ((f"row {number}", record) for number, record in enumerate(records))


def _row(record: Any, where: str) -> dict[str, Any]:
    """The row of a record, or UserError with the first thing that is wrong."""
    if not isinstance(record, dict):
        raise UserError(f"{where}: it is no object with the columns {', '.join(COLUMNS)}")
    if missing := [column for column in COLUMNS if column not in record]:
        raise UserError(f"{where}: it has no {', '.join(missing)}; a row needs {', '.join(COLUMNS)}")
    row = {column: record[column] for column in COLUMNS}
    if wrong := _wrong(row):
        raise UserError(f"{where}: {wrong}")
    if record.get("metric") is not None:
        row["metric"] = record["metric"]
        if row["metric"] not in list(METRICS):
            raise UserError(f"{where}: metric is {row['metric']!r}; give one of {', '.join(METRICS)}")
    return row


def _wrong(row: Mapping[str, Any]) -> str | None:
    """What is wrong with the values of a row; texts may be empty only where there is nothing to say."""
    for column in ("context", "question", "answer_prefix", "task"):
        value = row[column]
        if not is_text(value):
            return f"{column} is {_short(value)}; it must be Unicode text"
        if not value.strip() and column in ("context", "task"):
            return f"{column} is empty"
    if row["task"] == AVERAGE:
        return f"task is {AVERAGE!r}, which is the name of the average over tasks; give it another"
    accepted = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
    if not accepted or not all(is_text(answer) and clean(answer) for answer in accepted):
        return f"answer is {_short(row['answer'])}; it must be a text or a list of texts, none of them empty"
    tokens = row["max_new_tokens"]
    if not isinstance(tokens, int) or isinstance(tokens, bool) or not 1 <= tokens <= LONGEST_ANSWER:
        return f"max_new_tokens is {_short(tokens)}; it must be a whole number above 0 and at most {LONGEST_ANSWER}"
    return None


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 40 else f"{text[:40]}…"
