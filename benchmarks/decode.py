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
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from shapes import make_model
from torch import Tensor
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM, StaticCache
from transformers.cache_utils import DynamicLayer
from transformers.utils.logging import disable_progress_bar

from sparsekv.anchors import AnchorConfig
from sparsekv.files import fill_block
from sparsekv.inference.anchor_cache import Slots
from sparsekv.inference.static_cache import StaticAnchorCache
from sparsekv.version import commit

GIB = 2**30
STEPS, REPEATS, WARM_UP = 12, 3, 4
ROOM = WARM_UP + STEPS * REPEATS + 1
PREFILLS = 4  # timed, of each kind, in turns
NAMES = {
    "dynamic": "DynamicCache, eager",
    "stock": "StaticCache, compiled",
    "static": "StaticAnchorCache, compiled",
    "graph": "StaticAnchorCache, graph only",
    "evicted": "DynamicCache of what is kept, eager",
    "snapkv": "kvpress, SnapKV, eager",
}
SIZES: dict[str, dict[str, Any]] = {
    "cuda": {"contexts": [8192, 32_768], "batches": [1, 8, 32], "long": 131_072, "budget": 8192},
    "cpu": {"contexts": [128, 256], "batches": [1, 2], "long": 512, "budget": 32},
}
SHARES = {"whole": 1.0, "of which 50% are kept": 0.5, "20%": 0.2, "10%": 0.1}
TINY = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "head_dim": 16}


@dataclass(frozen=True)
class Cell:
    """A row of the table: `kept` entries of `context` tokens for each of `batch` texts."""

    contender: str
    context: int
    kept: int
    batch: int


class RandomAnchors:
    """Stands for an `AnchorSelector`: of random ids, this share is kept."""

    def __init__(self, share: float, vocabulary: int) -> None:
        self.config, self.first = AnchorConfig(), vocabulary - round(share * vocabulary)

    def classes(self, ids: Tensor) -> Tensor:
        return ids >= self.first


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
    model = tiny_model() if options.device == "cpu" else make_model("qwen3-8b", "bfloat16", "cuda")
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
    except RuntimeError as error:  # torch.compile wraps an error of memory in its own
        if "out of memory" not in str(error) and "ALLOC_FAILED" not in str(error):
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


def synchronized() -> float:
    """The time at which the device has nothing left to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def random_entries(model: Any, cell: Cell, slots: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys and values of each layer."""
    config = model.config
    shape = (cell.batch, config.num_key_value_heads, slots, config.head_dim)
    for _ in range(config.num_hidden_layers):
        keys, values = (torch.randn(shape, dtype=model.dtype, device=model.device) for _ in range(2))
        yield keys, values


def dynamic(model: Any, cell: Cell) -> tuple[Any, Any]:
    cache = DynamicCache()
    for number, (keys, values) in enumerate(random_entries(model, cell, cell.kept)):
        cache.update(keys, values, number)
    return cache, model


def stock(model: Any, cell: Cell) -> tuple[Any, Any]:
    """As `generate` of transformers compiles it."""
    config = model.config
    cache = StaticCache(config=config, max_cache_len=cell.context + ROOM)
    heads = (config.num_key_value_heads, config.head_dim)
    cache.early_initialization(cell.batch, *heads, model.dtype, model.device)
    for layer in cache.layers:
        layer.keys[:, :, : cell.context].normal_()
        layer.values[:, :, : cell.context].normal_()
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length.fill_(cell.context)
    compiled = torch.compile(model.__call__, mode="reduce-overhead", fullgraph=True)
    cache_position = torch.tensor([cell.context - 1], device=model.device)

    def forward(**inputs: Any) -> Any:
        cache_position.add_(1)
        return compiled(**inputs, cache_position=cache_position)

    return cache, forward


def static(model: Any, cell: Cell, compiled: bool) -> tuple[Any, Any]:
    """As after a context of which this much is kept."""
    selector: Any = RandomAnchors(0, model.config.vocab_size)
    cache = StaticAnchorCache(model, selector=selector, room=ROOM, compiled=compiled)
    for keys, values in random_entries(model, cell, cell.kept):
        layer = DynamicLayer()
        layer.update(keys, values)
        cache.layers.append(layer)
    real = torch.ones(cell.batch, cell.kept, dtype=torch.bool, device=model.device)
    cache.slots = tuple(Slots(real.long(), real.long(), real, real))
    cache.num_rows, cache.seen, cache.cut, cache.floor = cell.batch, cell.context, cell.context, cell.context
    cache.settle()
    return cache, model


def snapkv(model: Any, cell: Cell) -> tuple[Any, Any]:
    """Prefilled: a press acts there."""
    cache = DynamicCache()
    read_evicted_by_snapkv(model, random_ids(model, cell.context), cache, cell.kept / cell.context)
    return cache, model


