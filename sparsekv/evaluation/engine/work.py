"""What the engine is given, and what it gives back."""

from dataclasses import dataclass

from torch import Tensor

NO_PRESS = "no_press"


@dataclass(frozen=True)
class Cell:
    """A press (its name with parameters, as `sparsekv.presses.make_press` takes it) and a compression ratio."""

    press: str
    ratio: float

    def __str__(self) -> str:
        return f"{self.press} {self.ratio:g}"


FULL_CACHE = Cell(NO_PRESS, 0.0)


@dataclass(frozen=True)
class Question:
    """One question about a context.

    row : the caller's own number.
    ids : Long[1, Q], what follows the cut.
    max_new_tokens : int
    answer_ids : Long[1, A], to get the likelihood of this text after the question instead of generating one. Without a
        question (Q = 0), its first token is not scored.
    """

    row: int
    ids: Tensor
    max_new_tokens: int
    answer_ids: Tensor | None = None


@dataclass(frozen=True)
class ContextWork:
    """One context, its questions, and the cells that they are to be answered in.

    ids : Long[1, C].
    questions : tuple of Question, at least one; all with `answer_ids` or none.
    cells : tuple of Cell
    query_length : tokens at the context's end that are the question, for presses that look there (Finch).
    """

    ids: Tensor
    questions: tuple[Question, ...]
    cells: tuple[Cell, ...]
    query_length: int = 0


@dataclass(frozen=True)
class Answer:
    """One question answered in one cell.

    text : the new text; None for a likelihood.
    nll, kl : nats a token, of the given answer, and from the full cache's prediction to this one; None for text.
    num_tokens : generated or scored.
    kv_bytes : bytes of the context's cache: `full`; `requested`, what the ratio asks for; `logical`, what later tokens
        can attend to; `physical`, what the press's own tensors hold (per-head presses mask entries and free nothing).
    prefill_seconds, decode_seconds : this answer's share of what it was computed with.
    """

    row: int
    cell: Cell
    generation: int
    text: str | None
    nll: float | None
    kl: float | None
    num_tokens: int
    kv_bytes: dict[str, float]
    prefill_seconds: float
    decode_seconds: float


@dataclass(frozen=True)
class Failure:
    """A cell that cannot run here, and why, in one line."""

    cell: Cell
    reason: str
