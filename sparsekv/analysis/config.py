"""Every option of an analysis: the schema of `sparsekv analyze`."""

from dataclasses import dataclass, field

from sparsekv.anchor_config import AnchorConfig
from sparsekv.errors import require


@dataclass
class AnalysisConfig:
    """What a model attends to, layer by layer and head by head; a second call does what is missing.

    Parameters
    ----------
    model
        Hub name, local folder, or smollm2-135m.
    adapter
        Folder of an adapter trained on it: measured too, on the same rows, and compared with the base.
    data
        pydoc, recall, a .txt / .jsonl / .parquet file or folder, a Hub dataset; or a mixture {source: weight}.
    data_subset
        Configuration name of a Hub dataset, such as sample-10BT.
    num_samples
        Rows of text to measure on.
    max_len
        Tokens in a row.
    output_dir
        Folder of the analysis.
    bf16
        Run the model in bfloat16; default: float32.
    anchors
        The tokens whose share of the attention is measured; a file, or single values.
    seed
        Of the order of the rows.
    device
        cpu, cuda, cuda:N, or auto, which spreads the model over the local GPUs; default: a GPU if there is one.
    trust_remote_code
        Run the model's own code from the Hub.
    """

    model: str = ""
    adapter: str | None = None
    data: dict[str, float] | str = "pydoc"
    data_subset: str | None = None
    num_samples: int = 20
    max_len: int = 1024
    output_dir: str = ""
    bf16: bool = False
    anchors: AnchorConfig = field(default_factory=AnchorConfig)
    seed: int = 0
    device: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        require(bool(self.model), "--model is missing: a Hub name, a local folder, or smollm2-135m")
        require(bool(self.output_dir), "--output_dir is missing: the folder of the analysis")
        require(self.num_samples >= 2, f"--num_samples {self.num_samples}: must be at least 2, which an interval needs")
        require(self.max_len >= 16, f"--max_len {self.max_len}: must be at least 16 tokens")
        require(0 <= self.seed < 2**32, f"--seed {self.seed}: must be at least 0 and below 2**32")

    @property
    def dtype(self) -> str:
        """Of the weights."""
        return "bfloat16" if self.bf16 else "float32"

    @property
    def runs(self) -> tuple[str, ...]:
        """What is measured on every row."""
        return ("base",) if self.adapter is None else ("base", "adapter")
