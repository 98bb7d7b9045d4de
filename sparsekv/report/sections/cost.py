"""What each cell took: bytes of the cache, seconds, tokens a second, peak memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from sparsekv.evaluation.comparison.cell_files import FINISHED
from sparsekv.evaluation.comparison.results import NO_PRESS
from sparsekv.evaluation.comparison.tables import NONE, benchmark_name, cell_name
from sparsekv.report.cells import file_stem
from sparsekv.report.chart import Section, TextTable
from sparsekv.report.collect import Evidence

PROFILE = FINISHED[2]
MIB = 2**20
KINDS = ("full", "requested", "logical", "physical")
INTRO = (
    "Bytes of a context's cache on average: full, as the ratio asks for (requested), as later tokens can attend to "
    "(logical), and as the press's own tensors hold (physical): presses that only mask free nothing. Seconds are "
    "shares of work that cells did together, so they compare cells of one run and not machines."
)
HEADER = ["press, evicted", "run", *(f"{kind} KV (MiB)" for kind in KINDS), "prefill (s)", "decode (s)"]
HEADER += ["tokens a second", "peak memory (MiB)", "device"]


def build(evidence: Evidence) -> Section:
    """A table for each benchmark."""
    tables = list(_tables(evidence))
    missing = "" if tables else "No finished cell here: `sparsekv eval` measures what each takes."
    return Section("cost", "Cost", INTRO if tables else "", tables=tables, missing=missing)


def _tables(evidence: Evidence) -> Iterator[TextTable]:
    cells = [
        {**cell, "run": role}
        for role, run in evidence.runs.items()
        for cell in run.results.cells.to_dict("records")
        if (cell["folder"] / PROFILE).is_file()
    ]
    cells.sort(key=lambda cell: (cell["press"] != NO_PRESS, cell["press"], cell["compression_ratio"]))
    for benchmark, data_dir in sorted({(cell["benchmark"], cell["data_dir"]) for cell in cells}):
        group = [cell for cell in cells if (cell["benchmark"], cell["data_dir"]) == (benchmark, data_dir)]
        files = tuple(cell["folder"] / PROFILE for cell in group)
        title = f"{benchmark_name(group[0])}: memory and speed"
        yield TextTable(
            file_stem("cost", benchmark, data_dir), title, "", files, HEADER, [_row(cell) for cell in group]
        )


def _row(cell: Mapping[str, Any]) -> list[str]:
    profile = json.loads((cell["folder"] / PROFILE).read_text("utf-8"))
    memory = [_number(profile.get("kv_bytes", {}).get(kind), MIB, 2) for kind in KINDS]
    seconds = [_number(profile.get(f"{phase}_seconds"), 1, 1) for phase in ("prefill", "decode")]
    peak = _number(profile.get("peak_memory_bytes"), MIB, 0)
    speed = _number(profile.get("tokens_per_second"), 1, 1)
    return [cell_name(cell), cell["run"], *memory, *seconds, speed, peak, str(profile.get("device", NONE))]


def _number(value: float | None, unit: float, digits: int) -> str:
    return NONE if value is None else f"{value / unit:,.{digits}f}"
