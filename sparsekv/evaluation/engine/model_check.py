"""Which models the engine can evaluate."""

from typing import Any

from transformers import PreTrainedConfig

from sparsekv.errors import require
from sparsekv.models import logit_changes, other_layers

MOVING_ROPE = ("dynamic", "longrope")


def check_model(config: PreTrainedConfig, name: str) -> None:
    """Refuse what would be answered wrongly, from a model's configuration alone.

    Raises
    ------
    UserError
        For a model without grouped key/value heads in its configuration, with layers of another kind than full
        attention (presses are not made for them), with keys of another width than its values, or with rotary
        frequencies that depend on the longest row of a batch.
    """
    heads = hasattr(config, "num_key_value_heads")
    require(heads, f"--model {name}: {config.model_type} has no num_key_value_heads; give a Llama-like model")
    widths = {getattr(config, name, None) for name in ("qk_head_dim", "v_head_dim")} - {None}
    reason = f"{config.model_type} has keys of another width than its values; give a model of one width"
    require(len(widths) < 2, f"--model {name}: {reason}")
    others = ", ".join(sorted(other_layers(config)))
    require(not others, f"--model {name}: has {others} layers, and presses are made for full attention in every layer")
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = rope.get("rope_type", rope.get("type"))
    reason = f"rotary type {kind} depends on the longest row of a batch; give one of fixed frequencies"
    require(kind not in MOVING_ROPE, f"--model {name}: {reason}")


def check_plain_logits(config: PreTrainedConfig, name: str) -> None:
    """Raise UserError for a model whose logits are not its head's output: a likelihood would be another's."""
    changes = ", ".join(logit_changes(config))
    require(not changes, f"--model {name}: its logits are changed by {changes}, which a likelihood does not know")
