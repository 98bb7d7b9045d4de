"""What jsonargparse says of bad input, in a line of our own."""

import re

POSITIONALS = ("folders", "results", "target")
# What jsonargparse says of a value of another kind, and of each kind that would be right.
MISTYPED = re.compile(r"(--[\w.]+): (?:Expected a|Does not validate) .*(?:Got|Given) value: (.*)")
KIND = re.compile(r"Expected a (?:<class '(\w+)'>|typing\.Literal\[([^]]+)\])")
KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "list": "a list such as [a, b]",
    "dict": "a mapping such as {a: 1, b: 2}",
}


def _mistyped(said: re.Match[str]) -> str:
    """`--ratio abc: must be a number`; unchanged where a kind has no plain name."""
    found = [kind for kind in KIND.findall(said[0]) if kind[0] != "NoneType"]
    kinds = [KINDS.get(name) or options.replace("'", "").replace(", ", " or ") for name, options in found]
    plain = all(kinds) and said[0].count("Expected a ") == len(KIND.findall(said[0]))
    return f"{said[1]} {said[2]}: must be {' or '.join(kinds)}" if plain else said[0]


def one_line(error: Exception) -> str:
    """jsonargparse's message of several lines as one, with the flag as it is typed."""
    message = " ".join(str(error).split())
    for theirs, ours in (
        ('Parser key "', "--"),
        ('":', ":"),
        ("Problems parsing config", "--config"),
        ("Unexpected config", "--config: the file holds no options"),
    ):
        message = message.replace(theirs, ours)
    refused = r"(?:Subcommand|Group) '(\w+)' does not accept option ('[^']+')"
    message = re.sub(refused, r"--config: \1 has no option \2", message)
    if message.startswith("the following arguments are required"):
        message = re.sub(r"\w+\.(\w+)", lambda name: name[1] if name[1] in POSITIONALS else f"--{name[1]}", message)
    return MISTYPED.sub(_mistyped, message)
