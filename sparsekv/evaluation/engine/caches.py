"""Cell → the evicted cache of a context, each press by the cheapest way that it allows."""

import contextlib
from collections.abc import Iterator, Sequence

from kvpress import BasePress, FinchPress, KVzipPress
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsekv.errors import UserError, require
from sparsekv.evaluation.engine.evicted import EvictedCache
from sparsekv.evaluation.engine.memory import is_out_of_memory
from sparsekv.evaluation.engine.prefill import prefill_alone, prefill_shared
from sparsekv.evaluation.engine.replay import Replay, ReplayAt
from sparsekv.evaluation.engine.work import Cell, ContextWork
from sparsekv.presses import AnchorPress, make_press, needs_eager, shares_prefill, why_not


class CacheMaker:
    """Makes the caches of a context for many cells; a press lives as long as this object, as in kvpress's evaluation.

    Parameters
    ----------
    model : PreTrainedModel
    tokenizer : PreTrainedTokenizerBase
    seed : int
        Of presses that draw at random.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> None:
        self.model, self.tokenizer, self.seed = model, tokenizer, seed
        self._presses: dict[Cell, BasePress | None] = {}
        self._replays: dict[str, Replay] = {}  # by press
        self._unusable: dict[str, Exception] = {}  # by press, so that an unreachable file is waited for once

    def press(self, cell: Cell) -> BasePress | None:
        """The cell's press; None: the full cache.

        Raises
        ------
        UserError
            When the press cannot run on this model or without a network.
        """
        if cell not in self._presses:
            if reason := why_not(cell.press, self.model):
                raise UserError(reason)
            self._presses[cell] = make_press(cell.press, cell.ratio, self.tokenizer)
        return self._presses[cell]

    def make(self, work: ContextWork, cells: Sequence[Cell]) -> dict[Cell, EvictedCache | Exception]:
        """Each cell's cache of the context, or the exception that its press raised; running out of memory is raised."""
        outcome: dict[Cell, EvictedCache | Exception] = {}
        shared: dict[bool, dict[Cell, BasePress | ReplayAt | None]] = {False: {}, True: {}}
        for cell in cells:
            try:
                press = self.press(cell)
                if press is None:
                    shared[False][cell] = None
                elif type(press) is KVzipPress:
                    shared[False][cell] = self._replay(cell, press) if cell.ratio else None
                elif shares_prefill(press):
                    self._make_ready(cell, press, work)
                    shared[needs_eager(press)][cell] = press
                else:
                    outcome[cell] = prefill_alone(self.model, work.ids, press)
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                outcome[cell] = error
        for eager, presses in shared.items():
            if presses:
                with eager_attention(self.model, eager):
                    outcome |= prefill_shared(self.model, work.ids, presses, self.seed)
        return outcome

    def _replay(self, cell: Cell, press: KVzipPress) -> ReplayAt:
        """The press's passes, which are done once for all its cells."""
        if cell.press not in self._replays:
            with self._tried_once(cell):
                self._replays[cell.press] = Replay(press, self.model)
        return ReplayAt(self._replays[cell.press], cell.ratio)

    @contextlib.contextmanager
    def _tried_once(self, cell: Cell) -> Iterator[None]:
        """Inside, a failure is the press's: at its next cell it is raised without another try."""
        if cell.press in self._unusable:
            raise self._unusable[cell.press]
        try:
            yield
        except Exception as error:
            self._unusable[cell.press] = error
            raise

    def _make_ready(self, cell: Cell, press: BasePress, work: ContextWork) -> None:
        """What kvpress's own way into a press does before the forward pass."""
        with self._tried_once(cell):
            press.post_init_from_model(self.model)
        if isinstance(press, AnchorPress):
            press.input_ids = work.ids
        if isinstance(press, FinchPress):
            require(work.query_length > 0, f"{cell.press} looks for the question in the context: --query_aware true")
            press.window_size = work.query_length


@contextlib.contextmanager
def eager_attention(model: PreTrainedModel, eager: bool) -> Iterator[None]:
    """Inside, the model hands out its attention weights, if `eager`."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager" if eager else before)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
