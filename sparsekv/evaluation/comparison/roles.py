"""Which runs are compared with which: base, control and trained, each of one training or of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from sparsekv.errors import UserError, require
from sparsekv.evaluation.comparison.results import CELL, Results


def comparisons(results: Sequence[Results], references: Mapping[str, Sequence[Results]]) -> list[dict[str, Results]]:
    """For each run of the first results: role → run, the references first; several results are trainings of a role."""
    last = "trained" if references else "run"
    first, *others = results
    found = []
    for run in first.runs():
        roles = {role: [_reference(role, each, run[0]) for each in given] for role, given in references.items()}
        roles[last] = [first.run(*run), *(_reference(last, other, run[0]) for other in others)]
        found.append({role: pool(role, runs) for role, runs in roles.items()})
    return found


def _reference(role: str, results: Results, model: str) -> Results:
    """The run that a run of this model is compared with."""
    runs = results.runs()
    same = [run for run in runs if run[0] == model] or runs
    if len(same) > 1:
        listed = "; ".join(" with ".join(filter(None, run)) for run in same)
        raise UserError(f"{results.folder}: holds several runs ({listed}); give a folder with one as {role} of {model}")
    return results.run(*same[0])


def with_own_base(results: Results, model: str, adapter: str) -> dict[str, Results]:
    """A run, and the same model without an adapter where it is in the same folder."""
    run = results.run(model, adapter)
    if adapter and (model, "") in results.runs():
        return {"base": results.run(model, ""), "trained": run}
    return {"run": run}


def pool(role: str, runs: Sequence[Results]) -> Results:
    """Trainings that differ in their seed as one run, whose score of a row is the mean over them.

    Raises
    ------
    UserError
        A run with an adapter beside one without; the same weights twice; or a cell has scores in some of them only.
    """
    first, *others = runs
    if not others:
        return first
    _check_adapters(role, runs)
    _check_weights(role, runs)
    for run in others:
        _check_cells(role, first, run)
        _check_cells(role, run, first)
    return Results(
        first.folder,
        pd.concat([run.cells for run in runs], ignore_index=True),
        pd.concat([run.scores.assign(training=number) for number, run in enumerate(runs)], ignore_index=True),
        first.bounds,
    )


def _check_adapters(role: str, runs: Sequence[Results]) -> None:
    """An untrained model is no training beside adapters; models that were trained whole have none of them."""
    adapted = {bool(run.cells.adapter.iloc[0]): run for run in runs}
    if len(adapted) > 1:
        have, lack = adapted[True].folder, adapted[False].folder
        raise UserError(f"{role}: {have} has an adapter and {lack} has none; only trainings of one kind are seeds")


def _check_weights(role: str, runs: Sequence[Results]) -> None:
    known: dict[tuple[str | None, ...], Results] = {}
    for run in runs:
        settings = run.cells.iloc[0].settings
        weights = tuple(settings.get(f"{part}_fingerprint") for part in ("model", "adapter"))
        other = known.setdefault(weights, run)
        require(other is run, f"{role}: {other.folder} and {run.folder} hold the same weights; give each seed once")


def _check_cells(role: str, have: Results, lack: Results) -> None:
    known, others = (set(run.scores[CELL].itertuples(index=False, name=None)) for run in (have, lack))
    for cell in sorted(known - others):
        name = " ".join(str(part) for part in cell if part != "")
        raise UserError(f"{role}: the cell {name} has scores in {have.folder}, but not in {lack.folder}")
