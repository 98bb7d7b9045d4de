"""`sparsekv generate`: an answer to a long text, with a cache that keeps little of it."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from torch import Tensor

from sparsekv.errors import UserError, require
from sparsekv.inference.config import GenerateConfig
from sparsekv.inference.session import Held, Session
from sparsekv.prompts import encode_prompt


def generate(config: GenerateConfig) -> None:
    """Write the answer to the standard output as it comes, and what it cost to the standard error.

    Raises
    ------
    UserError
        Names the flag.
    """
    text = read_file(str(config.prompt_file))
    session = Session(config)
    context, rest = encode(session, text, config.question)
    session.require_room(context.shape[1] + rest.shape[1], f"--prompt_file {config.prompt_file}")
    session.fix_shapes(rest.shape[1] + config.max_new_tokens)
    start = time.perf_counter()
    session.read(context)
    held = Held.by(session.cache)
    streamer = session.answer(rest)
    print(f"context: {held}", file=sys.stderr)
    print(f"answer: {streamer.speed}, the first after {streamer.times[1] - start:.1f} s", file=sys.stderr)


def encode(session: Session, text: str, question: str = "") -> tuple[Tensor, Tensor]:
    """Long[1, C], Long[1, R]: the context, and what the model reads after it was evicted, one token at least."""
    config, tokenizer = session.config, session.tokenizer
    asked = f"\n\n{question}" if question else ""
    how = {"chat_template": config.chat_template, "enable_thinking": config.enable_thinking}
    context, (rest,) = encode_prompt(tokenizer, text, [asked], "", **how)
    plain = tokenizer.chat_template is None or not config.chat_template
    if plain and not question:  # to be continued where it ends
        require(context.shape[1] > 1, f"--prompt_file {config.prompt_file}: is too short; give two tokens or more")
        return context[:, :-1], context[:, -1:]
    return context, rest


def read_file(name: str) -> str:
    """The text of --prompt_file.

    Raises
    ------
    UserError
    """
    try:
        content = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"--prompt_file {name}: it is not UTF-8 text (byte 0x{content[error.start]:02x})") from error
    except OSError as error:
        raise UserError(f"--prompt_file {name}: it cannot be read ({error.strerror or error})") from error
    require(bool(text.strip()), f"--prompt_file {name}: it holds no text")
    return text
