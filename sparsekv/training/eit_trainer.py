"""Eviction-invariant training: a full-cache teacher, an evicted-cache student, loss = CE + λ·KL + selection loss."""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments, default_data_collator
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from sparsekv.errors import UserError, require
from sparsekv.files import write_json, writing
from sparsekv.modes import ADAPTER_SWITCH, switched, training_already
from sparsekv.observe import observing
from sparsekv.training.anchor import AnchorSelector
from sparsekv.training.callbacks import ScheduleCallback
from sparsekv.training.config import EITConfig
from sparsekv.training.hidden_states import last_hidden, require_plain_head, run_with_loss
from sparsekv.training.kv_dropout import KVDropoutContext, base_of
from sparsekv.training.loss import IGNORE_INDEX, LogitSums, distillation_loss, sums_from_logits
from sparsekv.training.meter import Meter
from sparsekv.training.plan import EvictionPlan
from sparsekv.training.scheduler import KeepRatioScheduler
from sparsekv.training.selection import later_attention

SCHEDULER_STATE = "scheduler_state.json"
STAGING = ".staging"


class EITTrainer(Trainer):
    """`transformers.Trainer` whose loss compares a student under eviction with the full-cache base model.

    Rows carry `input_ids` (Long[B, L]) and optionally `attention_mask`; padded ones need `lambda_selection=0`. The
    teacher is `teacher`, or without one the base with the adapter disabled.

    Parameters
    ----------
    model : PeftModel or PreTrainedModel
    config : EITConfig
    tokenizer : PreTrainedTokenizerBase
    args : TrainingArguments
    teacher : PreTrainedModel, optional
        A frozen model; needed when `model` is no PeftModel and a loss has a teacher (`config.needs_teacher`).
    **kwargs
        Of `transformers.Trainer`.

    Attributes
    ----------
    logit_sums : callable
        What reduces a chunk's logits to the loss in training; set it to a compiled one (`compile_logit_sums`).
    """

    def __init__(
        self,
        model: nn.Module,
        config: EITConfig,
        tokenizer: PreTrainedTokenizerBase,
        args: TrainingArguments,
        teacher: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> None:
        self.base = base_of(model)
        require_plain_head(self.base)
        args.remove_unused_columns = False
        if args.n_gpu > 1:  # several GPUs in one process: transformers would use DataParallel, which knows no eviction
            args._n_gpu = 1
        kwargs.setdefault("data_collator", default_data_collator)  # rows are packed: nothing to pad
        super().__init__(model, args, processing_class=tokenizer, **kwargs)
        # The loss is divided by the tokens of the whole optimizer step in `compute_loss` and nowhere else; transformers
        # and accelerate would each divide it by the number of micro-batches once more.
        self.model_accepts_loss_kwargs = True
        self.accelerator.gradient_accumulation_steps = 1
        self.config = config
        self.teacher = teacher
        self.logit_sums: LogitSums = sums_from_logits
        self._modules = list(self.base.modules())
        self._adapters = [module for module in self._modules if hasattr(module, ADAPTER_SWITCH)]
        if self.config.needs_teacher and teacher is None and not self._adapters:
            raise ValueError("training every parameter against a teacher needs `teacher`, a frozen copy of the base")
        checkpointing: Any = args.gradient_checkpointing and args.gradient_checkpointing_kwargs
        if self.config.selects and checkpointing and checkpointing.get("use_reentrant"):
            raise ValueError("the selection loss needs checkpointing with use_reentrant=False")
        self.selector = AnchorSelector(config.anchors, tokenizer, self.base.config, self.base.generation_config)
        self.schedule = config.make_schedule(total_steps=1)  # remade when training begins and its steps are known
        self._resumed_schedule: dict[str, Any] | None = None
        self.add_callback(ScheduleCallback(self.begin_schedule))
        self.sampler = config.make_sampler()
        self._staging: str | None = None
        self._logged_step = 0
        self.meter = Meter(self.base, not hasattr(model, "disable_adapter"), config.needs_teacher)

    # ---- one step ----

    def current_plan(self, length: int) -> EvictionPlan:
        """This optimizer step's cuts, rules and ratios: the same in every micro-batch and process."""
        return self.sampler.draw(self.state.global_step, length, self.schedule.keep_ratio)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of a micro-batch, both inside the eviction context (checkpointing recomputes)."""
        plan = None if self.config.control else self.current_plan(inputs["input_ids"].shape[1])
        with KVDropoutContext(self.base, plan, self.selector) as self.eviction, training_already(model, self.base):
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """This micro-batch's part of the step's loss: suffix, context and selection, each by the step's tokens."""
        config, input_ids = self.config, inputs["input_ids"]  # Long[B, L]
        plan = self.current_plan(input_ids.shape[1])
        tokens_with_loss = loss_tokens(input_ids, inputs.get("attention_mask"), plan.first_query)
        labels, context, context_labels = tokens_with_loss  # [B, L] each
        counts = self._count_tokens([inputs]) if num_items_in_batch is None else num_items_in_batch  # Long[2]
        teacher_hidden = self._teacher_hidden(model, inputs, plan) if self.config.needs_teacher else None  # [B, L, D]

        def head_loss(hidden: Tensor, head: nn.Module) -> Tensor:  # [B, L, D]
            sums = distillation_loss(
                hidden.flatten(0, 1),
                None if teacher_hidden is None else teacher_hidden.flatten(0, 1),
                labels.flatten(),
                head,
                self._teacher_head(head),
                lambda_kl=config.lambda_kl,
                temperature=config.temperature,
                direction=config.kl_direction,
                context_mask=context.flatten(),
                lambda_context=config.lambda_context,
                context_labels=context_labels.flatten(),
                lambda_ce_context=config.lambda_ce_context,
                logit_sums=self.logit_sums,
                numbers=None if "attention_mask" in inputs else unpadded_tokens(input_ids.shape, plan.first_query),
            )
            tokens, context_tokens = counts.to(sums.loss.device).clamp(min=1)
            selection = self._selection(labels, tokens)
            self.meter.add(sums, counts, inputs, plan, self.eviction.last, self.selector, selection)
            loss = sums.loss / tokens + sums.context_loss / context_tokens
            return loss + config.lambda_selection * selection

        loss = run_with_loss(model, self.base, inputs, head_loss).to(self.args.device)
        return loss * self.accelerator.num_processes  # gradients are averaged over processes; `counts` are of all

    @torch.no_grad()
    def _teacher_hidden(self, model: nn.Module, inputs: dict[str, Tensor], plan: EvictionPlan) -> Tensor:
        """The full-cache teacher's last hidden states, [B, L, D]; notes what it attends to for the selection loss."""
        if self.teacher is not None:
            with self._noting_importance(self.teacher, plan):
                return last_hidden(self.teacher, self.teacher, inputs)
        with (
            self.eviction.full_attention(),
            switched(self._modules, "training", False),  # no dropout anywhere: the target holds still
            switched(self._adapters, ADAPTER_SWITCH, True),
            self._noting_importance(self.base, plan),
        ):
            return last_hidden(model, self.base, inputs)

    @contextlib.contextmanager
    def _noting_importance(self, teacher: PreTrainedModel, plan: EvictionPlan) -> Iterator[None]:
        """Hand the student's forward what the teacher's later queries attend to, where the selection loss is on."""
        if not self.config.selects:
            yield
            return
        importance: dict[int, list[Tensor]] = {}

        def receive(layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> None:
            # as attended to: under autocast the rotary embedding leaves queries and keys in float32
            importance[layer] = later_attention(query.to(value.dtype), key.to(value.dtype), scaling, plan.cuts)

        with observing(teacher, receive, plain_only=True):  # a layer with a window evicts nothing
            yield
        if not importance:
            raise ValueError("the selection loss needs rows without padding; without it, set lambda_selection=0")
        self.eviction.importance = importance

    def _selection(self, labels: Tensor, tokens: Tensor) -> Tensor:
        """This micro-batch's part of the step's selection loss: a row counts by its tokens with loss."""
        if not self.config.selects or not torch.is_grad_enabled() or self.eviction.last is None:
            return torch.zeros((), device=tokens.device)
        rows = self.eviction.last.selection_loss().to(tokens.device)
        return (rows * (labels != IGNORE_INDEX).sum(-1).to(tokens.device)).sum() / tokens

    def _teacher_head(self, head: nn.Module) -> Callable[[Tensor], Tensor]:
        if self.teacher is not None:
            return self.teacher.get_output_embeddings()
        return getattr(head, "base_layer", getattr(head, "original_module", head)).forward

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """No batches once the last step is done: transformers would train one more when resumed from its checkpoint."""
        if self.state.global_step >= self.state.max_steps:
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Of a micro-batch; transformers would count the model's parameters each time."""
        return self.meter.flops_per_token * inputs["input_ids"].numel()

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Tensor | None:
        """Long[2]: the tokens of the optimizer step that carry distillation loss and context loss, over processes."""
        if not batch_samples:
            return None
        return self.accelerator.reduce(self._count_tokens(batch_samples).to(device), reduction="sum")

    def _count_tokens(self, batches: list[dict[str, Tensor]]) -> Tensor:
        counts = []
        for inputs in batches:
            first_query = self.current_plan(inputs["input_ids"].shape[1]).first_query
            labels, context, _ = loss_tokens(inputs["input_ids"], inputs.get("attention_mask"), first_query)
            counts.append(torch.stack([(labels != IGNORE_INDEX).sum(), context.sum()]))
        return torch.stack(counts).sum(0)

    # ---- schedule, logs, evaluation ----

    def begin_schedule(self, total_steps: int) -> KeepRatioScheduler:
        """The schedule over `total_steps` optimizer steps, continued where a checkpoint left it."""
        self.schedule = self.config.make_schedule(total_steps)
        if self._resumed_schedule is not None:
            self.schedule.load_state_dict(self._resumed_schedule)
        self._logged_step = self.schedule.global_step
        return self.schedule

    def load_schedule(self, checkpoint: Path) -> None:
        """Let training continue the schedule from a checkpoint's state."""
        self._resumed_schedule = json.loads((checkpoint / SCHEDULER_STATE).read_text(encoding="utf-8"))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the training figures since the last log line; raise UserError where one is not finite any more."""
        if "train_runtime" in logs:
            return  # transformers' totals, which are wrong for a resumed run
        if "loss" in logs:
            logs |= self.meter.flush(self.accelerator, self.state.global_step - self._logged_step)
            self._logged_step = self.state.global_step
            logs["schedule_keep_ratio"] = self.schedule.keep_ratio
        super().log(logs, start_time)
        self._check_finite(logs)

    def _check_finite(self, logs: dict[str, float]) -> None:
        """Of a loss the update after it is not known to be, so the perplexities, which come last, count as well."""
        figures = {name: value for name, value in logs.items() if name == "loss" or name.endswith("_ppl")}
        lost = next((name for name, value in figures.items() if not math.isfinite(value)), None)
        if lost is None:
            return
        what = "the loss" if lost == "loss" else lost
        step, lr = self.state.global_step, f"--lr {self.args.learning_rate:g}"
        require(step > 0, f"--model: {what} is not finite before the first step; give one that has not diverged")
        raise UserError(f"{lr}: {what} is not finite at step {step}; begin in another --output_dir with a lower one")

    def evaluated(self) -> bool:
        """Whether the model as it is now has been evaluated."""
        return any(
            "eval_full_ppl" in line and line["step"] == self.state.global_step for line in self.state.log_history
        )

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Perplexity of the same suffix tokens with the full cache and evicted, the mixture's rules by turns.

        Returns
        -------
        dict
            `eval_full_ppl`; `eval_evicted_ppl` at `min_keep_ratio`, comparable over the whole run; and, for the
            adaptive schedule, `eval_current_ppl` at its current ratio.
        """
        ratios = {"full": None, "evicted": self.config.min_keep_ratio}
        if self.config.scheduler_mode == "adaptive":
            ratios["current"] = self.schedule.keep_ratio
        was_training = self.base.training
        self.base.eval()
        loader = self.get_eval_dataloader(eval_dataset)
        batches, rows = list(loader), len(loader.dataset)  # type: ignore[arg-type]  # it has a length
        metrics = {}
        with self.meter.paused():
            for name, ratio in ratios.items():
                metrics[f"{metric_key_prefix}_{name}_ppl"] = math.exp(min(self._mean_nll(batches, rows, ratio), 700))
        self.base.train(was_training)
        if self.config.scheduler_mode == "adaptive":
            if self.schedule.needs_reference:
                self.schedule.set_reference(metrics[f"{metric_key_prefix}_full_ppl"])
            self.schedule.observe(metrics[f"{metric_key_prefix}_current_ppl"])
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _mean_nll(self, batches: list[dict[str, Tensor]], rows: int, keep_ratio: float | None) -> float:
        """Nats a token of the suffix after one cut in the middle of the range, over the rows of all processes."""
        total = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        processes, process = self.accelerator.num_processes, self.accelerator.process_index
        for number, batch in enumerate(batches):
            inputs = self._prepare_inputs(batch)
            length = inputs["input_ids"].shape[1]
            cut = math.floor(length * (self.config.min_cut + self.config.max_cut) / 2)
            row = number * processes + process
            plan = self._eval_plan(row, cut, keep_ratio)
            first_query = cut if self.config.geometry == "two_region" else 0
            labels, _, _ = loss_tokens(inputs["input_ids"], inputs.get("attention_mask"), first_query)
            if row >= rows:  # accelerate gives every process as many: one that was read before
                labels = torch.full_like(labels, IGNORE_INDEX)
            with KVDropoutContext(self.base, plan, self.selector):
                nll = run_with_loss(self.model_wrapped, self.base, inputs, _cross_entropy(labels))
            total[0] += nll.to(total.device)
            total[1] += (labels != IGNORE_INDEX).sum()
        nll, tokens = self.accelerator.reduce(total, reduction="sum").tolist()
        return nll / tokens

    def _eval_plan(self, number: int, cut: int, keep_ratio: float | None) -> EvictionPlan | None:
        if keep_ratio is None:
            return None
        rules = sorted(self.config.rules)
        cuts = (cut,) if self.config.geometry == "two_region" else ()
        return EvictionPlan(self.config.geometry, cuts, (rules[number % len(rules)],), (keep_ratio,), seed=number)

    # ---- checkpoints ----

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write the checkpoint beside its place and rename it there: a half-written one never has its name."""
        out = Path(str(self.args.output_dir))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if (out / name).exists():  # a stop asked for just after a save: the step's state is already there
            return
        self._staging = str(out / STAGING)
        try:
            with self.meter.paused(), writing(out):
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    staged = out / STAGING / name
                    if self.state.best_model_checkpoint == str(staged):
                        self.state.best_model_checkpoint = str(out / name)
                        self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
                    write_json(staged / SCHEDULER_STATE, self.schedule.state_dict())
                    os.replace(staged, out / name)
        finally:
            self._staging = None
            if self.args.should_save:
                shutil.rmtree(out / STAGING, ignore_errors=True)
        self.accelerator.wait_for_everyone()


def loss_tokens(input_ids: Tensor, attention_mask: Tensor | None, first_query: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which positions carry loss, for a model that predicts the next token.

    Parameters
    ----------
    input_ids : Long[B, L]
    attention_mask : Bool or Long[B, L], optional
        Nonzero where a token is real.
    first_query : int
        Positions from here on see an evicted cache.

    Returns
    -------
    labels : Long[B, L]
        The next token at evicted positions; -100 at context positions, padding and the last position.
    context : Bool[B, L]
        True at real context positions.
    context_labels : Long[B, L]
        The next token at context positions; -100 elsewhere and before padding.
    """
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    labels[:, :-1] = input_ids[:, 1:].masked_fill(~(real[:, 1:] & real[:, :-1]), IGNORE_INDEX)
    context = real.clone()
    context[:, first_query:] = False
    context_labels = labels.masked_fill(~context, IGNORE_INDEX)
    labels[:, :first_query] = IGNORE_INDEX
    return labels, context, context_labels


def unpadded_tokens(shape: Sequence[int], first_query: int) -> tuple[int, int]:
    """How many tokens of [B, L] `loss_tokens` gives a label, and how many it calls context, where nothing is padded."""
    rows, length = shape
    return rows * max(length - 1 - first_query, 0), rows * first_query


def _cross_entropy(labels: Tensor) -> Callable[[Tensor, nn.Module], Tensor]:
    def head_loss(hidden: Tensor, head: nn.Module) -> Tensor:
        return distillation_loss(hidden.flatten(0, 1), None, labels.flatten(), head, head).ce

    return head_loss
