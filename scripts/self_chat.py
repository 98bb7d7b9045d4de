#!/usr/bin/env python
"""Conversations that a chat model holds with itself, as JSON lines: training text of its own, from no data at all.

A model that was tuned on instructions and is given the beginning of a user's turn writes that turn, and then the answer
(Magpie, https://arxiv.org/abs/2406.08464). Such rows in `--data` hold a model to what it says in a conversation, while
other rows teach it something else.

python scripts/self_chat.py --model smollm2-135m --output out/self_chat.jsonl
"""

import argparse
import json
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from sparsekv.errors import UserError, require
from sparsekv.files import check_writable, write_text, writing
from sparsekv.models import check_device, load_model, load_tokenizer
from sparsekv.progress import CountProgress
from sparsekv.prompts import open_turn

QUESTION_TOKENS = 96
TOP_P = 0.95


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="one with a chat template")
    parser.add_argument("--output", type=Path, required=True, help="a .jsonl file")
    parser.add_argument("--conversations", type=int, default=2048, help="begun; those that find no end are left out")
    parser.add_argument("--answer_tokens", type=int, default=512, help="most tokens of an answer")
    parser.add_argument("--batch_size", type=int, default=128, help="conversations at a time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main(options: argparse.Namespace) -> None:
    """Write the conversations, a batch at a time; a stopped call's batches are kept beside the output and gone on from.

    The same call on the same machine writes the same text.
    """
    output, most = options.output, 2**32
    require(output.suffix == ".jsonl", f"--output {output}: name a .jsonl file")
    require(0 <= options.seed < most, f"--seed {options.seed}: a number from 0 to {most - 1} is needed")
    for name in ("conversations", "answer_tokens", "batch_size"):
        require(getattr(options, name) > 0, f"--{name} {getattr(options, name)}: a number of 1 or more is needed")
    require(not output.exists(), f"--output {output}: exists already; name a new file")
    check_writable(output.parent, "--output")
    check_device(options.device, "--device")
    tokenizer = load_tokenizer(options.model)
    require(tokenizer.eos_token_id is not None, f"--model {options.model}: its tokenizer has no end-of-sequence token")
    require(tokenizer.chat_template is not None, f"--model {options.model}: its tokenizer has no chat template")
    model = load_model(options.model, device_map=options.device)
    settings = [str(vars(options)[name]) for name in ("model", "answer_tokens", "batch_size", "seed", "device")]
    partial = output.with_name(f"{output.name}.{sha256(' '.join(settings).encode()).hexdigest()[:12]}.partial")
    with CountProgress("conversations", options.conversations) as progress, writing(output, "--output"):
        output.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        done = partial.read_text("utf-8").splitlines()
        done = done[: len(done) // options.batch_size * options.batch_size]
        for start in range(0, options.conversations, options.batch_size):
            if start >= len(done):
                torch.manual_seed(1_000_003 * options.seed + start)
                texts = converse(model, tokenizer, options.batch_size, options.answer_tokens)
                done += [json.dumps({"text": text}) for text in texts]
                write_text(partial, "".join(f"{line}\n" for line in done))
            progress.advance(min(options.batch_size, options.conversations - start))
        ended = [line for line in done[: options.conversations] if json.loads(line)["text"]]
        require(bool(ended), f"--answer_tokens {options.answer_tokens}: no conversation came to its end; give more")
        write_text(output, "".join(f"{line}\n" for line in ended))
        partial.unlink()


def converse(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int, answer_tokens: int
) -> list[str | None]:
    """`count` conversations of a question and an answer, as the chat template writes them; None: it found no end."""
    opened, between = open_turn(tokenizer, "", chat_template=True, enable_thinking=False)
    questions = continuations(model, tokenizer, [opened] * count, QUESTION_TOKENS)
    prompts = [opened + (question or "") + between for question in questions]
    answers = continuations(model, tokenizer, prompts, answer_tokens)
    return [
        prompt + answer if question and answer else None
        for question, prompt, answer in zip(questions, prompts, answers, strict=True)
    ]


@torch.inference_mode()
def continuations(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], max_new_tokens: int
) -> list[str | None]:
    """What the model goes on with, sampled, up to where it ends its turn; None: it does not."""
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    generate: Any = model.generate
    found = generate(
        **inputs.to(model.device),
        max_new_tokens=max_new_tokens,
        do_sample=True,
        temperature=1.0,
        top_p=TOP_P,
        top_k=0,
        pad_token_id=tokenizer.eos_token_id,
    )
    new = found[:, inputs["input_ids"].shape[1] :]
    stop: Any = model.generation_config.eos_token_id if model.generation_config else None
    ids = {tokenizer.eos_token_id, *(stop if isinstance(stop, list) else [stop])} - {None}
    ended = torch.isin(new, torch.tensor(sorted(ids), device=new.device)).any(1).tolist()
    texts = tokenizer.batch_decode(new, skip_special_tokens=True)
    return [text.strip() if end else None for text, end in zip(texts, ended, strict=True)]


if __name__ == "__main__":
    set_verbosity_error()
    disable_progress_bar()
    asked = parse()
    try:
        main(asked)
    except UserError as error:
        print(f"self_chat.py: {error}", file=sys.stderr)
        sys.exit(2)
    except torch.cuda.OutOfMemoryError:
        print(f"self_chat.py: --batch_size {asked.batch_size}: out of memory; give a smaller one", file=sys.stderr)
        sys.exit(2)
