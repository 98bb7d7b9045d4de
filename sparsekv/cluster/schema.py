"""YAML files → dataclasses, command-line options → dataclasses; what is wrong is one line."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser

from sparsekv.errors import UserError, require
from sparsekv.yaml_keys import check_keys

T = TypeVar("T")


def read_yaml(path: Path, flag: str) -> dict[str, Any]:
    """The mapping in a YAML file; one that is empty or all comments gives {}.

    Raises
    ------
    UserError
        Names the flag and the file: it is missing, or not YAML, or no mapping, or gives a key twice.
    """
    try:
        text = path.read_text("utf-8")
        content = yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{flag} {path}: is not UTF-8 text (byte 0x{error.object[error.start]:02x})") from error
    except RecursionError as error:
        raise UserError(f"{flag} {path}: is nested too deeply, or holds itself") from error
    except yaml.MarkedYAMLError as error:
        line = f" (line {error.problem_mark.line + 1})" if error.problem_mark else ""
        raise UserError(f"{flag} {path}: is not YAML: {error.problem}{line}") from error
    except (yaml.YAMLError, ValueError) as error:  # a character that YAML forbids; a date that there is not
        raise UserError(f"{flag} {path}: is not YAML: {' '.join(str(error).split())}") from error
    content = {} if content is None else content
    require(isinstance(content, dict), f"{flag} {path}: must hold `key: value` lines")
    check_keys(text, f"{flag} {path}")
    return content


def make(schema: type[T], values: Any, where: str) -> T:
    """An object of a dataclass from plain values, checked.

    Raises
    ------
    UserError
        Begins with `where`: an unknown key (with the known ones), a missing or wrong value.
    """
    known = [field.name for field in dataclasses.fields(schema)]  # type: ignore[arg-type]
    require(isinstance(values, dict), f"{where}: must be a mapping of {', '.join(known)}, not {values!r}")
    for key in values:
        require(key in known, f"{where}: unknown key {key!r}; known are {', '.join(known)}")
    for name, kind in get_type_hints(schema).items():
        if name in values:
            require(_fits(values[name], kind), f"{where}: {name}: must be {_named(kind)}, not {values[name]!r}")
    lacking = [name for name in known if name not in values and _required(schema, name)]
    require(not lacking, f"{where}: {', '.join(lacking)} missing")
    try:
        return schema(**values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _required(schema: Any, name: str) -> bool:
    field = schema.__dataclass_fields__[name]
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _fits(value: Any, kind: Any) -> bool:
    """Whether a plain value is of a type; text is never read as something else."""
    if kind is Any:
        return True
    if kinds := [part for part in get_args(kind) if get_origin(kind) in (Union, UnionType)]:
        return any(_fits(value, part) for part in kinds)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(item, get_args(kind)[0]) for item in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    plain = get_origin(kind) or kind
    return isinstance(value, plain) and (kind is bool or not isinstance(value, bool))


def _named(kind: Any) -> str:
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "empty"}
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(map(_named, get_args(kind)))
    return names.get(kind, "a list of texts" if get_origin(kind) is list else "a mapping")


def from_options(schema: type[T], options: Sequence[str]) -> T:
    """What the command whose options `schema` describes would run with; raises as the command line does."""
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action=ActionConfigFile)
    parser.add_class_arguments(schema, as_group=False)
    values = parser.instantiate(parser.parse_args(list(options))).as_dict()
    values.pop("config", None)
    return schema(**values)
