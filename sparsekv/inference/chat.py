"""`sparsekv chat`: turn after turn on one cache, by a person or from a pipe."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator

from sparsekv.errors import UserError
from sparsekv.inference.config import ChatConfig
from sparsekv.inference.generate import read_file
from sparsekv.inference.session import Held, Session
from sparsekv.prompts import encode, next_turn, open_turn


def chat(config: ChatConfig) -> None:
    """Answer each line of the standard input on the standard output, until it ends.

    Each turn is appended to what the cache has read, so nothing is ever read twice.

    Raises
    ------
    UserError
        Names the flag; and for a turn that no longer fits into the model's positions.
    """
    document = read_file(config.prompt_file) if config.prompt_file is not None else ""
    session = Session(config)
    template = config.chat_template, config.enable_thinking
    before, after = open_turn(session.tokenizer, document, *template)
    between = next_turn(session.tokenizer, *template)
    if document:
        context = encode(session.tokenizer, before)
        session.require_room(context.shape[1], f"--prompt_file {config.prompt_file}")
        session.read(context)
        print(f"[{Held.by(session.cache)}]", file=sys.stderr)
        before = "\n\n"
    for text in turns():
        ids = encode(session.tokenizer, before + text + after)
        session.require_room(ids.shape[1], "this turn")
        streamer = session.answer(ids)
        print(f"[{streamer.speed}; {Held.by(session.cache)}]", file=sys.stderr)
        before = between


def turns() -> Iterator[str]:
    """Lines of the standard input that are not blank; at a terminal, asked for."""
    prompt = "> " if sys.stdin.isatty() else ""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="strict")  # in some locales it lets any byte pass
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise UserError("standard input: it is not UTF-8 text") from error
        if line:
            yield line
