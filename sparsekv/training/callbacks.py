"""What happens around a training step: the schedule steps, figures are written, a signal stops the run cleanly."""

import json
import signal
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparsekv.files import write_text
from sparsekv.training.scheduler import KeepRatioScheduler

METRICS = "metrics.jsonl"


class ScheduleCallback(TrainerCallback):
    """Steps the keep-ratio schedule once an optimizer step."""

    def __init__(self, schedule: KeepRatioScheduler) -> None:
        self.schedule = schedule

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.schedule.step(state.global_step)


class MetricsCallback(TrainerCallback):
    """Appends every log line to `metrics.jsonl`; a resumed run first drops the lines after its checkpoint."""

    def __init__(self, output_dir: str) -> None:
        self.path = Path(output_dir) / METRICS

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= state.global_step]
            write_text(self.path, "".join(kept))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and logs:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


class StopCallback(TrainerCallback):
    """On SIGTERM or SIGINT: finish the step, write a checkpoint, stop. `stopped_by` then holds the signal."""

    def __init__(self) -> None:
        self.stopped_by: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.stopped_by = signal.Signals(number)
        signal.signal(number, self._previous[self.stopped_by])  # a second one acts at once

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._on_signal)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.stopped_by is not None:
            control.should_save = control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
