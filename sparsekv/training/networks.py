"""The two networks of a training: the student, and the teacher that it is held to where that is not its own base."""

from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, TrainingArguments

from sparsekv.adapters import adapter_settings, attach_lora, load_adapter
from sparsekv.errors import require
from sparsekv.models import load_model
from sparsekv.training.config import TrainConfig

Networks = tuple[PreTrainedModel | PeftModel, PreTrainedModel | None]
FLAG = "--teacher_adapter"


def check_teacher_adapter(config: TrainConfig) -> None:
    """Raise UserError unless the adapter in that folder, if one is named, is such as the options would make."""
    if config.teacher_adapter is None:
        return
    saved, adapter = adapter_settings(config.teacher_adapter, FLAG), f"{FLAG} {config.teacher_adapter}"
    require(saved["peft_type"] == "LORA", f"{adapter}: holds no LoRA adapter, but one of {saved['peft_type']}")
    made = {
        "lora_r": saved.get("r"),
        "lora_alpha": saved.get("lora_alpha"),
        "lora_targets": _sorted(saved.get("target_modules")),
        "lora_dropout": saved.get("lora_dropout"),
    }
    named = isinstance(made["lora_targets"], list)
    require(named, f"{adapter}: was made for {made['lora_targets']}; one is wanted whose target_modules are names")
    asked = {name: getattr(config, name) for name in made} | {"lora_targets": _sorted(config.lora_targets)}
    others = [f"--{name} {_typed(value)}" for name, value in made.items() if value != asked[name]]
    require(not others, f"{adapter}: was made with {', '.join(others)}; give the same")


def student_and_teacher(base: PreTrainedModel, config: TrainConfig, args: TrainingArguments) -> Networks:
    """What is trained, and a frozen model beside it, if one is needed: a new adapter's teacher is the base below it.

    Raises
    ------
    UserError
        If the adapter that is asked for cannot be made, or does not fit the base.
    """
    student = _student(base, config)
    if isinstance(student, PeftModel) and args.should_log:
        trainable, total = student.get_nb_trainable_parameters()
        print(f"trainable parameters: {trainable:,} of {total:,} ({trainable / total:.2%})")
    elif args.should_log:
        print("trainable parameters: all")
    own_base = config.lora_r > 0 and config.teacher_adapter is None
    if own_base or not config.needs_teacher:
        return student, None
    # Under autocast a teacher of half the size computes the same; without it, only one of the student's dtype does.
    dtype = config.dtype if args.bf16 else str(base.dtype).removeprefix("torch.")
    teacher: Any = load_model(config.model, dtype, config.device_map, config.trust_remote_code)
    if config.teacher_adapter is not None:  # not merged, which would round it
        teacher = load_adapter(teacher, config.teacher_adapter, FLAG).get_base_model()
    return student, teacher.eval().requires_grad_(False)


def _student(base: PreTrainedModel, config: TrainConfig) -> PreTrainedModel | PeftModel:
    if config.teacher_adapter is not None:
        student = load_adapter(base, config.teacher_adapter, FLAG, is_trainable=True)
        student.peft_config["default"].base_model_name_or_path = base.name_or_path  # as it is called here
        return student
    if config.lora_r:
        return attach_lora(base, config.lora_r, config.lora_alpha, config.lora_targets, config.lora_dropout)
    return base


def _sorted(names: Any) -> Any:
    """A list of names in an order of its own; peft allows a pattern in place of it."""
    return sorted(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else names


def _typed(value: Any) -> str:
    return f"[{', '.join(value)}]" if isinstance(value, list) else str(value)
