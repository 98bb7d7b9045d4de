"""The press × ratio matrix: every context prefilled once, every cell's answers decoded together.

kvpress's pipeline takes one cell and one sample at a time. Here one full-attention prefill serves every prefill press,
and all cells, questions and generations of several contexts are decoded as one padded batch, within a stated budget of
memory. Each answer is the one that kvpress's pipeline gives.
"""

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from kvpress import BasePress
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsekv.errors import UserError
from sparsekv.evaluation.engine.caches import CacheMaker
from sparsekv.evaluation.engine.decode import Row, generate, log_likelihoods
from sparsekv.evaluation.engine.evicted import EvictedCache
from sparsekv.evaluation.engine.memory import GIB, default_budget, held_by_others, is_out_of_memory
from sparsekv.evaluation.engine.model_check import check_model
from sparsekv.evaluation.engine.sampling import Sampler, Sampling
from sparsekv.evaluation.engine.while_decoding import generate_with_press, kept_while_decoding, prefill_for_decoding
from sparsekv.evaluation.engine.work import FULL_CACHE, Answer, Cell, ContextWork, Failure, Question
from sparsekv.observe import check_observable
from sparsekv.presses import is_decoding
from sparsekv.presses.parameters import split_spec

logger = logging.getLogger(__name__)

Batch = Sequence[Answer | Failure]  # what is done together
MAX_ROWS = {"cpu": 64, "cuda": 256}  # beyond, arithmetic is the limit and a larger batch saves nothing


@dataclass(frozen=True)
class _Pending:
    """A row that waits for its batch, and what its Answer will say; `wanted` is False for a mere reference."""

    row: Row
    question: Question
    cell: Cell
    generation: int
    wanted: bool
    kv_bytes: dict[str, float]
    prefill_seconds: float

    def answer(
        self,
        seconds: float,
        num_tokens: int,
        text: str | None = None,
        nll: float | None = None,
        kl: float | None = None,
    ) -> Answer:
        """The row's Answer, after its share of the decoding time."""
        return Answer(
            row=self.question.row,
            cell=self.cell,
            generation=self.generation,
            text=text,
            nll=nll,
            kl=kl,
            num_tokens=num_tokens,
            kv_bytes=self.kv_bytes,
            prefill_seconds=self.prefill_seconds,
            decode_seconds=seconds,
        )


