"""Cell → the evicted cache of a context, each press by the cheapest way that it allows."""

import contextlib
from collections.abc import Iterator, Sequence

from kvpress import BasePress, FinchPress
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsekv.errors import UserError, require
from sparsekv.evaluation.engine.memory import is_out_of_memory
from sparsekv.evaluation.engine.prefill import EvictedCache, prefill_alone, prefill_shared
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
        shared: dict[bool, dict[Cell, BasePress | None]] = {False: {}, True: {}}
        for cell in cells:
            try:
                press = self.press(cell)
                if press is None:
                    shared[False][cell] = None
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

    def _make_ready(self, cell: Cell, press: BasePress, work: ContextWork) -> None:
        """What kvpress's own way into a press does before the forward pass."""
        if cell.press in self._unusable:
            raise self._unusable[cell.press]
        try:
            press.post_init_from_model(self.model)
        except Exception as error:
            self._unusable[cell.press] = error
            raise
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