CACHES: dict[str, Callable[..., tuple[Any, Any]]] = {
    "dynamic": dynamic,
    "stock": stock,
    "static": partial(static, compiled=True),
    "graph": partial(static, compiled=False),
    "evicted": dynamic,
    "snapkv": snapkv,
}


# ---- the first token ----


def random_ids(model: Any, length: int) -> Tensor:
    return torch.randint(model.config.vocab_size, (1, length), device=model.device)


def read_evicted_by_snapkv(model: Any, ids: Tensor, cache: Any, keep: float) -> Tensor:
    from sparsekv.presses import make_press

    press: Any = make_press("snapkv", 1 - keep)
    position = torch.arange(ids.shape[1], device=ids.device)  # kvpress reads it; later transformers do not give it
    with press(model):
        return model(input_ids=ids, past_key_values=cache, cache_position=position, logits_to_keep=1).logits


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


# ---- figures ----


def copy_bandwidth(device: str) -> float:
    """Bytes read and written a second by a large copy."""
    source = torch.ones(GIB if device == "cuda" else GIB // 16, dtype=torch.uint8, device=device)
    target, seconds = torch.empty_like(source), []
    for _ in range(20):
        start = synchronized()
        target.copy_(source)
        seconds.append(synchronized() - start)
    return 2 * source.nbytes / statistics.median(seconds)


def weight_bytes(model: Any) -> int:
    """Of a step: the embedding table is looked up, unless it is the head too."""
    table = model.get_input_embeddings().weight
    tied = table is model.get_output_embeddings().weight
    return sum(weight.nbytes for weight in model.parameters()) - (0 if tied else table.nbytes)


def entry_bytes(model: Any) -> int:
    """Of one token in all layers."""
    config = model.config
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize


def tiny_model() -> Any:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
    return Qwen3ForCausalLM(Qwen3Config(**TINY, **heads, eos_token_id=None)).eval()


def table(options: argparse.Namespace, model: Any, bandwidth: float, rows: list[tuple]) -> str:
    """The steps as Markdown."""
    on_gpu = options.device == "cuda"
    where = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    what = "Qwen3-8B's shape, random weights, bfloat16" if on_gpu else "a tiny shape, float32"
    lines = [
        "| cache | context | held | batch | ms a step | tokens/s | × floor | peak GiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for cell, seconds, peak in rows:
        floor = (weight_bytes(model) + cell.batch * cell.kept * entry_bytes(model)) / bandwidth
        name = f"{NAMES[cell.contender]} | {cell.context:,} | {cell.kept:,} | {cell.batch}"
        if isinstance(seconds, str):
            lines.append(f"| {name} | {seconds} | – | – | – |")
        else:
            memory = "–" if peak is None else f"{peak:.1f}"
            rate = f"{1000 * seconds:.1f} | {cell.batch / seconds:,.0f} | {seconds / floor:.2f}"
            lines.append(f"| {name} | {rate} | {memory} |")
    return (
        f"{what}, {where}, torch {torch.__version__}; median of {REPEATS} runs of {STEPS} steps; floor: "
        f"{weight_bytes(model) / GIB:.2f} GiB of weights and {entry_bytes(model) / 1024:.0f} KiB an entry at "
        f"{bandwidth / 1e12:.2f} TB/s; commit {commit() or 'unknown'}.\n\n" + "\n".join(lines) + "\n\n"
    )


def prefill_table(rows: list[tuple]) -> str:
    """The first tokens as Markdown, each way against the first of its context."""
    lines = [
        "| read by | context | ms to the first token | of the first | peak GiB |",
        "| --- | --- | --- | --- | --- |",
    ]
    first: dict[int, Any] = {}
    for context, name, seconds, peak in rows:
        if isinstance(seconds, str):
            lines.append(f"| {name} | {context:,} | {seconds} | – | – |")
            continue
        share = seconds / first.setdefault(context, seconds)
        memory = "–" if peak is None else f"{peak:.1f}"
        lines.append(f"| {name} | {context:,} | {1000 * seconds:.0f} | {share:.3f} | {memory} |")
    return f"One text, 20% kept; median of {PREFILLS} readings in turns.\n\n" + "\n".join(lines) + "\n\n"


def batches_that_fit(model: Any, options: argparse.Namespace) -> str:
    """How many texts the GPU holds beside the weights, by bytes alone."""
    if options.device == "cpu":
        return ""
    left = torch.cuda.get_device_properties(0).total_memory - sum(weight.nbytes for weight in model.parameters())
    context = options.contexts[-1]
    parts = [(name, int(left // (entry_bytes(model) * (share * context + ROOM)))) for name, share in SHARES.items()]
    texts = ", ".join(f"{count} {name}" for name, count in parts)
    return f"Texts of {context:,} tokens that fit beside the weights, by bytes alone: {texts}."


if __name__ == "__main__":
    main()
