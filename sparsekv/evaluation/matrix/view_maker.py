"""Makes the view of a benchmark: one short context through every press of the run."""

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from sparsekv.anchors import AnchorConfig, AnchorSelector
from sparsekv.errors import UserError
from sparsekv.evaluation.benchmarks.scoring.rows import answers
from sparsekv.evaluation.comparison.results import benchmark_label
from sparsekv.evaluation.engine.caches import CacheMaker, eager_attention
from sparsekv.evaluation.engine.evicted import EvictedCache
from sparsekv.evaluation.engine.kept import kept_positions
from sparsekv.evaluation.engine.memory import is_out_of_memory
from sparsekv.evaluation.engine.work import FULL_CACHE, Cell, ContextWork
from sparsekv.evaluation.matrix.cells import LOCKS
from sparsekv.evaluation.matrix.jobs import Job
from sparsekv.evaluation.matrix.token_texts import token_texts
from sparsekv.evaluation.matrix.views import (
    SCHEMA_VERSION,
    KeptEntries,
    NotShown,
    View,
    encode_received,
    load_view,
    save_view,
)
from sparsekv.files import writing
from sparsekv.fingerprint import fingerprint_of
from sparsekv.observe import observing, received_attention
from sparsekv.presses import is_decoding, make_press, needs_eager
from sparsekv.presses.parameters import split_spec
from sparsekv.tokens import classify_vocabulary
from sparsekv.version import commit

logger = logging.getLogger(__name__)

VIEWS = "views"
CHARACTERS = 8  # a token, at most on average: a longer text is not even encoded to see whether it fits
AT_ONCE = 16  # cells whose caches are held together


def view_file(job: Job) -> Path:
    """Where the view of a job's benchmark is."""
    return job.out / VIEWS / f"{job.file_name}.json.gz"


def keep_view(job: Job, tokens: int, load: Callable[[], PreTrainedModel], seed: int) -> None:
    """Write the view of a benchmark, unless it is there, no context is short enough, or another process is at it.

    Cells of earlier runs that the view there has are made again, so that it only ever grows.

    Parameters
    ----------
    job : Job
    tokens : int
        Longest context; 0: no view.
    load : callable
        Gives the model; called only when the view has to be made.
    seed : int
        Of presses that draw.
    """
    if not tokens or job.encoder.benchmark.kind != "generate" or _cells_to_show(job, tokens) is None:
        return
    lock = FileLock(job.out / LOCKS / f"{job.file_name}.view.lock")
    with contextlib.suppress(Timeout), lock.acquire(timeout=0):
        cells = _cells_to_show(job, tokens)  # another process may just have made it
        work = _first_that_fits(job, tokens)
        if cells is None or work is None:
            return
        try:
            view = _make_view(load(), job, work, cells, seed, _fingerprint(job, tokens))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            logger.warning("%s: no view for the report, for want of memory; lower --view_tokens", job.name)
            return
        with writing(job.out, "--out"):
            save_view(view_file(job), view)


def _cells_to_show(job: Job, tokens: int) -> list[Cell] | None:
    """The run's cells and those of the view there; None where it has them all and was made from the same."""
    wanted = [cell for cell in job.cells if cell != FULL_CACHE]
    try:
        before = load_view(view_file(job))
    except UserError:
        return wanted
    if before.fingerprint != _fingerprint(job, tokens):
        return wanted
    there: list[KeptEntries | NotShown] = [*before.cells, *before.not_shown]
    shown = [Cell(cell.press, cell.compression_ratio) for cell in there]
    return None if set(wanted) <= set(shown) else list(dict.fromkeys([*wanted, *shown]))


def _fingerprint(job: Job, tokens: int) -> str:
    """Of all that decides a view but for its cells."""
    return fingerprint_of([SCHEMA_VERSION, tokens, job.cells[FULL_CACHE].config])


def _first_that_fits(job: Job, tokens: int) -> ContextWork | None:
    """The first context of the benchmark that has at most so many tokens."""
    encoder = job.encoder
    cut = (encoder.suite.max_context_length or tokens + 1) <= tokens
    for rows in encoder.contexts():
        if cut or len(encoder.benchmark.rows[rows[0]]["context"]) <= CHARACTERS * tokens:
            work = encoder.encode(rows, list(job.cells))
            if work.ids.shape[1] <= tokens:
                return work
    return None


