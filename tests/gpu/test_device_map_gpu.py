"""A model spread over devices trains: every mask lives on its layer's device."""

from pathlib import Path

import pytest
import torch
from accelerate.hooks import attach_align_device_hook_on_blocks
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel, TrainingArguments

from sparsekv.training.config import EITConfig
from sparsekv.training.eit_trainer import EITTrainer
from tests.tiny import make_tiny, make_tiny_tokenizer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": 0,
    "model.norm": 0,
    "lm_head": 0,
}


def spread(model: PreTrainedModel) -> None:
    """Lay the modules out as `device_map` does for several GPUs, with the CPU as one of them."""
    for name, device in DEVICES.items():
        model.get_submodule(name).to(device)
    attach_align_device_hook_on_blocks(model, execution_device=DEVICES, offload=dict.fromkeys(DEVICES, False))
    model.hf_device_map = DEVICES


def losses(out: Path, on_two_devices: bool) -> list[float]:
    model = make_tiny("llama")
    if on_two_devices:
        spread(model)
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
    generator = torch.Generator().manual_seed(0)
    rows = Dataset.from_dict({"input_ids": torch.randint(5, 300, (8, 160), generator=generator).tolist()})
    args = TrainingArguments(
        output_dir=str(out),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=not on_two_devices,
    )
    config = EITConfig(scheduler_mode="fixed", num_cuts=2, min_cut=0.6, lambda_context=0.5, lambda_selection=0)
    trainer = EITTrainer(adapted, config, make_tiny_tokenizer(), args, train_dataset=rows)
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_losses_equal_those_on_one_device(tmp_path: Path) -> None:
    spread_out, together = losses(tmp_path / "two", True), losses(tmp_path / "one", False)
    assert spread_out == pytest.approx(together, abs=1e-3)
