"""The two networks of a training: the student, and the teacher that it is held to where that is not its own base."""

from collections.abc import Iterable

from peft import LoraConfig, PeftModel, PeftType
from transformers import PreTrainedModel, TrainingArguments

from sparsekv.errors import UserError, require
from sparsekv.models import attach_lora, load_adapter, load_merged, load_model
from sparsekv.training.config import TrainConfig

Networks = tuple[PreTrainedModel | PeftModel, PreTrainedModel | None]
FLAG = "--teacher_adapter"


def student_and_teacher(base: PreTrainedModel, config: TrainConfig, args: TrainingArguments) -> Networks:
    """What is trained, and a frozen model beside it, if one is needed: a new adapter's teacher is the base below it.

    Raises
    ------
    UserError
        If the adapter that is asked for cannot be made, read, or trained further.
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
    teacher = load_model(config.model, dtype, config.device_map, config.trust_remote_code)
    if config.teacher_adapter is not None:
        teacher = load_merged(teacher, config.teacher_adapter, FLAG)
    return student, teacher.eval().requires_grad_(False)


def _student(base: PreTrainedModel, config: TrainConfig) -> PreTrainedModel | PeftModel:
    if config.teacher_adapter is not None:
        student = load_adapter(base, config.teacher_adapter, FLAG, is_trainable=True)
        _check_lora(student, config)
        return student
    if config.lora_r:
        return attach_lora(base, config.lora_r, config.lora_alpha, config.lora_targets, config.lora_dropout)
    return base


def _check_lora(student: PeftModel, config: TrainConfig) -> None:
    """Raise UserError unless the adapter is what the options of this run would make."""
    saved = student.peft_config["default"]
    adapter = f"{FLAG} {config.teacher_adapter}"
    if not isinstance(saved, LoraConfig):
        raise UserError(f"{adapter}: holds no LoRA adapter, but one of {PeftType(saved.peft_type).value}")
    for flag, before, now in (
        ("lora_r", saved.r, config.lora_r),
        ("lora_alpha", saved.lora_alpha, config.lora_alpha),
        ("lora_targets", _names(saved.target_modules), _names(config.lora_targets)),
        ("lora_dropout", saved.lora_dropout, config.lora_dropout),
    ):
        require(before == now, f"--{flag} {now}: {adapter} has {before}; give that")


def _names(modules: str | Iterable[str] | None) -> str:
    """As they are typed, in an order of their own; peft allows a pattern in place of names."""
    return modules if isinstance(modules, str) else f"[{', '.join(sorted(modules or ()))}]"
