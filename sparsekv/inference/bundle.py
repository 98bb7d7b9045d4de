"""Definitions and all that they need of this package, as the text of one module that imports nothing of it."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "sparsekv"


@dataclass(frozen=True)
class _Module:
    """What the names of a module stand for."""

    lines: list[str]
    definitions: dict[str, ast.stmt]
    own_imports: dict[str, tuple[str, str]]  # name → module of this package and name there
    other_imports: dict[str, tuple[str, str]]  # name → module, or "" where it is one, and what is imported


@functools.cache
def _module(name: str) -> _Module:
    spec = find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    text = Path(spec.origin).read_text("utf-8")
    module = _Module(text.splitlines(), {}, {}, {})
    for node in _statements(ast.parse(text).body):
        if isinstance(node, ast.Import | ast.ImportFrom):
            _add_import(module, node)
        for target in _names_defined(node):
            module.definitions[target] = node
    return module


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Top-level statements, and the imports under `if TYPE_CHECKING`."""
    for node in body:
        yield from node.body if isinstance(node, ast.If) else [node]


def _names_defined(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _add_import(module: _Module, node: ast.Import | ast.ImportFrom) -> None:
    for alias in node.names:
        known = alias.asname or alias.name.split(".")[0]
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
            module.own_imports[known] = str(node.module), alias.name
        else:
            home = str(node.module) if isinstance(node, ast.ImportFrom) else ""
            module.other_imports[known] = home, ast.unparse(alias)


@dataclass
class _Bundle:
    replaced: Mapping[str, str]
    done: dict[str, str] = field(default_factory=dict)  # name → module
    imports: set[tuple[str, str]] = field(default_factory=set)
    parts: list[str] = field(default_factory=list)

    def add(self, module: str, name: str) -> None:
        """What a name in a module stands for, after all that it needs."""
        known = _module(module)
        if name in known.own_imports:
            self.add(*known.own_imports[name])
        elif name in known.definitions:
            self._define(module, name, known.definitions[name])
        elif name in known.other_imports:
            self.imports.add(known.other_imports[name])

    def _define(self, module: str, name: str, node: ast.stmt) -> None:
        if name in self.done:
            if self.done[name] != module:
                raise ValueError(f"{name} is defined in {self.done[name]} and in {module}")
            return
        self.done[name] = module
        text = self.replaced.get(f"{module}.{name}")
        node = node if text is None else ast.parse(text)  # type: ignore[assignment]
        for needed in sorted({part.id for part in ast.walk(node) if isinstance(part, ast.Name)}):
            self.add(module, needed)
        self.parts.append(_source(_module(module).lines, node) if text is None else text.strip())


def _source(lines: list[str], node: ast.stmt) -> str:
    """The lines of a definition with its decorators and the comments above it."""
    decorators = getattr(node, "decorator_list", [])
    first = min([node.lineno, *(decorator.lineno for decorator in decorators)]) - 1
    while first and lines[first - 1].startswith("#"):
        first -= 1
    return "\n".join(lines[first : node.end_lineno])


def bundle(module: str, name: str, head: str, replaced: Mapping[str, str]) -> str:
    """The text of a module that defines `name` as `module` does.

    Parameters
    ----------
    module, name : str
        Where to begin; what it uses, and what that uses, comes with it.
    head : str
        Docstring of the new module.
    replaced : mapping
        module.name → the text to define it with instead.

    Returns
    -------
    str
        Python text; each definition as it stands in its own module.

    Raises
    ------
    ValueError
        If two modules define the same name.
    """
    made = _Bundle(replaced)
    made.add(module, name)
    parts = [f'"""{head}"""', "from __future__ import annotations", _import_lines(made.imports)]
    return "\n\n".join(parts) + "\n\n\n" + "\n\n\n".join(made.parts) + "\n"


def _import_lines(imports: set[tuple[str, str]]) -> str:
    whole = sorted(f"import {name}" for home, name in imports if not home)
    homes = sorted({home for home, _ in imports if home})
    parts = [f"from {home} import {', '.join(sorted(name for h, name in imports if h == home))}" for home in homes]
    return "\n".join(whole + parts)
