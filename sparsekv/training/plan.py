"""What one optimizer step evicts: the cuts, the rule and the keep ratio at each, drawn from the seed and the step."""

import itertools
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from sparsekv.errors import UserError, require

Geometry = Literal["two_region", "streaming", "global"]
RatioDraw = Literal["uniform", "ceiling"]


@dataclass(frozen=True)
class EvictionPlan:
    """One step's decisions; the same for every micro-batch and process of the step.

    geometry : how a query's position decides what it sees (see `sparsekv.attention`).
    cuts : ascending positions at which the cache is evicted; empty unless the geometry is two_region.
    rules : the rule's name at each cut (one for the whole sequence in the other geometries).
    keep_ratios : share of the context kept at each cut, in (0, 1].
    seed : for the random rules.
    """

    geometry: Geometry
    cuts: tuple[int, ...]
    rules: tuple[str, ...]
    keep_ratios: tuple[float, ...]
    seed: int = 0

    def __post_init__(self) -> None:
        if self.geometry not in get_args(Geometry):
            raise UserError(f"--geometry {self.geometry!r} must be one of {', '.join(get_args(Geometry))}")
        expected = len(self.cuts) if self.geometry == "two_region" else 1
        if len(self.rules) != expected or len(self.keep_ratios) != expected or expected == 0:
            raise ValueError(
                f"a {self.geometry} plan needs {expected} cuts, rules and keep ratios, at least one: {self}"
            )
        if list(self.cuts) != sorted(set(self.cuts)) or any(cut < 1 for cut in self.cuts):
            raise ValueError(f"cuts must be positive and ascend: {self.cuts}")
        for ratio in self.keep_ratios:
            require(0 < ratio <= 1, f"keep ratio {ratio}: must be in (0, 1]")

    @property
    def first_query(self) -> int:
        """The first position whose query sees an evicted cache: what comes before carries the context's loss."""
        return self.cuts[0] if self.cuts else 0


@dataclass(frozen=True)
class PlanSampler:
    """Draws a step's plan.

    rules : name → weight of the mixture; each cut draws its own.
    num_cuts : cuts in a row (two_region).
    min_cut, max_cut : where cuts may fall, as fractions of the row. They are spread: the range is divided in
        `num_cuts` equal parts with one cut in each.
    ratio_draw : "uniform" draws the keep ratio between the schedule's current value and 1 (that is, the compression
        below its ceiling); "ceiling" takes the schedule's value itself.
    """

    geometry: Geometry
    rules: Mapping[str, float]
    num_cuts: int
    min_cut: float
    max_cut: float
    ratio_draw: RatioDraw
    seed: int

    def check(self, length: int) -> None:
        """Raise UserError unless every cut leaves a context and a suffix in rows of `length` tokens."""
        if self.geometry != "two_region":
            return
        if not 0 < self.min_cut <= self.max_cut < 1:
            raise UserError(f"--min_cut {self.min_cut} and --max_cut {self.max_cut} must satisfy 0 < min <= max < 1")
        if self.num_cuts < 1:
            raise UserError(f"--num_cuts {self.num_cuts}: must be at least 1")
        first, last = math.floor(self.min_cut * length), math.floor(self.max_cut * length)
        if first < 1 or last - first + 1 < self.num_cuts or last > length - 2:
            raise UserError(
                f"--num_cuts {self.num_cuts} between --min_cut {self.min_cut} and --max_cut {self.max_cut} of rows of "
                f"{length} tokens leaves no room for a context, {self.num_cuts} distinct cuts and a suffix of 2 "
                "tokens; give fewer cuts or longer rows"
            )

    def draw(self, step: int, length: int, keep_ratio: float) -> EvictionPlan:
        """The plan of one step for rows of `length` tokens at the schedule's `keep_ratio`."""
        rng = random.Random(f"{self.seed}-{step}")
        cuts = self._draw_cuts(rng, length) if self.geometry == "two_region" else ()
        draws = max(len(cuts), 1)
        rules = rng.choices(list(self.rules), weights=list(self.rules.values()), k=draws)
        ratios = [rng.uniform(keep_ratio, 1) if self.ratio_draw == "uniform" else keep_ratio for _ in range(draws)]
        return EvictionPlan(self.geometry, cuts, tuple(rules), tuple(ratios), rng.getrandbits(48))

    def _draw_cuts(self, rng: random.Random, length: int) -> tuple[int, ...]:
        first = math.floor(self.min_cut * length)
        span = math.floor(self.max_cut * length) - first + 1
        bounds = [first + span * part // self.num_cuts for part in range(self.num_cuts + 1)]
        return tuple(rng.randrange(start, stop) for start, stop in itertools.pairwise(bounds))
