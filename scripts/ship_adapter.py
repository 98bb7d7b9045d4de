#!/usr/bin/env python
"""A trained adapter as this repository ships it: its weights in bfloat16, half the bytes, with its record and its card.

python scripts/ship_adapter.py out/smollm2/final assets/smollm2-135m-eit
"""

import json
import shutil
import sys
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sparsekv.demo_model import DEMO_MODEL
from sparsekv.errors import UserError, require
from sparsekv.files import RUN_CONFIG, new_folder, write_json, write_text

WEIGHTS, SETTINGS, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"
LIMITS = """
## Limits

[docs/results.md](../../docs/results.md) has it, in its mean with other trainings and beside their controls: what it
gains, what it costs, and what failed.

## Licence

Apache-2.0, as the base model. The weights are those of the training in bfloat16.
"""


def main(final: Path, shipped: Path) -> None:
    """Write the folder `shipped`, whole or not at all; raise UserError for a folder that is no adapter's."""
    missing = [name for name in (WEIGHTS, SETTINGS, RUN_CONFIG, CARD) if not (final / name).is_file()]
    require(not missing, f"{final}: is no folder of a trained adapter (it lacks {', '.join(missing)})")
    try:
        weights = {name: weight.bfloat16() for name, weight in load_file(final / WEIGHTS).items()}
        settings, record = (json.loads((final / name).read_text("utf-8")) for name in (SETTINGS, RUN_CONFIG))
        model = record["config"]["model"]
    except (SafetensorError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{final}: {WEIGHTS}, {SETTINGS} or {RUN_CONFIG} is corrupt ({error!r})") from error
    # The card's code loads it from the folder, but for the demo model.
    tokenizer = [] if model == DEMO_MODEL else [*final.glob("*token*"), *final.glob("chat_template*")]
    base = settings.get("base_model_name_or_path")
    if base and Path(base).exists():  # on this machine, and on no other
        settings["base_model_name_or_path"] = None
    with new_folder(shipped, "folder") as folder:
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
        write_json(folder / SETTINGS, settings)
        for file in (final / RUN_CONFIG, *tokenizer):
            shutil.copyfile(file, folder / file.name)
        write_text(folder / CARD, (final / CARD).read_text("utf-8") + LIMITS)


if __name__ == "__main__":
    try:
        require(len(sys.argv) == 3, f"{sys.argv[0]}: takes two folders, the adapter's and a new one")
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
