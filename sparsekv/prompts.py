"""Text → tokens: the context that is evicted, what follows the cut, and further turns."""

from collections.abc import Sequence

from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sparsekv.errors import UserError, require


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    context: str,
    questions: Sequence[str],
    answer_prefix: str,
    *,
    chat_template: bool = True,
    enable_thinking: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """Token ids of a context and of its questions, token for token those of kvpress's pipeline.

    The context opens a user's turn, the question ends it, and the answer's prefix begins the assistant's: only the
    context is evicted. Without a chat template the context follows the BOS token and a line break ends the question.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
    context : str
    questions : sequence of str
        Asked about the same context, each on its own.
    answer_prefix : str
        Beginning of every answer.
    chat_template : bool
        False: as for a tokenizer without a template.
    enable_thinking : bool
        Handed to the template.

    Returns
    -------
    Long[1, C], list of Long[1, Q]
    """
    opened, after = open_turn(tokenizer, context, chat_template, enable_thinking)
    return (
        encode(tokenizer, opened),
        [encode(tokenizer, question + after + answer_prefix) for question in questions],
    )


def open_turn(
    tokenizer: PreTrainedTokenizerBase, context: str, chat_template: bool, enable_thinking: bool
) -> tuple[str, str]:
    """The text up to the end of the context, and what stands between a question and its answer."""
    if tokenizer.chat_template is None or not chat_template:
        return (tokenizer.bos_token or "") + context, "\n"
    mark = "#" * (len(context) + 10)  # longer than any run of it in the context
    parts = _rendered(tokenizer, [("user", context + mark)], enable_thinking).split(mark)
    require(len(parts) == 2, "--chat_template true: this model's template does not hold a user's text once; pass false")
    return parts[0], parts[1]


def next_turn(tokenizer: PreTrainedTokenizerBase, chat_template: bool, enable_thinking: bool) -> str:
    """The text between the end of an answer and the user's next text."""
    if tokenizer.chat_template is None or not chat_template:
        return "\n"
    mark = "#" * 10
    turns = [(role, mark) for role in ("user", "assistant", "user")]
    parts = _rendered(tokenizer, turns, enable_thinking).split(mark)
    require(len(parts) == 4, "--chat_template true: this model's template does not hold every turn once; pass false")
    return parts[2]


def _rendered(tokenizer: PreTrainedTokenizerBase, turns: list[tuple[str, str]], enable_thinking: bool) -> str:
    """The template's text of turns, each (role, content), up to where the next answer begins."""
    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        text = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False, enable_thinking=enable_thinking
        )
    except TemplateError as error:
        message = " ".join(str(error).split())
        raise UserError(f"--chat_template true: this model's template fails ({message}); pass false") from error
    return str(text)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Long[1, L]: the tokens of a text, and none besides."""
    return tokenizer.encode(text, return_tensors="pt", add_special_tokens=False, verbose=False)
