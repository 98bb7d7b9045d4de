"""The README.md beside an adapter: what it is, how to use it, and the run's own figures."""

from typing import Any

from sparsekv.demo_model import DEMO_MODEL

TEMPLATE = """\
---
base_model: {base}
library_name: {library}
pipeline_tag: text-generation
tags: [sparsekv, kv-cache, eviction-invariant-training{lora_tag}]
---

# {title} of {base}

{what}

Made by SparseKV {version} (commit {commit}); every option, version and the data's
fingerprint are in `eit_config.json`.

## Use

```python
{usage}
```

## Figures of this run

Perplexity of validation rows from documents that were not trained on: {scored}, with the full cache
and evicted to a keep ratio of {min_keep_ratio} by the training rules in turn ({rules}).

| | full cache | evicted |
|---|---|---|
| before training | {full_before} | {evicted_before} |
| after {steps} steps | {full_after} | {evicted_after} |

Lowest evicted perplexity of all evaluations: {best_ppl} at step {best_step}. This folder holds the last step.

Data: {data}; {samples} validation rows of {length} tokens; seed {seed}; one run, no interval; {seconds:.0f} s since the
last start. Read a gain against a control run (`--control`: same data, steps and loss, no eviction), not the base.
"""

USAGE_ADAPTER = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")"""

USAGE_DEMO_MODEL = """\
from peft import PeftModel
from sparsekv.models import load_model, load_tokenizer

model = PeftModel.from_pretrained(load_model("{base}"), "path/to/this/folder")
tokenizer = load_tokenizer("{base}")"""

USAGE_MODEL = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")"""

TRAINED = (
    "Trained so that evicting its KV cache costs little (eviction-invariant training): a teacher with the full cache, "
    "a student whose cache is evicted, loss = CE + {lambda_kl}·KL + {lambda_ce_context}·CE and "
    "{lambda_context}·KL on the context + {lambda_selection}·selection loss, keep ratio {initial_keep_ratio} → "
    "{min_keep_ratio} ({scheduler_mode}), geometry {geometry}."
)
CONTROL = "A control: trained on the same data, steps and loss as an eviction-invariant model, but without eviction."
BEGUN = " It began as the adapter in `{}`; a teacher, where the loss has one, stays that."


def model_card(record: dict[str, Any], log_history: list[dict[str, float]]) -> str:
    """The card's Markdown, from `eit_config.json`'s content and the trainer's log lines."""
    config = record["config"]
    evaluations = [line for line in log_history if "eval_full_ppl" in line]
    before, after = evaluations[0], evaluations[-1]
    usage = USAGE_ADAPTER if config["lora_r"] else USAGE_MODEL
    if config["lora_r"] and config["model"] == DEMO_MODEL:
        usage = USAGE_DEMO_MODEL
    what = CONTROL if config["control"] else TRAINED.format(**config)
    if config.get("teacher_adapter"):  # which an older record does not have
        what += BEGUN.format(config["teacher_adapter"])
    best = min(evaluations, key=lambda line: line["eval_evicted_ppl"])
    return TEMPLATE.format(
        base=config["model"],
        library="peft" if config["lora_r"] else "transformers",
        lora_tag=", lora" if config["lora_r"] else "",
        title="Control" if config["control"] else "Eviction-invariant training",
        what=what,
        version=record["versions"]["sparsekv"],
        commit=record["commit"] or "unknown",
        usage=usage.format(base=config["model"]),
        scored="the tokens after one cut" if config["geometry"] == "two_region" else "all tokens",
        min_keep_ratio=config["min_keep_ratio"],
        rules=", ".join(sorted(config["rules"])[: record["validation_rows"]]),
        full_before=f"{before['eval_full_ppl']:.3f}",
        evicted_before=f"{before['eval_evicted_ppl']:.3f}",
        full_after=f"{after['eval_full_ppl']:.3f}",
        evicted_after=f"{after['eval_evicted_ppl']:.3f}",
        steps=record["steps"],
        best_ppl=f"{best['eval_evicted_ppl']:.3f}",
        best_step=best["step"],
        data=describe_data(config["data"]),
        samples=record["validation_rows"],
        length=config["max_seq_len"],
        seed=config["seed"],
        seconds=record["seconds"],
    )


def describe_data(data: str | dict[str, float]) -> str:
    """`pydoc 0.5, recall 0.5`."""
    return data if isinstance(data, str) else ", ".join(f"{name} {weight:g}" for name, weight in data.items())
