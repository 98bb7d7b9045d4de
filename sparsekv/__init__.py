"""SparseKV: train language models so that evicting their KV cache costs nearly nothing."""

from sparsekv.errors import UserError
from sparsekv.presses import AnchorPress, make_press
from sparsekv.training.anchor import AnchorConfig, AnchorSelector, build_kv_mask_from_anchors
from sparsekv.training.config import EITConfig, TrainConfig
from sparsekv.training.eit_trainer import EITTrainer
from sparsekv.training.kv_dropout import KVDropoutContext, SDPAKVDropout
from sparsekv.training.plan import EvictionPlan
from sparsekv.training.run import train

__all__ = [
    "AnchorConfig",
    "AnchorPress",
    "AnchorSelector",
    "EITConfig",
    "EITTrainer",
    "EvictionPlan",
    "KVDropoutContext",
    "SDPAKVDropout",
    "TrainConfig",
    "UserError",
    "build_kv_mask_from_anchors",
    "make_press",
    "train",
]
