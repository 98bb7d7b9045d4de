"""Rows of a benchmark → token ids, the questions of one context together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from sparsekv.anchors import AnchorConfig, AnchorSelector
from sparsekv.errors import require
from sparsekv.evaluation.benchmarks.schema import Benchmark
from sparsekv.evaluation.engine.work import Cell, ContextWork, Question
from sparsekv.evaluation.matrix.config import Suite
from sparsekv.prompts import encode_prompt, open_turn


@dataclass(frozen=True)
class Encoder:
    """Encodes the rows of one benchmark for one model.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
    positions : int or None
        How many the model has.
    benchmark : Benchmark
    suite : Suite
        With the options of the prompt.
    config : PreTrainedConfig, optional
        The model's.
    generation_config : GenerationConfig, optional
        The model's.
    """

    tokenizer: PreTrainedTokenizerBase
    positions: int | None
    benchmark: Benchmark
    suite: Suite
    config: PreTrainedConfig | None = None
    generation_config: GenerationConfig | None = None

    def contexts(self) -> list[list[int]]:
        """Numbers of the rows, those of one context together, in the order of the benchmark."""
        groups: dict[tuple[str, ...], list[int]] = {}
        for number, row in enumerate(self.benchmark.rows):
            question = row["question"] if self.suite.query_aware else ""
            groups.setdefault((row["context"], row["answer_prefix"], question), []).append(number)
        return list(groups.values())

    def encode(self, numbers: Sequence[int], cells: Sequence[Cell]) -> ContextWork:
        """The work on rows of one context in these cells.

        Raises
        ------
        UserError
            A row does not fit into the model's positions, or leaves nothing to answer or to score.
        """
        rows = [self.benchmark.rows[number] for number in numbers]
        encode = self._encode_text if self.benchmark.kind == "likelihood" else self._encode_prompt
        work = encode(numbers, rows, tuple(cells))
        for question in work.questions:
            self._check(work.ids.shape[1], question)
        return work

    def context_text(self, number: int) -> str:
        """The text whose tokens are the row's context, unless they are cut: with what the template puts before it."""
        row = self.benchmark.rows[number]
        context = row["context"] + (row["question"] if self.suite.query_aware else "")
        return open_turn(self.tokenizer, context, self.suite.chat_template, self.suite.enable_thinking)[0]

    def selector(self, anchors: AnchorConfig) -> AnchorSelector:
        """Marks the same anchors as `AnchorPress` in the model."""
        return AnchorSelector(anchors, self.tokenizer, self.config, self.generation_config)

    def _check(self, context: int, question: Question) -> None:
        where = f"--benchmark {self.benchmark.name}: row {question.row}"
        if question.answer_ids is None:
            # Where the benchmark says how long an answer may be, it is a bound that few come near.
            asked, length = question.ids.shape[1], self.suite.max_new_tokens or 0
            require(asked > 0, f"{where} has no token between context and answer; give it a question or answer_prefix")
        else:  # its first token is what the context ends with: it is given, not scored
            asked, length = 0, question.answer_ids.shape[1]
            require(length > 1, f"{where} has an answer of {length} tokens, and the first is not scored; give a longer")
        length += context + asked
        new = f" with --max_new_tokens {self.suite.max_new_tokens}" if self.suite.max_new_tokens else ""
        require(
            self.positions is None or length <= self.positions,
            f"{where} has {length} tokens{new}, the model has {self.positions} positions; give shorter contexts, or "
            "cut them with --max_context_length",
        )

    def _encode_prompt(
        self, numbers: Sequence[int], rows: Sequence[dict[str, Any]], cells: tuple[Cell, ...]
    ) -> ContextWork:
        context, asked = rows[0]["context"], [row["question"] for row in rows]
        if self.suite.query_aware:  # as kvpress does: the question ends the context, and none follows it
            context, asked = context + asked[0], [""] * len(rows)
        ids, questions = self._prompt(context, asked, rows[0]["answer_prefix"])
        query = ids.shape[1] - self._prompt(rows[0]["context"], [], "")[0].shape[1] if self.suite.query_aware else 0
        limits = [self.suite.max_new_tokens or int(row["max_new_tokens"]) for row in rows]
        asks = tuple(Question(*each) for each in zip(numbers, questions, limits, strict=True))
        return ContextWork(ids[:, : self.suite.max_context_length], asks, cells, query)

    def _prompt(
        self, context: str, questions: Sequence[str], answer_prefix: str
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        return encode_prompt(
            self.tokenizer,
            context,
            questions,
            answer_prefix,
            chat_template=self.suite.chat_template,
            enable_thinking=self.suite.enable_thinking,
        )

    def _encode_text(
        self, numbers: Sequence[int], rows: Sequence[dict[str, Any]], cells: tuple[Cell, ...]
    ) -> ContextWork:
        """Plain text and what follows it, in no template and with no question between."""
        ids, _ = encode_prompt(self.tokenizer, rows[0]["context"], [], "", chat_template=False)
        nothing = torch.empty(1, 0, dtype=torch.long)
        follows = [self.tokenizer.encode(row["answer"], return_tensors="pt", add_special_tokens=False) for row in rows]
        asks = tuple(Question(number, nothing, 0, answer) for number, answer in zip(numbers, follows, strict=True))
        return ContextWork(ids[:, : self.suite.max_context_length], asks, cells)
