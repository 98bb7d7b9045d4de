"""What a press needs of the forward pass whose cache it evicts."""

from kvpress import BasePress, ComposedPress, FinchPress, ObservedAttentionPress

from sparsekv.presses.anchor_press import AnchorPress
from sparsekv.presses.parameters import nested

# These only watch the embedding, for the tokens or for a delimiter.
_CONTEXTS = (BasePress.__call__, AnchorPress.__call__, FinchPress.__call__)
_HOOKS = (BasePress.forward_hook, ComposedPress.forward_hook)


def shares_prefill(press: BasePress) -> bool:
    """Whether the press only reads one full-attention prefill, by kvpress's hook after each attention layer.

    False where it, or a press within it, runs the model again, or acts while the model decodes.
    """
    return all(type(part).__call__ in _CONTEXTS and type(part).forward_hook in _HOOKS for part in nested(press))


def needs_eager(press: BasePress) -> bool:
    """Whether the press reads attention weights, which only eager attention hands out."""
    return any(isinstance(part, ObservedAttentionPress) for part in nested(press))


def needs_question(press: BasePress) -> bool:
    """Whether the press reads the question at the end of the context (its `window_size` last tokens)."""
    return any(isinstance(part, FinchPress) for part in nested(press))
