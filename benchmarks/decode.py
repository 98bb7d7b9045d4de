"""Time and memory of a decoding step: a cache of fixed size that holds what is kept, against caches that hold all.

    python benchmarks/decode.py                          # a GPU: an 8B's shape, bfloat16, in minutes
    python benchmarks/decode.py --device cpu             # a tiny shape: does it run at all
    … --contenders static dynamic --contexts 32768       # some of the rows
    … --doc docs/inference.md                            # write the figures there

Caches are filled with random entries, but for the time to first token, which is measured with a batch of one. The floor
is the time to copy as many bytes as a step must read: all weights but the embedding table, and all entries held.
"""

import argparse
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from decode_caches import (
    CACHES,
    NAMES,
    REPEATS,
    ROOM,
    STEPS,
    WARM_UP,
    Cell,
    RandomAnchors,
    random_ids,
    read_evicted_by_snapkv,
)
from decode_tables import GIB, PREFILLS, batches_that_fit, prefill_table, table, weight_bytes
from rich.console import Console
from shapes import make_model
from step_costs import out_of_memory, synchronized
from transformers import DynamicCache
from transformers.utils.logging import disable_progress_bar

from sparsekv.files import fill_block
from sparsekv.inference.static_cache import StaticAnchorCache

SIZES: dict[str, dict[str, Any]] = {
    "cuda": {"contexts": [8192, 32_768], "batches": [1, 8, 32], "long": 131_072, "budget": 8192},
    "cpu": {"contexts": [128, 256], "batches": [1, 2], "long": 512, "budget": 32},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--contenders", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--contexts", type=int, nargs="+", help="tokens; default: 8,192 and 32,768")
    parser.add_argument("--batches", type=int, nargs="+", help="default: 1, 8 and 32")
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.1, 0.2, 0.5], help="shares of a context")
    parser.add_argument("--long", type=int, help="one more context, of which --budget tokens are kept; 0: none")
    parser.add_argument("--budget", type=int)
    parser.add_argument("--doc", type=Path, help="Markdown file whose block for this device is replaced")
    options = parser.parse_args()
    for name, size in SIZES[options.device].items():
        setattr(options, name, size if getattr(options, name) is None else getattr(options, name))
    disable_progress_bar()
    torch.set_grad_enabled(False)
    bandwidth = copy_bandwidth(options.device)
    shape = ("tiny", "float32") if options.device == "cpu" else ("qwen3-8b", "bfloat16")
    model = make_model(*shape, options.device)
    model.config.max_position_embeddings = 2**20  # nothing depends on it; texts may be longer than the model's own
    say(f"copy: {bandwidth / 1e12:.3f} TB/s; weights read in a step: {weight_bytes(model) / GIB:.2f} GiB")
    rows = []
    for _, group in itertools.groupby(cells(options), key=lambda cell: cell.contender):
        torch._dynamo.reset()  # or what is compiled for one would keep its cache alive beside the others'
        rows += [(cell, *run(partial(measure, model, cell), cell)) for cell in group]
    prefills = [(context, name, *timed) for context in options.contexts for name, timed in prefill(model, context)]
    text = table(options, model, bandwidth, rows) + prefill_table(prefills) + batches_that_fit(model, options)
    Console().print(text, highlight=False)
    if options.doc:
        fill_block(options.doc, f"decode {options.device}", text)


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    """What is measured, stock caches first: they run in a model that no other cache has touched."""
    contexts = [*options.contexts, *([options.long] if options.long else [])]
    last, middle = options.contexts[-1], options.batches[len(options.batches) // 2]
    only = {"stock": (last, middle), "graph": (last, middle), "evicted": (last, middle), "snapkv": (last, 1)}
    for contender, context, batch in itertools.product(NAMES, contexts, options.batches):
        if contender in options.contenders and only.get(contender, (context, batch)) == (context, batch):
            counts = [round(share * context) for share in options.keeps]
            counts = [options.budget] if context == options.long else counts
            for kept in [context] if contender in ("dynamic", "stock") else counts:
                yield Cell(contender, context, kept, batch)


def say(text: str) -> None:
    print(f"[{time.perf_counter() - STARTED:5.0f} s] {text}", flush=True)


STARTED = time.perf_counter()


def run(measured: Callable[[], float], name: Any) -> tuple[float | str, float | None]:
    """Seconds, or why there are none, and the peak of memory in GiB."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    result: float | str
    try:
        result = measured()
    except ImportError as error:
        result = f"{error.name} is not installed"
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        result = "out of memory"
    say(f"{name}: {result if isinstance(result, str) else f'{1000 * result:.2f} ms'}")
    return result, torch.cuda.max_memory_allocated() / GIB if on_gpu else None


def free() -> None:
    """Give back what the last measurement held."""
    gc.collect()
    torch.cuda.empty_cache()


# ---- one step ----


def measure(model: Any, cell: Cell) -> float:
    """Median seconds of a step, over several runs of steps that are not waited for one by one."""
    free()
    cache, forward = CACHES[cell.contender](model, cell)
    ids = torch.randint(5, model.config.vocab_size, (cell.batch, 1), device=model.device)
    position = torch.full((cell.batch, 1), cell.context, device=model.device)

    def steps(count: int) -> None:
        nonlocal ids
        for _ in range(count):
            logits = forward(input_ids=ids, position_ids=position, past_key_values=cache).logits
            ids = logits[:, -1].argmax(-1, keepdim=True)
            position.add_(1)

    steps(WARM_UP)
    seconds = []
    for _ in range(REPEATS):
        start = synchronized()
        steps(STEPS)
        seconds.append((synchronized() - start) / STEPS)
    return statistics.median(seconds)


# ---- the first token ----


def prefill(model: Any, context: int) -> Iterator[tuple[str, tuple[float | str, float | None]]]:
    """Name, median seconds to the first token and peak GiB of each way to read one text; 20% are kept.

    In turns, for a machine is not always as fast; the first turn warms up.
    """
    ids = random_ids(model, context)
    selector: Any = RandomAnchors(0.2, model.config.vocab_size)

    def plain() -> None:
        model(input_ids=ids, past_key_values=DynamicCache(), logits_to_keep=1).logits.argmax(-1)

    def evicted() -> None:
        cache = StaticAnchorCache(model, selector=selector, room=ROOM)
        model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)

    def by_snapkv() -> None:
        read_evicted_by_snapkv(model, ids, DynamicCache(), 0.2).argmax(-1)

    def once(read: Callable[[], None]) -> float:
        start = synchronized()
        read()
        return synchronized() - start

    ways = {NAMES["dynamic"]: plain, "StaticAnchorCache": evicted, "kvpress, SnapKV": by_snapkv}
    results: dict[str, list[tuple[float | str, float | None]]] = {name: [] for name in ways}
    free()
    for _ in range(1 + PREFILLS):
        for name, read in ways.items():
            results[name].append(run(partial(once, read), f"prefill {context}, {name}"))
    for name, found in results.items():
        seconds = [each[0] for each in found[1:] if not isinstance(each[0], str)]
        yield name, (statistics.median(seconds) if seconds else found[0][0], found[-1][1])


def copy_bandwidth(device: str) -> float:
    """Bytes read and written a second by a large copy."""
    source = torch.ones(GIB if device == "cuda" else GIB // 16, dtype=torch.uint8, device=device)
    target, seconds = torch.empty_like(source), []
    for _ in range(20):
        start = synchronized()
        target.copy_(source)
        seconds.append(synchronized() - start)
    return 2 * source.nbytes / statistics.median(seconds)


if __name__ == "__main__":
    main()
