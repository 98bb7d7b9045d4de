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

from sparsekv.errors import UserError, require
from sparsekv.files import new_folder, write_json, write_text
from sparsekv.training.record import RUN_CONFIG

WEIGHTS, SETTINGS, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"
LIMITS = """
## Limits

[docs/results.md](../../docs/results.md) has it, in its mean with other trainings, beside its control, and what failed:
among other things, presses that go by position gain nothing on needles, and with the full cache it is a little worse
than its control.

## Licence

Apache-2.0, as the base model. The weights are those of the training in bfloat16.
"""


def main(final: Path, shipped: Path) -> None:
    """Write the folder `shipped`, whole or not at all; raise UserError for a folder that is no adapter's."""
    missing = [name for name in (WEIGHTS, SETTINGS, RUN_CONFIG, CARD) if not (final / name).is_file()]
    require(not missing, f"{final}: is no folder of a trained adapter (it lacks {', '.join(missing)})")
    try:
        weights = {name: weight.bfloat16() for name, weight in load_file(final / WEIGHTS).items()}
        settings = json.loads((final / SETTINGS).read_text("utf-8"))
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{final}: {WEIGHTS} or {SETTINGS} is corrupt ({error})") from error
    base = settings.get("base_model_name_or_path")
    if base and Path(base).exists():  # on this machine, and on no other
        settings["base_model_name_or_path"] = None
    with new_folder(shipped, "folder") as folder:
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
        write_json(folder / SETTINGS, settings)
        shutil.copyfile(final / RUN_CONFIG, folder / RUN_CONFIG)
        write_text(folder / CARD, (final / CARD).read_text("utf-8") + LIMITS)


if __name__ == "__main__":
    try:
        require(len(sys.argv) == 3, f"{sys.argv[0]}: takes two folders, the adapter's and a new one")
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