def _make_view(
    model: PreTrainedModel, job: Job, work: ContextWork, cells: Sequence[Cell], seed: int, fingerprint: str
) -> View:
    tokenizer, ids = job.encoder.tokenizer, work.ids
    config = job.cells[FULL_CACHE].config
    number = work.questions[0].row
    row = job.encoder.benchmark.rows[number]
    shown = _show_cells(CacheMaker(model, tokenizer, seed), work, cells, job.unavailable)
    return View(
        benchmark=benchmark_label(config),
        data_dir=str(config["data_dir"] or ""),
        model=config["model"],
        adapter=config["sparsekv"]["adapter"] or "",
        task=row["task"],
        row=number,
        fingerprint=fingerprint,
        commit=commit() or "",
        question=row["question"],
        answer=[str(answer) for answer in answers(row)],
        tokens=token_texts(tokenizer, ids[0].tolist()),
        classes=classify_vocabulary(tokenizer, model.config, "", model.generation_config)[ids[0]].numpy(),
        anchors=AnchorSelector(AnchorConfig(), tokenizer, model.config, model.generation_config)(ids)[0].numpy(),
        received=encode_received(_received(model, ids)),
        cells=[cell for cell in shown if isinstance(cell, KeptEntries)],
        not_shown=[cell for cell in shown if isinstance(cell, NotShown)],
    )


def _show_cells(
    maker: CacheMaker, work: ContextWork, cells: Sequence[Cell], unavailable: Mapping[Cell, str]
) -> list[KeptEntries | NotShown]:
    """Each cell in order; those whose press cannot run here, or hides what it keeps, with the reason."""
    shown: dict[Cell, KeptEntries | NotShown] = {}
    for cell in cells:
        if reason := "it evicts while the answer is written" if is_decoding(cell.press) else unavailable.get(cell):
            shown[cell] = NotShown(cell.press, cell.ratio, reason)
    for eager in (False, True):
        group = [cell for cell in cells if cell not in shown and _is_eager(cell) == eager]
        for start in range(0, len(group), AT_ONCE):
            part = group[start : start + AT_ONCE]
            in_place = {cell: Cell(_in_place(cell.press), cell.ratio) for cell in part}
            with eager_attention(maker.model, eager):  # the full cache too: both come from the same pass
                caches = maker.make(work, list(dict.fromkeys([FULL_CACHE, *in_place.values()])))
            full: Any = caches[FULL_CACHE]
            shown |= {cell: _show(cell, full, caches[other]) for cell, other in in_place.items()}
    return [shown[cell] for cell in cells]


def _is_eager(cell: Cell) -> bool:
    press = make_press(cell.press, cell.ratio)
    return press is not None and needs_eager(press)


def _in_place(spec: str) -> str:
    """The press that keeps the same entries without moving their keys to other positions."""
    name, parameters = split_spec(spec)
    if name == "finch":
        parameters["rerotate_keys"] = "false"
    return ":".join([name.removeprefix("key_rerotation_"), *(f"{key}={value}" for key, value in parameters.items())])


def _show(cell: Cell, full: EvictedCache, evicted: EvictedCache | Exception) -> KeptEntries | NotShown:
    reason: Exception
    if isinstance(evicted, Exception):
        reason = evicted
    else:
        try:
            return KeptEntries(cell.press, cell.ratio, kept_positions(full, evicted).numpy())
        except ValueError as error:
            reason = error
    return NotShown(cell.press, cell.ratio, " ".join(str(reason).split()))


def _received(model: PreTrainedModel, ids: Tensor) -> NDArray[np.float32]:
    """Attention that each context token receives, relative to uniform attention: [layers, G, C], a mean over heads."""
    layers: dict[int, Tensor] = {}

    def receive(layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> None:
        heads = received_attention(query, key, scaling)[0]
        layers[layer] = heads.unflatten(0, (key.shape[1], -1)).mean(1).cpu()

    decoder: Any = model.get_decoder()
    with torch.inference_mode(), observing(model, receive):
        decoder(input_ids=ids.to(model.device), use_cache=False)
    return torch.stack([layers[layer] for layer in sorted(layers)]).numpy()
