"""Options of `sparsekv generate`, `chat` and `export`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sparsekv.anchor_config import AnchorConfig
from sparsekv.errors import UserError, require
from sparsekv.files import check_new
from sparsekv.inference.policy import AnchorPolicy

NO_MODEL = "--model is missing: a Hub name, a local folder, or smollm2-135m"


@dataclass
class ChatConfig:
    """Talk to a model whose cache keeps little; a line is a turn, and the end of the input is the end.

    Parameters
    ----------
    model
        Hub name, local folder, or smollm2-135m.
    adapter
        Folder of an adapter trained on the model, such as out/final.
    prompt_file
        UTF-8 text that is read first, as the context; - is the standard input (not in chat).
    keep
        What the cache keeps: anchors, full, or NAME or NAME:PARAMETER=VALUE of a press.
    ratio
        With a press, the compression ratio in [0, 1): the share of the context that is evicted.
    budget
        With anchors, most tokens kept: of the context (prefill), or at any time (streaming).
    mode
        With anchors: prefill evicts the context of --prompt_file once, at its end, and keeps all that comes after it;
        streaming evicts while text is read and written. Default: prefill where there is a context, else streaming.
    anchors
        With anchors, which tokens they are: single options, or a YAML file.
    max_new_tokens
        Longest answer in tokens.
    temperature
        Of the draw of each token; 0: the most likely one.
    top_p
        Draw from the most likely tokens that together have this probability.
    seed
        Of the draws.
    chat_template
        Put texts into the model's chat template, where it has one.
    enable_thinking
        Handed to the chat template.
    dtype
        auto (the checkpoint's), float32, bfloat16 or float16.
    device
        cpu, cuda, cuda:N or a placement such as auto; default: a GPU if there is one.
    trust_remote_code
        Run Python code that the model brings.
    """

    model: str = ""
    adapter: str | None = None
    prompt_file: str | None = None
    keep: str = "anchors"
    ratio: float | None = None
    budget: int | None = None
    mode: Literal["prefill", "streaming"] | None = None
    anchors: AnchorConfig = field(default_factory=AnchorConfig)
    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    chat_template: bool = True
    enable_thinking: bool = False
    dtype: str = "auto"
    device: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        require(bool(self.model), NO_MODEL)
        require(self.max_new_tokens > 0, f"--max_new_tokens {self.max_new_tokens}: must be 1 or more")
        require(self.temperature >= 0, f"--temperature {self.temperature}: must be 0 or more")
        require(0 < self.top_p <= 1, f"--top_p {self.top_p}: must be above 0, and at most 1")
        require(0 <= self.seed < 2**32, f"--seed {self.seed}: must be at least 0 and below 2**32")
        self._check_keep()
        self._check_file()

    def _check_keep(self) -> None:
        anchors, press = self.keep == "anchors", self.keep not in ("anchors", "full")
        for flag, value in (("--budget", self.budget), ("--mode", self.mode)):
            require(anchors or value is None, f"{flag} {value}: for --keep anchors, not for --keep {self.keep}")
        check_budget(self.anchors, self.budget)
        missing = f"--keep {self.keep}: give --ratio too, the share that it evicts; or --keep anchors, or full"
        require(not press or self.ratio is not None, missing)
        require(press or self.ratio is None, f"--ratio {self.ratio}: for a press, not for --keep {self.keep}")
        once = f"--keep {self.keep}" if press else "--mode prefill"
        needed = (press or self.mode == "prefill") and self.prompt_file is None
        require(not needed, f"{once}: it evicts a context once; name the context's file with --prompt_file")

    def _check_file(self) -> None:
        if self.prompt_file is not None:
            require(self.prompt_file != "-", "--prompt_file -: a chat reads its turns there; name a file")

    @property
    def streams(self) -> bool:
        """Whether the cache evicts while text is read."""
        return self.keep == "anchors" and (self.mode or ("prefill" if self.prompt_file else "streaming")) == "streaming"


@dataclass
class GenerateConfig(ChatConfig):
    """Continue a text, or answer a question about it, with a cache that keeps little.

    Parameters
    ----------
    max_new_tokens
        Longest answer in tokens.
    question
        Asked about the text of --prompt_file after it was evicted; without it, the text itself is answered, or
        continued where the model has no chat template.
    """

    max_new_tokens: int = 128
    question: str = ""

    def _check_file(self) -> None:
        require(self.prompt_file is not None, "--prompt_file is missing: a file of text, or - for the standard input")


@dataclass
class ExportConfig:
    """A folder for transformers without SparseKV: weights, tokenizer and custom_generate/generate.py.

    Parameters
    ----------
    model
        Hub name, local folder, or smollm2-135m.
    output_dir
        New folder.
    adapter
        Folder of an adapter trained on the model, such as out/final.
    merge
        Merge the adapter into the weights; false: write the adapter, for the base model where the user has it.
    format
        hf: a model folder of transformers.
    mode
        Of the cache: prefill evicts the context once, at its end, streaming while it is read.
    budget
        Most tokens kept: of the context (prefill), or at any time (streaming).
    anchors
        Which tokens are anchors: single options, or a YAML file.
    """

    model: str
    output_dir: str
    adapter: str | None = None
    merge: bool = True
    format: Literal["hf"] = "hf"
    mode: Literal["prefill", "streaming"] = "prefill"
    budget: int | None = None
    anchors: AnchorConfig = field(default_factory=AnchorConfig)

    def __post_init__(self) -> None:
        check_budget(self.anchors, self.budget)
        require(self.merge or self.adapter is not None, "--merge false: there is no --adapter to leave apart")
        check_new(Path(self.output_dir))


def check_budget(anchors: AnchorConfig, budget: int | None) -> None:
    """Raise UserError, naming the flag, when the sink and the last tokens do not fit."""
    try:
        AnchorPolicy.of(anchors, budget)
    except UserError as error:
        raise UserError(f"--{error}") from error
