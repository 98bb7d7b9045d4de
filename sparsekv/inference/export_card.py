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
text, question = open("long.txt").read().strip(), "\\n\\nWhat is this about?"
{prompt}
inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
options = {{"custom_generate": folder, "trust_remote_code": True, "max_new_tokens": 64}}
{context}output = model.generate(**inputs, **options)
print(tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True))
```

Options beside those of `model.generate`: `mode`; `budget`; in mode prefill `context_length`, the tokens that are read
with full attention and then evicted (without it, the whole prompt). `past_key_values`: the cache of an earlier call,
for a further turn. A model loaded by `from_pretrained(folder, trust_remote_code=True)` needs no `custom_generate`.

Made by SparseKV {version}.
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
CONTEXT = """\
context = prompt[: prompt.index(text) + len(text)]  # what is evicted once it has been read
options["context_length"] = len(tokenizer(context, add_special_tokens=False).input_ids)
"""
CHAT = """\
messages = [{"role": "user", "content": text + question}]
prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)"""
PLAIN = """\
prompt = (tokenizer.bos_token or "") + text + question"""


def export_card(config: ExportConfig, chat: bool) -> str:
    """README.md of the folder, of a model with a chat template or without."""
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
        prompt=CHAT if chat else PLAIN,
        context=CONTEXT if config.mode == "prefill" else "",
        version=VERSION,
    )
