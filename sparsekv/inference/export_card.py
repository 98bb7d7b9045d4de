"""The README.md of an exported folder."""

from sparsekv.inference.config import ExportConfig
from sparsekv.version import VERSION

CARD = """\
---
base_model: {base}
library_name: {library}
pipeline_tag: text-generation
tags: [sparsekv, kv-cache]
---

# {base}, with a cache that keeps the anchors

`custom_generate/generate.py` gives `model.generate` a KV cache that holds the first {sink} tokens, the last
{recent}, and the anchors between them. Mode: {mode}; budget: {budget}. It needs torch, transformers ≥ 5.2 and
`attn_implementation` sdpa or eager.

```python
{load}
text = open("long.txt").read()
question = "\\n\\nWhat is this about?"
context_length = len(tokenizer(text).input_ids)
inputs = tokenizer(text + question, return_tensors="pt")
output = model.generate(
    **inputs, custom_generate=folder, trust_remote_code=True, context_length=context_length, max_new_tokens=64
)
print(tokenizer.decode(output[0, inputs.input_ids.shape[1] :]))
```

`context_length`: tokens that are read with full attention and then evicted (without it: the whole prompt). `mode` and
`budget` can be given too, and `past_key_values` for a further turn.

Made by [SparseKV](https://pypi.org/project/sparsekv/) {version}.
"""
LOAD_MODEL = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "path/to/this/folder"
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)"""
LOAD_ADAPTER = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "path/to/this/folder"
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), folder)
tokenizer = AutoTokenizer.from_pretrained(folder)"""


def export_card(config: ExportConfig) -> str:
    """README.md of the folder."""
    apart = config.adapter is not None and not config.merge
    anchors = config.anchors
    return CARD.format(
        base=config.model,
        library="peft" if apart else "transformers",
        sink=anchors.sink_size if anchors.use_sink else 0,
        recent=anchors.recent_size if anchors.use_recent else 0,
        mode=config.mode,
        budget=config.budget or "none",
        load=(LOAD_ADAPTER if apart else LOAD_MODEL).format(base=config.model),
        version=VERSION,
    )
