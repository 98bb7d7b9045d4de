"""The classes of tokens: `sparsekv.tokens` says which token is of which."""

from enum import IntEnum


class TokenClass(IntEnum):
    """What a token is; every vocabulary id has exactly one class."""

    SPECIAL = 0
    PUNCTUATION = 1
    NUMBER = 2
    WHITESPACE = 3
    STOPWORD = 4
    CONTENT = 5
