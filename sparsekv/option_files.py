"""Options in files, and mappings typed as flags: what is wrong in them is one line that names where."""

import contextlib
import dataclasses
import difflib
from collections.abc import Iterator
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, cast, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from sparsekv.cluster.schema import read_yaml
from sparsekv.commands import COMMANDS
from sparsekv.errors import UserError, require
from sparsekv.parser_messages import one_line
from sparsekv.yaml_keys import check_keys

# Options that hold entries with options of their own, and where the dataclass of those is.
ENTRIES = {
    "runs": "sparsekv.evaluation.matrix.config:RunConfig",
    "benchmarks": "sparsekv.evaluation.matrix.config:Suite",
}


def options_of(schema: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(name, type) of every option of a dataclass; of those of a dataclass within, `anchors.sink_size` and its like."""
    for name, kind in get_type_hints(schema).items():
        yield prefix + name, kind
        if dataclasses.is_dataclass(kind):
            yield from options_of(cast(type, kind), f"{prefix}{name}.")


@contextlib.contextmanager
def reading(where: str) -> Iterator[None]:
    """Inside, what makes a file of options unreadable becomes one line."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: the file is not UTF-8 text") from error
    except RecursionError as error:
        raise UserError(f"{where}: the file is nested too deeply, or holds itself") from error


def check_value(flag: str, value: str, command: str, schema: type) -> None:
    """Raise UserError for a file of options, or for a mapping that is typed, that the command cannot use."""
    typed = value.startswith(("{", "["))
    if value.startswith("--"):  # the flag lacks its value, which the parser says
        return
    if flag == "--config" and not typed:
        _check_file(flag, value, command, schema)
    elif flag == "--anchors" and not typed:
        _check_anchors(value)
    elif typed and _holds_mappings(dict(options_of(schema)).get(flag[2:])):
        check_keys(value, f"{flag} {value}")
        with contextlib.suppress(yaml.YAMLError, ValueError, RecursionError):  # said by the parser
            check_options({flag[2:]: yaml.safe_load(value)}, command, schema, "--")


def _holds_mappings(kind: Any) -> bool:
    return any(get_origin(part) is dict or dataclasses.is_dataclass(part) for part in (kind, *get_args(kind)))


def _check_file(flag: str, file: str, holder: str, schema: type) -> Namespace:
    """The options that a file gives; raises UserError, naming the file, as the error within names an option only."""
    where = f"{flag} {file}"
    values = read_yaml(Path(file), flag)
    require(bool(values), f"{where}: the file holds no options")
    check_options(values, holder, schema, f"{where}: ")
    try:
        with reading(where):
            return _parser(schema).parse_path(file)
    except (ArgumentError, TypeError) as error:  # TypeError: no such file
        raise UserError(f"{where}: {one_line(error).removeprefix('--config: ')}") from error


def _parser(schema: type) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(schema, as_group=False)
    return parser


def _check_anchors(file: str) -> None:
    config = resolve_name("sparsekv.anchors:AnchorConfig")
    options = _check_file("--anchors", file, "a file of anchors", config)
    try:
        config(**options.as_dict())
    except UserError as error:
        raise UserError(f"--anchors {file}: {error}") from error


def check_options(values: dict[Any, Any], holder: str, schema: type, lead: str) -> None:
    """Raise UserError, beginning with `lead` and `holder`, for a key that is no option of the dataclass."""
    known = dict(options_of(schema))
    for key, value in values.items():
        if key not in known:
            raise UserError(f"{lead}{holder} has no option {str(key)!r}{_hint(str(key), known, holder)}")
        if dataclasses.is_dataclass(known[key]) and isinstance(value, dict):
            check_options(value, key, cast(type, known[key]), lead)
        if key in ENTRIES:
            for name, entry in _named(value):
                _check_entry(entry, f"{key}: {name}", resolve_name(ENTRIES[key]), lead)


def _hint(key: str, known: dict[str, Any], holder: str) -> str:
    """The commands whose option it is, where it is asked of another one; or the option that it may be meant for."""
    schemas = {name: command.schema for name, command in COMMANDS.items() if command.schema and holder in COMMANDS}
    owners = [name for name, schema in schemas.items() if key in dict(options_of(resolve_name(schema)))]
    near = difflib.get_close_matches(key, known, n=1)
    return f"; it is of {', '.join(owners)}" if owners else f"; did you mean {near[0]}?" if near else ""


def _named(entries: Any) -> list[tuple[str, Any]]:
    """(name, entry) of a mapping, or of a list whose entries may tell their names."""
    if isinstance(entries, dict):
        return [(str(name), entry) for name, entry in entries.items()]
    numbered = enumerate(entries, start=1) if isinstance(entries, list) else ()
    names = [(entry.get("name") if isinstance(entry, dict) else None, number, entry) for number, entry in numbered]
    return [(str(name or f"entry {number}"), entry) for name, number, entry in names]


def _check_entry(entry: Any, name: str, schema: type, lead: str) -> None:
    options = ", ".join(option for option, _ in options_of(schema))
    require(isinstance(entry, dict), f"{lead}{name}: must be a mapping of {options}, not {entry!r}")
    check_options(entry, name, schema, lead)
    try:
        _parser(schema).parse_object(entry)
    except ArgumentError as error:
        raise UserError(f"{lead}{name}: {one_line(error)}") from error