class Engine:
    """Answers every question in every cell.

    Parameters
    ----------
    model : PreTrainedModel
        In eval mode; adapters merged.
    tokenizer : PreTrainedTokenizerBase
    memory_budget : int, optional
        Bytes for caches; by default from what is free now.
    sampling : Sampling, optional
        Greedy by default.

    Raises
    ------
    UserError
        For a model that `check_model` refuses, or whose attention is not its interface's.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        memory_budget: int | None = None,
        sampling: Sampling | None = None,
    ) -> None:
        name = str(model.config.name_or_path)
        check_model(model.config, name)
        check_observable(model, name)
        self.model, self.tokenizer = model, tokenizer
        self.budget = default_budget(model.device) if memory_budget is None else memory_budget
        self.sampling = sampling or Sampling()
        self._sampler = Sampler(self.sampling)
        self._caches = CacheMaker(model, tokenizer, self.sampling.seed)
        self._failed: set[Cell] = set()
        self._warned: set[Cell] = set()
        self._references: dict[int, Tensor] = {}
        stop = model.generation_config.eos_token_id if model.generation_config else None
        self._stop_ids: list[Any] = stop if isinstance(stop, list) else [stop]
        self._max_rows = MAX_ROWS["cuda" if model.device.type == "cuda" else "cpu"]

    def run(self, works: Sequence[ContextWork]) -> Iterator[Batch]:
        """Answer everything, a list for each batch, in whatever order is fast.

        A cell that fails is reported once, and left out from then on.

        Raises
        ------
        UserError
            If memory does not hold even one row.
        """
        pool: list[_Pending] = []
        longest = max((question.max_new_tokens for work in works for question in work.questions), default=0)
        for work in sorted(works, key=lambda work: (work.questions[0].max_new_tokens, work.ids.shape[1])):
            yield from self._answer_while_decoding(work, longest)
            for cells in self._groups(work):
                if pool and not self._has_room(pool, work, cells):
                    yield from self._flush(pool)
                try:
                    yield from self._prefill(work, cells, pool)
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    yield from self._flush(pool)
                    for cell in cells:  # one at a time, with nothing else in memory
                        with self._one_line_without_memory(cell, work.ids.shape[1]):
                            yield from self._prefill(work, [cell], pool)
                        yield from self._flush(pool)
        yield from self._flush(pool)

    # ---- memory ----

    def _groups(self, work: ContextWork) -> list[list[Cell]]:
        """The prefill cells of a context, in groups whose caches fit into half of the budget."""
        groups: list[list[Cell]] = []
        room = 0.0
        for cell in work.cells:
            if is_decoding(cell.press):
                continue
            size = self._full_bytes(work.ids.shape[1]) * (1 - cell.ratio)
            if not groups or size > room:
                groups.append([])
                room = self.budget / 2
            groups[-1].append(cell)
            room -= size
        return groups

    def _has_room(self, pool: Sequence[_Pending], work: ContextWork, cells: Sequence[Cell]) -> bool:
        """Whether these caches fit beside the pool's into half of the budget, the other half being the batch's.

        More rows than make two batches gain nothing.
        """
        held = sum({id(pending.row.cache): pending.row.cache.stored_bytes for pending in pool}.values())
        coming = sum(self._full_bytes(work.ids.shape[1]) * (1 - cell.ratio) for cell in cells)
        rows = len(cells) * len(work.questions) * self.sampling.num_generations
        return held + coming <= self.budget / 2 and len(pool) + rows <= 2 * self._max_rows

    @contextlib.contextmanager
    def _one_line_without_memory(self, cell: Cell, tokens: int) -> Iterator[None]:
        """Inside, running out of memory is a UserError: there is nothing left to halve."""
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise self._too_large(cell, tokens) from error

    def _too_large(self, cell: Cell, tokens: int) -> UserError:
        size, others = self._full_bytes(tokens) / GIB, held_by_others(self.model.device) / GIB
        way_out = "shorten --context_length"
        if others > max(size, 1):  # another evaluation, which has taken what was free when it began
            way_out += f", or, as other processes hold {others:.1f} GiB of its device, give each a --memory_budget_gib"
        return UserError(f"out of memory with one row of {cell}, {size:.1f} GiB of full cache; {way_out}")

    def _full_bytes(self, tokens: int) -> int:
        """Bytes of a full cache."""
        config: Any = self.model.config
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return 2 * config.num_hidden_layers * config.num_key_value_heads * tokens * dim * self.model.dtype.itemsize

    def _batches(self, pool: Sequence[_Pending]) -> Iterator[list[_Pending]]:
        """Rows of like length together, as many as fit, in batches of the same size."""
        most = -(-len(pool) // max(1, -(-len(pool) // self._max_rows)))
        batch: list[_Pending] = []
        for pending in sorted(pool, key=_order):
            widest = max((waiting.row.slots for waiting in batch), default=0)
            too_large = self._full_bytes(max(widest, pending.row.slots)) * (len(batch) + 1) > self.budget / 2
            if batch and (too_large or len(batch) == most):
                yield batch
                batch = []
            batch.append(pending)
        yield from [batch] if batch else []

    # ---- from contexts to rows ----

    def _prefill(self, work: ContextWork, cells: Sequence[Cell], pool: list[_Pending]) -> Iterator[Batch]:
        """Add the rows of a context in these cells to the pool; yields the cells that fail."""
        likelihood = work.questions[0].answer_ids is not None
        making = [*([FULL_CACHE] if likelihood and FULL_CACHE not in cells else []), *cells]
        start = self._now()
        outcome = self._caches.make(work, [cell for cell in making if cell not in self._failed])
        share = (self._now() - start) / max(1, len(outcome) * len(work.questions) * self.sampling.num_generations)
        failures = [self._fail(cell, error, work) for cell, error in outcome.items() if isinstance(error, Exception)]
        if failures:
            yield failures
        for cell, cache in outcome.items():
            if isinstance(cache, EvictedCache):
                kv_bytes = self._kv_bytes(work, cell, cache)
                for question in work.questions:
                    for generation in range(self.sampling.num_generations):
                        row = _row(question, cache, generation)
                        pool.append(_Pending(row, question, cell, generation, cell in cells, kv_bytes, share))

    def _fail(self, cell: Cell, error: Exception, work: ContextWork) -> Failure:
        self._failed.add(cell)
        message = " ".join(str(error).split())
        if not isinstance(error, UserError):
            where = f"row {work.questions[0].row}, a context of {work.ids.shape[1]} tokens"
            message = f"{type(error).__name__}: {message} ({where})"
        logger.debug("%s failed", cell, exc_info=error)
        return Failure(cell, message)

    def _kv_bytes(self, work: ContextWork, cell: Cell, cache: EvictedCache) -> dict[str, float]:
        full = self._full_bytes(work.ids.shape[1])
        return {
            "full": full,
            "requested": full * (1 - cell.ratio),
            "logical": cache.logical_bytes,
            "physical": cache.physical_bytes,
        }

    # ---- from rows to answers ----

    def _flush(self, pool: list[_Pending]) -> Iterator[Batch]:
        """Answer all rows of the pool and empty it."""
        for batch in self._batches(pool):
            yield from self._answer(batch)
        pool.clear()
        self._references.clear()

    def _answer(self, batch: Sequence[_Pending]) -> Iterator[Batch]:
        """Answer one batch; without memory for it, its halves."""
        try:
            answers = self._generate(batch) if batch[0].row.max_new_tokens else self._score(batch)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            answers = None
        if answers is not None:
            yield answers
        elif len(batch) == 1:
            raise self._too_large(batch[0].cell, batch[0].row.slots)
        else:
            logger.warning("out of memory with %d rows: going on with half", len(batch))
            self._max_rows = max(1, len(batch) // 2)
            torch.cuda.empty_cache()
            for half in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):
                yield from self._answer(half)

    def _generate(self, batch: Sequence[_Pending]) -> list[Answer]:
        start = self._now()
        # like lengths are attended to together
        batch = sorted(batch, key=lambda pending: -pending.row.cache.length)
        answers = generate(self.model, [pending.row for pending in batch], self._stop_ids, self._sampler)
        seconds = (self._now() - start) / len(batch)
        return [
            pending.answer(seconds, len(tokens), text=self._decode(tokens))
            for pending, tokens in zip(batch, answers, strict=True)
        ]

    def _score(self, batch: Sequence[_Pending]) -> list[Answer]:
        """Nats a token of the given answers, and how far each prediction is from the full cache's."""
        start = self._now()
        scores, counts = [], []
        starts = [max(1, pending.question.ids.shape[1]) for pending in batch]
        predictions = log_likelihoods(self.model, [pending.row for pending in batch], starts)
        for pending, begin, predicted in zip(batch, starts, predictions, strict=True):
            if pending.cell == FULL_CACHE:
                self._references[pending.question.row] = predicted
            full = self._references[pending.question.row]
            targets = pending.row.ids[0, begin:].to(predicted.device)
            nll = F.nll_loss(predicted, targets)
            kl = F.kl_div(predicted, full, reduction="batchmean", log_target=True)  # KL(full ‖ evicted)
            scores.append(torch.stack([nll, kl]))
            counts.append(len(targets))
        found = torch.stack(scores).tolist()
        seconds = (self._now() - start) / len(batch)
        return [
            pending.answer(seconds, count, nll=nll, kl=kl)
            for pending, (nll, kl), count in zip(batch, found, counts, strict=True)
            if pending.wanted
        ]

    # ---- presses that evict while decoding ----

    def _answer_while_decoding(self, work: ContextWork, longest: int) -> Iterator[Batch]:
        """The ordinary way, one question and cell at a time: such a press acts between the steps of one row."""
        for cell in work.cells:
            if not is_decoding(cell.press) or cell in self._failed:
                continue
            try:
                press = self._caches.press(cell)
            except UserError as error:
                yield [self._fail(cell, error, work)]
                continue
            self._warn_if_idle(cell, press, longest)
            for question in work.questions:
                try:
                    with self._one_line_without_memory(cell, work.ids.shape[1] + question.max_new_tokens):
                        yield list(self._generate_with_press(work, question, cell, press))
                except UserError:
                    raise
                except Exception as error:
                    yield [self._fail(cell, error, work)]
                    break

    def _generate_with_press(
        self, work: ContextWork, question: Question, cell: Cell, press: BasePress
    ) -> Iterator[Answer]:
        seeds = [_seed(question, generation) for generation in range(self.sampling.num_generations)]
        start = self._now()
        cache = prefill_for_decoding(self.model, work.ids, press)
        middle = self._now()
        answers, tokens_seen, held = generate_with_press(
            self.model,
            cache,
            work.ids.shape[1],
            question.ids,
            press,
            question.max_new_tokens,
            self._stop_ids,
            self._sampler,
            seeds,
        )
        prefill_seconds, seconds = (middle - start) / len(answers), (self._now() - middle) / len(answers)
        kv_bytes: dict[str, float] = {
            "full": self._full_bytes(tokens_seen),
            "requested": self._full_bytes(kept_while_decoding(press, tokens_seen)),
            "logical": held,
            "physical": held,
        }
        for generation, tokens in enumerate(answers):
            text = self._decode(tokens)
            yield Answer(
                question.row, cell, generation, text, None, None, len(tokens), kv_bytes, prefill_seconds, seconds
            )

    def _warn_if_idle(self, cell: Cell, press: BasePress, longest: int) -> None:
        """Say once when every answer, of `longest` tokens at most, ends before the press first evicts."""
        interval = getattr(press, "compression_interval", 0)
        if longest < interval and cell not in self._warned:
            self._warned.add(cell)
            logger.warning(
                "%s evicts every %d tokens, but answers have at most %d: it evicts nothing; "
                "give %s:compression_interval=N",
                *(cell, interval, longest, split_spec(cell.press)[0]),
            )

    def _decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def _now(self) -> float:
        """Seconds, after all work on the device is done."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()


def _order(pending: _Pending) -> tuple[bool, int, int]:
    """The full caches that likelihoods are compared to come first, then the longest answers over the largest caches."""
    reference = pending.row.max_new_tokens == 0 and pending.cell == FULL_CACHE
    return not reference, -pending.row.max_new_tokens, -pending.row.slots


def _row(question: Question, cache: EvictedCache, generation: int) -> Row:
    seed = _seed(question, generation)
    if question.answer_ids is None:
        return Row(cache, question.ids, question.max_new_tokens, seed)
    return Row(cache, torch.cat([question.ids, question.answer_ids], dim=1), 0, seed)


def _seed(question: Question, generation: int) -> int:
    return question.row * 1_000 + generation
