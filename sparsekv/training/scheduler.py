"""The keep ratio by optimizer step: fixed, a curriculum, or adaptive to the perplexity under eviction."""

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

from sparsekv.errors import UserError, require

SchedulerMode = Literal["fixed", "curriculum", "adaptive"]


class KeepRatioScheduler(ABC):
    """A keep ratio that changes with the optimizer steps done.

    Call `step` once after every optimizer step. A trainer that evaluates calls `observe` after each evaluation; before
    the first step, and only while `needs_reference`, it measures the full-cache perplexity and calls `set_reference`.
    """

    mode: ClassVar[SchedulerMode]

    def __init__(self) -> None:
        self.global_step = 0

    @property
    @abstractmethod
    def keep_ratio(self) -> float:
        """The ratio for the next training step and for evaluations now."""

    @property
    def needs_reference(self) -> bool:
        """Whether the schedule waits for `set_reference`."""
        return False

    def step(self, global_step: int) -> None:
        """Count one optimizer step.

        Parameters
        ----------
        global_step : int
            Optimizer steps done, this one included: 1 after the first.

        Raises
        ------
        RuntimeError
            If it is not the successor of the last one, as when two callbacks step the same schedule.
        """
        if global_step != self.global_step + 1:
            raise RuntimeError(
                f"the keep-ratio schedule is at step {self.global_step}: it cannot step to {global_step}"
            )
        self.global_step = global_step

    def set_reference(self, full_perplexity: float) -> None:  # noqa: B027 (schedules that watch nothing need nothing)
        """Take the full-cache validation perplexity measured before training, once."""

    def observe(self, evicted_perplexity: float) -> None:  # noqa: B027
        """Take the validation perplexity under eviction at the current `keep_ratio`."""

    def state_dict(self) -> dict[str, Any]:
        """The whole state, JSON-serialisable."""
        return {"mode": self.mode, "global_step": self.global_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`'s value.

        Raises
        ------
        UserError
            If the state was saved by another mode.
        """
        if state["mode"] != self.mode:
            raise UserError(f"--scheduler_mode {self.mode}: the run to resume was trained with {state['mode']}")
        self.global_step = state["global_step"]


class FixedScheduler(KeepRatioScheduler):
    """`min_keep_ratio` from the first step to the last."""

    mode = "fixed"

    def __init__(self, min_keep_ratio: float) -> None:
        super().__init__()
        self.min_keep_ratio = min_keep_ratio

    @property
    def keep_ratio(self) -> float:
        return self.min_keep_ratio


class CurriculumScheduler(KeepRatioScheduler):
    """Hold the initial ratio for the warm-up, fall linearly to the lowest, hold that.

    Parameters
    ----------
    initial_keep_ratio, min_keep_ratio : float
        Where the ratio starts and ends.
    total_steps : int
        Optimizer steps of the whole training.
    warmup_fraction, reach_fraction : float
        The shares of `total_steps` after which the ratio begins to fall and has reached the lowest.
    """

    mode = "curriculum"

    def __init__(
        self,
        initial_keep_ratio: float,
        min_keep_ratio: float,
        total_steps: int,
        warmup_fraction: float,
        reach_fraction: float,
    ) -> None:
        super().__init__()
        self.initial_keep_ratio = initial_keep_ratio
        self.min_keep_ratio = min_keep_ratio
        self.total_steps = total_steps
        self.warmup_fraction = warmup_fraction
        self.reach_fraction = reach_fraction

    @property
    def keep_ratio(self) -> float:
        done = self.global_step / self.total_steps
        fall = (done - self.warmup_fraction) / (self.reach_fraction - self.warmup_fraction)
        fall = min(max(fall, 0.0), 1.0)
        return self.initial_keep_ratio * (1 - fall) + self.min_keep_ratio * fall


class AdaptiveScheduler(KeepRatioScheduler):
    """Lower the ratio while the model bears it, judged by perplexity under eviction against a reference that is fixed.

    An observation of at most reference·(1 + `ppl_threshold`) lowers the ratio by `step_size`. One above it leaves the
    ratio as it is, to give training time; `patience` of them in a row return it to the lowest ratio that was ever
    within the threshold (the initial one if none was), from where it tries again.

    Parameters
    ----------
    initial_keep_ratio, min_keep_ratio : float
        The range that the ratio never leaves.
    ppl_threshold : float
        Tolerated relative rise of the perplexity, 0.05 = 5%.
    patience : int
        Observations in a row above the threshold that end a try.
    step_size : float
        What one observation within the threshold takes off the keep ratio.
    """

    mode = "adaptive"

    def __init__(
        self, initial_keep_ratio: float, min_keep_ratio: float, ppl_threshold: float, patience: int, step_size: float
    ) -> None:
        super().__init__()
        self.min_keep_ratio = min_keep_ratio
        self.ppl_threshold = ppl_threshold
        self.patience = patience
        self.step_size = step_size
        self.reference: float | None = None
        self._keep_ratio = initial_keep_ratio
        self._best = initial_keep_ratio
        self._over = 0
        self._observed_step = -1

    @property
    def keep_ratio(self) -> float:
        return self._keep_ratio

    @property
    def needs_reference(self) -> bool:
        return self.reference is None

    def set_reference(self, full_perplexity: float) -> None:
        """Take the full-cache validation perplexity measured before training.

        Raises
        ------
        RuntimeError
            If it was set before: a reference that moves with the model lets quality drift away unseen.
        """
        if self.reference is not None:
            raise RuntimeError("the reference perplexity is set once, before training")
        if not math.isfinite(full_perplexity):
            raise RuntimeError(f"the reference perplexity is {full_perplexity}: the model is broken before training")
        self.reference = full_perplexity

    def observe(self, evicted_perplexity: float) -> None:
        """Adapt the ratio. A second observation at the same step (an evaluation repeated after resuming) is ignored.

        Raises
        ------
        RuntimeError
            If `set_reference` was not called.
        """
        if self.reference is None:
            raise RuntimeError("set_reference must be called before observe")
        if self.global_step == self._observed_step:
            return
        self._observed_step = self.global_step
        if evicted_perplexity <= self.reference * (1 + self.ppl_threshold):  # false for NaN, as it should be
            self._over = 0
            self._best = min(self._best, self._keep_ratio)
            self._keep_ratio = max(self.min_keep_ratio, self._keep_ratio - self.step_size)
            return
        self._over += 1
        if self._over >= self.patience:
            self._keep_ratio = self._best

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {
            "reference": self.reference,
            "keep_ratio": self._keep_ratio,
            "best": self._best,
            "over": self._over,
            "observed_step": self._observed_step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.reference = state["reference"]
        self._keep_ratio = state["keep_ratio"]
        self._best = state["best"]
        self._over = state["over"]
        self._observed_step = state["observed_step"]


def make_scheduler(
    mode: SchedulerMode,
    *,
    total_steps: int,
    initial_keep_ratio: float = 0.9,
    min_keep_ratio: float = 0.3,
    warmup_fraction: float = 0.05,
    reach_fraction: float = 0.8,
    ppl_threshold: float = 0.05,
    patience: int = 3,
    step_size: float = 0.05,
) -> KeepRatioScheduler:
    """Build the schedule of a mode; the parameters are those of its class, all checked whatever the mode.

    Raises
    ------
    UserError
        If a value is out of its range; the message names the flag.
    """
    for flag, ratio in (("--initial_keep_ratio", initial_keep_ratio), ("--min_keep_ratio", min_keep_ratio)):
        require(0 < ratio <= 1, f"{flag} {ratio}: must be above 0 and at most 1")
    require(
        initial_keep_ratio >= min_keep_ratio,
        f"--initial_keep_ratio {initial_keep_ratio}: must be at least --min_keep_ratio, {min_keep_ratio}",
    )
    require(total_steps >= 1, f"--max_steps {total_steps}: must be at least 1")
    require(0 <= warmup_fraction < 1, f"--warmup_fraction {warmup_fraction}: must be at least 0 and below 1")
    require(
        warmup_fraction < reach_fraction <= 1,
        f"--reach_fraction {reach_fraction}: must be above --warmup_fraction, {warmup_fraction}, and at most 1",
    )
    require(0 <= ppl_threshold < math.inf, f"--ppl_threshold {ppl_threshold}: must be at least 0")
    require(patience >= 1, f"--patience {patience}: must be at least 1")
    require(0 < step_size < 1, f"--step_size {step_size}: must be above 0 and below 1")
    if mode == "fixed":
        return FixedScheduler(min_keep_ratio)
    if mode == "curriculum":
        return CurriculumScheduler(initial_keep_ratio, min_keep_ratio, total_steps, warmup_fraction, reach_fraction)
    if mode == "adaptive":
        return AdaptiveScheduler(initial_keep_ratio, min_keep_ratio, ppl_threshold, patience, step_size)
    raise UserError(f"--scheduler_mode {mode}: must be fixed, curriculum or adaptive")
