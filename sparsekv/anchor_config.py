"""Which tokens are anchors: the options, of whoever trains, analyzes or decodes with them."""

from dataclasses import dataclass

from sparsekv.errors import UserError


@dataclass(frozen=True)
class AnchorConfig:
    """Which tokens are anchors.

    Attributes
    ----------
    use_special : bool
        Keep special tokens (see `sparsekv.tokens`).
    use_punctuation : bool
        Keep punctuation.
    use_sink : bool
        Keep the first real tokens of the context.
    use_recent : bool
        Keep the last real tokens before the cut.
    sink_size : int
        How many first tokens, 0 or more.
    recent_size : int
        How many last tokens, 0 or more.
    extra_punctuation : str
        Characters to count as punctuation besides the Unicode ones.

    Raises
    ------
    UserError
        If a size is not a whole number of 0 or more.
    """

    use_special: bool = True
    use_punctuation: bool = True
    use_sink: bool = True
    use_recent: bool = True
    sink_size: int = 4
    recent_size: int = 64
    extra_punctuation: str = ""

    def __post_init__(self) -> None:
        for name in ("sink_size", "recent_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 0:
                raise UserError(f"--anchors.{name} {value!r}: must be a whole number of tokens, 0 or more")
