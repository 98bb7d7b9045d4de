"""What happens around a training step: the schedule steps, figures are written, a signal stops the run cleanly."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import reduce
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparsekv.files import write_text, writing
from sparsekv.signals import StopSignal
from sparsekv.training.scheduler import KeepRatioScheduler

METRICS = "metrics.jsonl"


class ScheduleCallback(TrainerCallback):
    """Begins the keep-ratio schedule when the number of steps is known, and steps it once an optimizer step."""

    def __init__(self, begin: Callable[[int], KeepRatioScheduler]) -> None:
        self.begin = begin

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.schedule = self.begin(state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.schedule.step(state.global_step)


class IntervalsCallback(TrainerCallback):
    """A resumed run logs, evaluates and saves as it is asked now; transformers would go on as its checkpoint says."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        state.compute_steps(args, state.max_steps)


class MetricsCallback(TrainerCallback):
    """Appends every log line to `metrics.jsonl`; a run begins with the lines that its checkpoint remembers."""

    def __init__(self, output_dir: str) -> None:
        self.path = Path(output_dir) / METRICS

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            with writing(self.path.parent):
                write_text(self.path, "".join(map(_line, state.log_history)))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and logs:
            with writing(self.path.parent), self.path.open("a", encoding="utf-8") as file:
                file.write(_line({**logs, "step": state.global_step}))


def _line(logs: dict[str, float]) -> str:
    return json.dumps({"step": logs["step"], **logs}) + "\n"


class StopCallback(TrainerCallback):
    """On SIGTERM or SIGINT: finish the step, write a checkpoint, stop. `stopped` is then true, in every process."""

    def __init__(self) -> None:
        self.stopped = False
        self._signal = StopSignal()

    @property
    def asked(self) -> bool:
        """Whether a signal has reached this process."""
        return self._signal.number is not None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._signal.watch()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        asked = self.asked
        if args.world_size > 1:  # a signal reaches them at different steps, or only one of them: they stop together
            asked = bool(reduce(torch.tensor(float(asked), device=args.device), reduction="sum") > 0)
        self.stopped = asked and state.global_step < state.max_steps
        if self.stopped:
            control.should_save = control.should_training_stop = True

    def restore(self) -> None:
        """Give the signals back, also after a run that failed."""
        self._signal.restore()
