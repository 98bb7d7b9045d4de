"""A small result of every kind, made in a second. Text in it is hostile."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
from cells import write_cell

from sparsekv.analysis.columns import CLASSES
from sparsekv.analysis.results import SCHEMA_VERSION
from sparsekv.analysis.rows import distances
from sparsekv.analysis.summary import CLASS_FIGURE
from sparsekv.evaluation.matrix.views import KeptEntries, NotShown, View, encode_received, save_view
from sparsekv.tokens import TokenClass

ATTACK = '<img src=x onerror="document.title=1"><script>document.title=2</script>'
DATA = ("ruler-local", 64)
LAYERS, HEADS = 3, 2
NEEDLE = " 48213"
TOKENS = ["<|bos|>", "The", " sea", ",", "\n", " ", ATTACK, " caf", "", "é", ".", " The", " number", " is", NEEDLE, "."]
TOKENS += [f" word{i}" for i in range(80)] + ["</script>", "."]
PRESSES = ("knorm", "snapkv")
RATIOS = (0.25, 0.5)
RUNS = {"base": None, "control": "out/control/final", "trained": "out/trained/final"}


def make_evidence(root: Path) -> Path:
    """Everything below `root`, which is returned."""
    for number, (name, adapter) in enumerate(RUNS.items()):
        folder = root / "evaluation" / name
        draw = np.random.default_rng(number)
        for press, ratio in [("no_press", 0.0), *((press, ratio) for press in PRESSES for ratio in RATIOS)]:
            scores = {task: (draw.random(8) < 0.9 - ratio).astype(float) * 100 for task in ("niah_single_2", ATTACK)}
            write_cell(folder, press, ratio, scores, data=DATA, adapter=adapter, answer=f"{press} says {ATTACK}")
        save_view(folder / "views" / "ruler-local__64.json.gz", make_view(number, adapter or ""))
        write_needles(folder / "needles" / "ruler-local__64.csv")
    for name in ("control", "trained"):
        write_training(root / name, control=name == "control")
    write_analysis(root / "analysis")
    return root


def relative_attention(view: View) -> np.ndarray:
    """Received attention as a multiple of what uniform attention would give: [layers, G, C]."""
    return np.exp2((view.received.astype(np.float64) - 128) / 16)


def make_view(seed: int, adapter: str) -> View:
    """A context of `TOKENS` with random kept entries: head 0 of layer 0 keeps everything."""
    draw, shape = np.random.default_rng(seed), (LAYERS, HEADS, len(TOKENS))
    cells = []
    for press in PRESSES:
        for ratio in RATIOS:
            kept = draw.random(shape) > ratio
            kept[0, 0] = True
            cells.append(KeptEntries(press, ratio, kept))
    punctuation = np.array([token.strip() in {",", "."} for token in TOKENS])
    return View(
        benchmark=DATA[0],
        data_dir=str(DATA[1]),
        model="tiny",
        adapter=adapter,
        task="niah_single_2",
        row=3,
        fingerprint="f",
        commit="abc1234",
        question=f"What is the number? {ATTACK}",
        answer=[NEEDLE.strip()],
        tokens=TOKENS,
        classes=np.where(punctuation, TokenClass.PUNCTUATION, TokenClass.CONTENT).astype(np.uint8),
        anchors=punctuation,
        received=encode_received(np.exp(draw.normal(size=shape))),
        cells=cells,
        not_shown=[NotShown("think", 0.5, f"shrinks channels {ATTACK}")],
    )


def write_needles(file: Path) -> None:
    """Needles that every cell finds, and others that only the full cache finds."""
    named = {"benchmark": DATA[0], "data_dir": DATA[1], "model": "tiny", "benchmark_fingerprint": "f", "task": ATTACK}
    needles = [
        {**named, "row": row, "answer": answer, "position": 12 * row, "context_tokens": 100, "depth": 0.12 * row}
        for row in range(8)
        for answer in ("no_press says", ATTACK)
    ]
    file.parent.mkdir()
    pd.DataFrame(needles).assign(anchor_distance=range(len(needles))).to_csv(file, index=False)


def write_training(folder: Path, control: bool) -> None:
    """eit_config.json and metrics.jsonl, as a training leaves them."""
    folder.mkdir(parents=True)
    record = {"config": {"model": "tiny", "control": control, "seed": 0}, "commit": "abc1234", "versions": {}}
    (folder / "eit_config.json").write_text(json.dumps(record))
    lines = [{"step": 0, "eval_full_ppl": 9.0, "eval_evicted_ppl": 21.0, "epoch": 0}]
    for step in range(1, 5):
        keep = 1.0 if control else 1 - step / 8
        shares = {"requested_keep_ratio": keep, "actual_keep_ratio": keep, "anchor_share": 0.3}
        lines.append({"step": step, "ce": 2 - step / 10, "kl": 0.1 / step, "learning_rate": 1e-4, **shares})
    lines.append({"step": 4, "eval_full_ppl": 8.5, "eval_evicted_ppl": 18.0 if control else 10.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_analysis(folder: Path, runs: tuple[str, ...] = ("base", "adapter"), max_len: int = 64) -> None:
    """attention_analysis.json and .parquet with random figures; no row holds a number."""
    draw = np.random.default_rng(len(runs))
    names = [f"{kind}.{name}" for kind in (CLASS_FIGURE, "share") for name in CLASSES]
    names += [f"distance_share.{start}" for start in distances(max_len)]
    names += ["anchor_share", "anchor_tokens", "tokens_for_80", "tokens_for_95", "zone.sink"]
    tables, overall, layers = [], {}, {}
    for run in runs:
        means = draw.uniform(0.1, 0.9, (LAYERS, 4, len(names)))
        means[..., [names.index(f"{CLASS_FIGURE}.number"), names.index("share.number")]] = np.nan
        index = pd.MultiIndex.from_product([[run], range(LAYERS), range(4), names])
        table = pd.DataFrame(index=index.set_names(["run", "layer", "head", "figure"])).reset_index()
        tables.append(table.assign(mean=means.ravel(), low=means.ravel() - 0.05, high=means.ravel() + 0.05))
        overall[run] = {name: estimate(means[..., place].mean()) for place, name in enumerate(names)}
        layers[run] = {name: estimate(means[..., place].mean(1)) for place, name in enumerate(names)}
    analysis = {"schema_version": SCHEMA_VERSION, "model": "tiny", "adapter": "out/trained/final", "runs": runs}
    analysis |= {"num_samples": 4, "max_len": max_len, "token_shares": dict.fromkeys(CLASSES, 1 / 6)}
    analysis |= {"overall": overall, "layers": layers, "recommendation": {}, "anchors": {"sink_size": 4}}
    analysis["difference"] = {"overall": overall[runs[-1]], "layers": layers[runs[-1]]} if len(runs) > 1 else None
    folder.mkdir(parents=True)
    (folder / "attention_analysis.json").write_text(json.dumps(analysis))
    pd.concat(tables).to_parquet(folder / "attention_analysis.parquet", index=False)


def estimate(mean: np.ndarray) -> dict:
    """Mean and interval as the analysis writes them: null for what is not known."""
    figures = {"mean": mean, "low": mean - 0.05, "high": mean + 0.05}
    return {name: json.loads(pd.Series([values]).to_json())["0"] for name, values in figures.items()}
