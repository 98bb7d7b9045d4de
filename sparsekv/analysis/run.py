"""`sparsekv analyze`: measures the samples that are missing, then writes what they say together."""

import logging
from pathlib import Path

from sparsekv.analysis.config import AnalysisConfig
from sparsekv.analysis.inputs import Inputs, prepare
from sparsekv.analysis.measure import Measurer
from sparsekv.analysis.names import ANALYSIS, HEADS
from sparsekv.analysis.output import ANCHORS, FIGURES, write_results
from sparsekv.analysis.tables import show
from sparsekv.files import writing
from sparsekv.progress import CountProgress
from sparsekv.signals import StopSignal

logger = logging.getLogger(__name__)


def analyze(config: AnalysisConfig) -> int | None:
    """Measure, write and print.

    Returns
    -------
    int or None
        The signal that stopped it after the sample in hand; the same call continues.

    Raises
    ------
    UserError
        Input that cannot work, before anything is written; or a folder that can no longer be written.
    """
    inputs = prepare(config)
    with StopSignal() as stop:
        _measure(config, inputs, stop)
    if stop.number is not None:
        return stop.number
    out = Path(config.output_dir)
    with writing(out):
        analysis = write_results(config, inputs, inputs.folder.read())
    show(analysis)
    for name in (ANALYSIS, HEADS, ANCHORS, FIGURES):
        print(out / name)
    return None


def _measure(config: AnalysisConfig, inputs: Inputs, stop: StopSignal) -> None:
    """Measure what is missing, until a signal comes; the model is loaded only if something is."""
    missing = inputs.folder.missing()
    logger.info("%s: %d of %d samples done", config.output_dir, config.num_samples - len(missing), config.num_samples)
    if not missing:
        return
    measure, out = Measurer(config, inputs), Path(config.output_dir)
    with writing(out):
        inputs.folder.begin()
    with CountProgress("samples", len(missing)) as progress:
        for number in missing:
            if stop.number is not None:
                return
            measured = measure(inputs.rows[number])
            with writing(out):
                inputs.folder.write(number, measured)
            progress.advance(1)
