"""Two small tasks for the demo: find a number in natural text, and predict the text that follows."""

import random
from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from sparsekv.evaluation.evicted import Sample

NEEDLE = "One of the special magic numbers for {city} is: {number}."
QUESTION = "What is the special magic number for {city} mentioned in the provided text?"
ANSWER_PREFIX = "The special magic number for {city} mentioned in the provided text is"
CITIES = ("Amsterdam", "Bogota", "Cairo", "Dublin", "Havana", "Jakarta", "Kyoto", "Lagos", "Lima", "Oslo", "Quito")


def needle_samples(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]], context_length: int, count: int, seed: int
) -> list[Sample]:
    """A 7-digit number hidden in natural text, asked for after the cut: RULER's `niah_single_2`, on your own text.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        With a chat template, the context opens a user's turn that ends with the question.
    rows : sequence of lists of int
        Held-out text, one list of at least `context_length` tokens each; used in turn.
    context_length : int
        Tokens before the cut.
    count, seed : int

    Returns
    -------
    list of Sample
        Task `needle`; the scored tokens are the number's.
    """
    rng = random.Random(seed)
    before, after = chat_frame(tokenizer)
    samples = []
    for number in range(count):
        city, value = rng.choice(CITIES), str(rng.randrange(1_000_000, 10_000_000))
        needle = encode(tokenizer, " " + NEEDLE.format(city=city, number=value))
        head = encode(tokenizer, before)
        room = context_length - len(head) - len(needle)
        depth = rng.randrange(room)
        text = list(rows[number % len(rows)][:room])
        question = encode(tokenizer, "\n\n" + QUESTION.format(city=city) + after + ANSWER_PREFIX.format(city=city))
        answer = encode(tokenizer, f" {value}")
        context = [*head, *text[:depth], *needle, *text[depth:]]
        suffix = torch.tensor([*question, *answer])
        samples.append(Sample(torch.tensor(context), suffix, len(question), "needle"))
    return samples


def text_samples(rows: Sequence[Sequence[int]], context_length: int, count: int) -> list[Sample]:
    """Held-out text cut in two: task `text`, the scored tokens are all after the cut but the first."""
    pairs = [(torch.tensor(row[:context_length]), torch.tensor(row[context_length:])) for row in rows[:count]]
    return [Sample(context, suffix, 1, "text") for context, suffix in pairs]


def chat_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What the chat template puts before a user's text, and between it and the assistant's answer."""
    if tokenizer.chat_template is None:
        return "", "\n"
    mark = "<<<context>>>"
    turn = [{"role": "user", "content": mark}]
    before, after = str(tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)).split(mark)
    return before, after


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids without special tokens added around them."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]
