"""A press's parameters from text: `snapkv:window_size=32` → a SnapKVPress whose window is 32."""

import inspect
import types
from typing import Any, Literal, TypeAlias, TypeVar, Union, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser
from kvpress import BasePress

from sparsekv.anchors import AnchorConfig
from sparsekv.errors import UserError, require

RATIOS = ("compression_ratio", "head_compression_ratio", "key_channel_compression_ratio", "target_compression_ratio")
# Numbers that the presses divide by, or make slices and averages of: with 0 they fail in a cell, or score nothing.
AT_LEAST_ONE = (
    *("beta", "block_size", "chunk_length", "chunk_size", "kernel_size", "lag_size", "local_window_size"),
    *("n_future_positions", "sketch_dimension", "window_size"),
)
Configured: TypeAlias = BasePress | AnchorConfig
T = TypeVar("T", bound=Configured)


def split_spec(spec: str) -> tuple[str, dict[str, str]]:
    """`name:param=value:…` → name and values, as text."""
    name, *pairs = spec.split(":")
    for pair in pairs:
        if "=" not in pair:
            raise UserError(f"--presses {spec!r}: {pair!r} is not param=value, as in snapkv:window_size=32")
    return name, dict(pair.split("=", 1) for pair in pairs)


def parse_parameters(spec: str, press: BasePress, texts: dict[str, str]) -> dict[str, Any]:
    """The values by the types of the press's parameters.

    Raises
    ------
    UserError
        If the press has no such parameter (its parameters are named) or the text is no such value.
    """
    known = _parameters(press)
    values = {}
    for name, text in texts.items():
        if name not in known:
            has = f"its parameters are {', '.join(sorted(known))}" if known else "it has no parameters"
            raise UserError(f"--presses {spec!r}: no parameter {name!r}; {has}")
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--value", type=known[name])
        try:
            values[name] = parser.parse_args([f"--value={text}"]).value
        except ArgumentError as error:
            kind = known[name]
            wanted = kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
            raise UserError(f"--presses {spec!r}: {name} must be {wanted}, not {text!r}") from error
        counts = isinstance(values[name], int) and name != "seed"  # tokens, heads, layers
        least = int(name in AT_LEAST_ONE)
        require(not counts or values[name] >= least, f"--presses {spec!r}: {name} must be {least} or more, not {text}")
        centred = name != "kernel_size" or values[name] % 2 == 1
        require(centred, f"--presses {spec!r}: {name} must be odd, not {text}")
    return values


def with_parameters(press: T, values: dict[str, Any]) -> T:
    """The press, or what it is configured with, made anew so that its own checks see the values.

    Of nested presses the outermost that has a parameter takes it out of `values`.
    """
    arguments = {name: getattr(press, name) for name in inspect.signature(type(press)).parameters}
    arguments |= {name: values.pop(name) for name in arguments.keys() & values.keys()}
    for name, value in arguments.items():
        if isinstance(value, Configured):
            arguments[name] = with_parameters(value, values)
        elif isinstance(value, list):  # ComposedPress
            arguments[name] = [with_parameters(part, values) for part in value]
    return type(press)(**arguments)


def nested(press: BasePress) -> list[BasePress]:
    """The press and every press within it, outermost first."""
    return [part for part in _parts(press) if isinstance(part, BasePress)]


def _parts(press: Configured) -> list[Configured]:
    values = [getattr(press, name) for name in inspect.signature(type(press)).parameters]
    inner = [part for value in values for part in (value if isinstance(value, list) else [value])]
    return [press, *(part for one in inner if isinstance(one, Configured) for part in _parts(one))]


def _parameters(press: BasePress) -> dict[str, Any]:
    """Parameter → type, of the press and all within it, but for the ratio."""
    known: dict[str, Any] = {}
    for part in _parts(press):
        hints = get_type_hints(type(part).__init__)
        for name in inspect.signature(type(part)).parameters:
            if name not in RATIOS and _is_plain(hints[name]):
                known.setdefault(name, hints[name])
    return known


def _is_plain(hint: Any) -> bool:
    """Whether text can give a value of this type: a number, a word, a choice, or none."""
    if get_origin(hint) in (Union, types.UnionType):
        return all(_is_plain(part) for part in get_args(hint))
    return get_origin(hint) is Literal or hint in (bool, int, float, str, types.NoneType)
