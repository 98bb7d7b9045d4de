"""`sparsekv export`: a model with its cache as one folder, for transformers without this package."""

from __future__ import annotations

import dataclasses
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsekv.adapters import load_adapter, load_merged
from sparsekv.demo_model import DEMO_MODEL
from sparsekv.errors import require
from sparsekv.files import new_folder, write_text
from sparsekv.inference.bundle import bundle
from sparsekv.inference.config import ExportConfig
from sparsekv.inference.export_card import export_card
from sparsekv.inference.shrunk_cache import check_layers
from sparsekv.models import load_model, load_tokenizer, save_model
from sparsekv.tokens import TokenClass, classify_vocabulary
from sparsekv.version import VERSION

if TYPE_CHECKING:
    from torch import Tensor

TEMPLATE = "sparsekv.inference.custom_generate"
HEAD = """`generate` with a KV cache that holds the sink, the anchors and the last tokens, for stock transformers.

Made by `sparsekv export`, version {version}, from the source of that package: change it there.
Licence: Apache-2.0.
"""
CLASSES = '''
def classify_vocabulary(*_: object) -> torch.Tensor:
    """UInt8[V]: the class of each token as far as anchors go by it; ids in order, FIRST or FIRST-LAST."""
    classes = torch.full(({size},), TokenClass.CONTENT, dtype=torch.uint8)
    ids = {{
        TokenClass.SPECIAL: """{special}""",
        TokenClass.PUNCTUATION: """{punctuation}""",
    }}
    for kind, runs in ids.items():
        for run in runs.split():
            first, _, last = run.partition("-")
            classes[int(first) : int(last or first) + 1] = kind
    return classes
'''


def export(config: ExportConfig) -> Path:
    """Write the folder, whole or not at all.

    Raises
    ------
    UserError
        Names the flag: what cannot be loaded, served or written.
    """
    here_only = f"--merge false: transformers alone cannot load {DEMO_MODEL}; merge, or name a folder that holds it"
    require(config.merge or config.model != DEMO_MODEL, here_only)
    tokenizer, model = load_tokenizer(config.model), load_model(config.model)
    check_layers(model)
    extra = config.anchors.extra_punctuation
    classes = classify_vocabulary(tokenizer, model.config, extra, model.generation_config)
    code = custom_generate(config, classes, model.config.get_text_config().vocab_size)
    saved: Any = model
    if config.adapter is not None:
        saved = (load_merged if config.merge else load_adapter)(model, config.adapter)
    with new_folder(Path(config.output_dir)) as folder:
        save_model(saved, folder, config.model)
        tokenizer.save_pretrained(folder)
        write_text(folder / "custom_generate" / "generate.py", code)
        write_text(folder / "README.md", export_card(config, tokenizer.chat_template is not None))
    return Path(config.output_dir)


def custom_generate(config: ExportConfig, classes: Tensor, vocab_size: int) -> str:
    """Text of `custom_generate/generate.py`.

    Parameters
    ----------
    classes : UInt8[V]
        Of `classify_vocabulary`.
    vocab_size : int
        Of the model.
    """
    anchors = dataclasses.asdict(config.anchors)
    settings = {"anchors": anchors, "mode": config.mode, "budget": config.budget, "vocab_size": vocab_size}
    special, punctuation = (runs(classes == kind) for kind in (TokenClass.SPECIAL, TokenClass.PUNCTUATION))
    replaced = {
        f"{TEMPLATE}.SETTINGS": f"SETTINGS: dict[str, Any] = {settings!r}",
        "sparsekv.tokens.classify_vocabulary": CLASSES.format(
            size=len(classes), special=special, punctuation=punctuation
        ),
    }
    return bundle(TEMPLATE, "generate", HEAD.format(version=VERSION), replaced)


def runs(chosen: Tensor) -> str:
    """Bool[V] → `0-2 7 9-11`, in lines of 100 characters at most."""
    ids = chosen.nonzero()[:, 0].tolist()
    known = set(ids)
    starts, ends = ([i for i in ids if i + step not in known] for step in (-1, 1))
    words = [str(first) if first == last else f"{first}-{last}" for first, last in zip(starts, ends, strict=True)]
    return textwrap.fill(" ".join(words), 100, break_on_hyphens=False)
