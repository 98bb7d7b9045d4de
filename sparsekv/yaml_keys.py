"""Keys that a YAML text gives twice: its readers take the last one, and say nothing."""

from collections.abc import Iterator

import yaml

from sparsekv.errors import UserError


def check_keys(text: str, where: str) -> None:
    """Raise UserError, beginning with `where`, if a key stands twice in one mapping of a YAML text.

    A text that is not YAML passes: its reader will say so.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError):
        return
    for mapping in _mappings(root):
        seen = set()
        for key, _ in mapping.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                line = key.start_mark.line + 1
                raise UserError(f"{where}: gives {key.value} twice{f', again in line {line}' * (line > 1)}; keep one")
            seen.add(key.value)


def _mappings(root: yaml.Node | None) -> Iterator[yaml.MappingNode]:
    """Each once: an alias is the node that it names, which may hold itself."""
    waiting, seen = [root], set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen or not isinstance(node, yaml.CollectionNode):
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            yield node
            waiting += [part for pair in reversed(node.value) for part in reversed(pair)]
        else:
            waiting += reversed(node.value)
