"""SparseKV: train language models so that evicting their KV cache costs nearly nothing."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsekv.anchor_config import AnchorConfig
    from sparsekv.anchors import AnchorSelector
    from sparsekv.errors import UserError
    from sparsekv.evaluation.comparison.compare import compare
    from sparsekv.evaluation.engine.engine import Engine
    from sparsekv.evaluation.matrix.config import EvalConfig
    from sparsekv.evaluation.matrix.run import evaluate
    from sparsekv.inference.anchor_cache import AnchorCache
    from sparsekv.presses import AnchorPress, make_press
    from sparsekv.training.anchor import build_kv_mask_from_anchors
    from sparsekv.training.config import EITConfig, TrainConfig
    from sparsekv.training.eit_trainer import EITTrainer
    from sparsekv.training.kv_dropout import KVDropoutContext, SDPAKVDropout
    from sparsekv.training.plan import EvictionPlan
    from sparsekv.training.run import train

__all__ = [
    "AnchorCache",
    "AnchorConfig",
    "AnchorPress",
    "AnchorSelector",
    "EITConfig",
    "EITTrainer",
    "Engine",
    "EvalConfig",
    "EvictionPlan",
    "KVDropoutContext",
    "SDPAKVDropout",
    "TrainConfig",
    "UserError",
    "build_kv_mask_from_anchors",
    "compare",
    "evaluate",
    "make_press",
    "train",
]

# Imported at first use: torch and transformers take seconds, and `sparsekv --help` needs neither.
_HOMES = {
    "anchor_config": ("AnchorConfig",),
    "anchors": ("AnchorSelector",),
    "errors": ("UserError",),
    "evaluation.comparison.compare": ("compare",),
    "evaluation.engine.engine": ("Engine",),
    "evaluation.matrix.config": ("EvalConfig",),
    "evaluation.matrix.run": ("evaluate",),
    "inference.anchor_cache": ("AnchorCache",),
    "presses": ("AnchorPress", "make_press"),
    "training.anchor": ("build_kv_mask_from_anchors",),
    "training.config": ("EITConfig", "TrainConfig"),
    "training.eit_trainer": ("EITTrainer",),
    "training.kv_dropout": ("KVDropoutContext", "SDPAKVDropout"),
    "training.plan": ("EvictionPlan",),
    "training.run": ("train",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
