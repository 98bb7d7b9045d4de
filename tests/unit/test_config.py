import dataclasses
import math
import shlex
from pathlib import Path

import pytest

from sparsekv.cli import parse
from sparsekv.errors import UserError
from sparsekv.training.anchor import AnchorConfig
from sparsekv.training.config import EITConfig, TrainConfig, default_rules
from sparsekv.training.plan import PlanSampler
from sparsekv.training.scheduler import CurriculumScheduler

RUN = {"model": "m", "output_dir": "o"}
CONFIGS = Path(__file__).parents[2] / "configs"
ABLATIONS = [
    shlex.split(line)
    for line in (CONFIGS / "ablations.txt").read_text(encoding="utf-8").splitlines()
    if not line.startswith("#")
]


def test_the_schema_is_whole():
    """Every option has a default, so that any part of a YAML file may be left out."""
    for field in dataclasses.fields(TrainConfig):
        has_default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        assert has_default, field.name


def test_every_option_is_documented():
    for schema, parent in ((EITConfig, None), (TrainConfig, EITConfig)):
        inherited = {field.name for field in dataclasses.fields(parent)} if parent else set()
        for field in dataclasses.fields(schema):
            assert (f"\n    {field.name}\n" in schema.__doc__) == (field.name not in inherited), field.name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("lambda_kl", value) for value in (-0.1, math.nan, math.inf)),
        *(("lambda_context", value) for value in (-0.1, math.nan, math.inf)),
        *(("lambda_ce_context", value) for value in (-0.1, math.nan, math.inf)),
        *(("temperature", value) for value in (0.0, -1.0, math.nan, math.inf)),
        *((name, value) for name in ("initial_keep_ratio", "min_keep_ratio") for value in (0.0, -0.1, 1.1, math.nan)),
        *(("warmup_fraction", value) for value in (-0.1, 1.0, math.nan)),
        *(("reach_fraction", value) for value in (0.05, 1.1, math.nan)),
        *(("step_size", value) for value in (0.0, 1.0, math.nan)),
        *(("ppl_threshold", value) for value in (-0.1, math.nan)),
        *(("seed", value) for value in (-1, 2**32)),
        ("patience", 0),
        ("geometry", "round"),
        ("kl_direction", "sideways"),
        ("ratio_draw", "never"),
        ("scheduler_mode", "hopeful"),
        ("rules", {}),
        ("rules", {"nope": 1.0}),
        ("rules", {"anchor": 0.0}),
        ("rules", {"anchor": math.nan}),
    ],
)
def test_options_of_the_method_are_checked(name, value):
    with pytest.raises(UserError, match=f"--{name}"):
        EITConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, 0) for name in ("num_train_samples", "num_validation_samples", "batch_size", "grad_accum")),
        *((name, 0) for name in ("save_steps", "logging_steps", "max_steps", "lora_alpha", "lr", "num_train_epochs")),
        *((name, -1) for name in ("lora_r", "eval_steps", "weight_decay", "max_grad_norm", "lr", "lora_alpha")),
        *((name, math.nan) for name in ("lr", "lora_alpha", "lora_dropout", "lr_warmup_fraction", "weight_decay")),
        *((name, value) for name in ("lora_dropout", "lr_warmup_fraction") for value in (-0.1, 1.0)),
        ("max_steps", -2),
        ("max_seq_len", 3),
        ("min_cut", 0.0),
        ("min_cut", 0.95),
        ("max_cut", 1.0),
        ("num_cuts", 0),
        ("model", ""),
        ("output_dir", ""),
    ],
)
def test_options_of_a_run_are_checked(name, value):
    with pytest.raises(UserError, match=f"--{name}"):
        TrainConfig(**{**RUN, name: value})


def test_the_ends_of_every_range_are_allowed():
    ends = {"initial_keep_ratio": 1.0, "min_keep_ratio": 1.0, "lambda_kl": 0.0, "warmup_fraction": 0.0}
    ends |= {"reach_fraction": 1.0, "lora_r": 0, "eval_steps": 0, "max_grad_norm": 0.0, "lr_warmup_fraction": 0.0}
    assert TrainConfig(**RUN, **ends, seed=2**32 - 1).lora_r == 0


def test_cuts_must_fit_the_row():
    """Known only with the row's length, before anything is loaded."""
    with pytest.raises(UserError, match=r"--num_cuts 14 .* rows of 20 tokens"):
        TrainConfig(**RUN, max_seq_len=20, num_cuts=14)
    TrainConfig(**RUN, max_seq_len=20, num_cuts=13)  # each of the positions 6 … 18


def test_streaming_takes_a_rule_that_it_can_use():
    """The default mixture scores with the context's end, which a stream does not know; one that is asked for stays."""
    assert EITConfig(geometry="streaming", lambda_selection=0).rules == {"anchor_random": 1.0}
    assert EITConfig(geometry="global", lambda_selection=0).rules == default_rules()
    with pytest.raises(UserError, match="--rules"):
        EITConfig(geometry="streaming", rules={"snapkv": 1.0}, lambda_selection=0)


def test_mutable_defaults_are_not_shared():
    EITConfig().rules["anchor"] = 5.0
    TrainConfig(**RUN).lora_targets.append("gate_proj")
    assert EITConfig().rules == default_rules()
    assert TrainConfig(**RUN).lora_targets == ["q_proj", "k_proj", "v_proj", "o_proj"]


def test_what_the_options_make():
    config = EITConfig(seed=3, num_cuts=2, min_cut=0.5, max_cut=0.75, anchors=AnchorConfig(sink_size=1))
    sampler = config.make_sampler()
    assert sampler == PlanSampler("two_region", default_rules(), 2, 0.5, 0.75, "uniform", 3)
    schedule = config.make_schedule(total_steps=100)
    assert isinstance(schedule, CurriculumScheduler)
    assert schedule.total_steps == 100
    assert (schedule.initial_keep_ratio, schedule.min_keep_ratio) == (0.9, 0.3)


@pytest.mark.parametrize(
    ("name", "control", "options"), [(name, control, words) for name, control, *words in ABLATIONS]
)
def test_every_ablation_can_be_trained_and_differs_from_the_recipe(name, control, options):
    words = ["train", "--config", str(CONFIGS / "smollm2_135m.yaml"), "--output_dir", f"out/{name}"]
    (_, recipe), (_, values) = (parse([*words, *further]) for further in ([], options))
    TrainConfig(**values)
    assert (values == recipe) == (name == "reference")
    assert values["control"] == (control == "-")
    if control != "-":
        [of_control] = [words for known, _, *words in ABLATIONS if known == control]
        _, other = parse([*words, *of_control])
        assert other["control"]
        same = ("max_steps", "num_train_samples", "lambda_ce_context", "lambda_kl", "lambda_context")
        assert {option: other[option] for option in same} == {option: values[option] for option in same}
        if name not in ("reverse_kl", "js", "attention_only"):  # they have the common control (docs/results.md)
            assert all(other[option] == values[option] for option in ("kl_direction", "lora_r", "lora_targets"))
