"""The folder of an analysis while it grows: what decides the figures, and a file for each sample that is measured.

analysis_config.json         written first; a folder that was made otherwise is refused
samples/00000.safetensors    figures Float32[runs, layers, H, S], classes UInt8[L], static_anchors Bool[L]
"""

import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from sparsekv.errors import UserError, require
from sparsekv.files import write_bytes, write_json

CONFIG = "analysis_config.json"
SAMPLES = "samples"
# What only leads to something that is compared itself: another path to the same model is no other analysis.
JUDGED_BY = {
    "model": "model_fingerprint",
    "adapter": "adapter_fingerprint",
    "data": "data_fingerprint",
    "data_subset": "data_fingerprint",
}
CONSEQUENCES = ("fingerprint", "figures", "runs")  # of what people set: named only where nothing else differs
SHORT = reprlib.Repr()
SHORT.maxstring = 200


@dataclass(frozen=True)
class Samples:
    """What was measured: n samples of L tokens, S figures of each of H heads in every layer.

    Attributes
    ----------
    figures : Float32[n, runs, layers, H, S]
        NaN where a figure has no meaning, such as the attention on a class that does not occur.
    classes : UInt8[n, L]
        The `TokenClass` of every token.
    static_anchors : Bool[n, L]
        Anchors by their token alone, without sink and recent.
    """

    figures: np.ndarray
    classes: np.ndarray
    static_anchors: np.ndarray


class SampleFolder:
    """The files of an analysis that grows.

    Parameters
    ----------
    out : Path
    description : mapping
        All that decides the figures: the content of analysis_config.json.
    """

    def __init__(self, out: Path, description: Mapping[str, Any]) -> None:
        self.out = out
        self.description: dict[str, Any] = json.loads(json.dumps(dict(description)))

    def check(self) -> None:
        """Look at what is there, write nothing.

        Raises
        ------
        UserError
            The analysis was made with other options, or a file of it is corrupt.
        """
        if not (self.out / CONFIG).is_file():
            unknown = f"--output_dir {self.out}: holds samples but no {CONFIG}, which says how they were made"
            require(not self._numbers(present=True), f"{unknown}; name another folder, or delete this one")
            return
        try:
            before = json.loads((self.out / CONFIG).read_text("utf-8"))
            changed = _changes(before, self.description)
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"{self.out / CONFIG}: corrupt; delete this folder to do the analysis again") from error
        if changed:
            key, was, now = changed[0]
            raise UserError(
                f"--output_dir {self.out}: was made with {key} {SHORT.repr(was)}, now {SHORT.repr(now)}; its samples "
                "are not reused: name another folder, or delete this one"
            )
        for number in self._numbers(present=True):
            self._read(number)

    def begin(self) -> None:
        """Write analysis_config.json."""
        write_json(self.out / CONFIG, self.description)

    def missing(self) -> list[int]:
        """The samples that are not measured yet."""
        return self._numbers(present=False)

    def write(self, number: int, measured: Mapping[str, Tensor]) -> None:
        """Keep a sample: it is on the disk, whole, when this returns."""
        write_bytes(self._path(number), safetensors.torch.save(dict(measured)))

    def read(self) -> Samples:
        """All samples; raises UserError for a corrupt file."""
        samples = [self._read(number) for number in self._numbers(present=True)]
        return Samples(**{name: torch.stack([each[name] for each in samples]).numpy() for name in samples[0]})

    def _path(self, number: int) -> Path:
        return self.out / SAMPLES / f"{number:05d}.safetensors"

    def _numbers(self, present: bool) -> list[int]:
        return [each for each in range(self.description["num_samples"]) if self._path(each).is_file() == present]

    def _read(self, number: int) -> dict[str, Tensor]:
        path, wanted = self._path(number), self.description
        try:
            measured = safetensors.torch.load(path.read_bytes())
            runs, _, _, count = measured["figures"].shape
            lengths = {measured[name].shape for name in ("classes", "static_anchors")}
            if (runs, count) != (len(wanted["runs"]), len(wanted["figures"])) or lengths != {(wanted["max_len"],)}:
                raise ValueError
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            raise UserError(f"{path}: corrupt; delete this file to measure the sample again") from error
        return measured


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, value before, value now) of what differs and matters; what people set comes first."""
    before, now = _flat(before), _flat(now)
    changed = {key for key in before.keys() | now.keys() if before.get(key) != now.get(key)}
    decisive = [key for key in changed if JUDGED_BY.get(key, key) in changed]
    ordered = sorted(decisive, key=lambda key: (key.endswith(CONSEQUENCES), key))
    return [(key, before.get(key), now.get(key)) for key in ordered]


def _flat(description: Mapping[str, Any]) -> dict[str, Any]:
    """`anchors: {sink_size: 4}` → `anchors.sink_size: 4`; the data stay whole, for they are judged as a whole."""
    flat: dict[str, Any] = {}
    for key, value in description.items():
        nested = isinstance(value, dict) and key not in JUDGED_BY
        flat |= {f"{key}.{name}": inner for name, inner in value.items()} if nested else {key: value}
    return flat
