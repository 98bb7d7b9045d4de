"""One sample: a forward pass in which every layer's attention becomes a few figures a head, and is forgotten."""

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from sparsekv.adapters import load_adapter
from sparsekv.analysis.config import AnalysisConfig
from sparsekv.analysis.inputs import Inputs, device
from sparsekv.anchors import AnchorSelector
from sparsekv.errors import require
from sparsekv.models import load_model
from sparsekv.observe import check_observable, observing
from sparsekv.tokens import classify_vocabulary


class Measurer:
    """A model, with or without an adapter, that rows are measured with; making one loads the weights.

    Parameters
    ----------
    config : AnalysisConfig
    inputs : Inputs

    Raises
    ------
    UserError
        Weights that cannot be loaded, a model whose attention cannot be captured; when measuring, attention that
        is not a number.
    """

    def __init__(self, config: AnalysisConfig, inputs: Inputs) -> None:
        base = load_model(config.model, config.dtype, device(config), config.trust_remote_code)
        check_observable(base, config.model, config.max_len)
        known = (base.config, config.anchors.extra_punctuation, base.generation_config)
        self._classes = classify_vocabulary(inputs.tokenizer, *known)
        self._selector = AnchorSelector(config.anchors, inputs.tokenizer, base.config, base.generation_config)
        self._statistics = inputs.statistics
        adapter = config.adapter
        self._model: PreTrainedModel | PeftModel = base if adapter is None else load_adapter(base, adapter).eval()
        self._name = f"--model {config.model}" + (f" with --adapter {adapter}" if adapter else "")

    def __call__(self, row: Tensor) -> dict[str, Tensor]:
        """Measure a row, Long[L]: what `SampleFolder.write` keeps."""
        about = {"classes": self._classes[row], "static_anchors": self._selector.classes(row)}
        if not isinstance(self._model, PeftModel):
            return {"figures": self._measure(row, **about)[None], **about}
        with self._model.disable_adapter():
            base = self._measure(row, **about)
        return {"figures": torch.stack([base, self._measure(row, **about)]), **about}

    @torch.no_grad()
    def _measure(self, row: Tensor, **about: Tensor) -> Tensor:
        """Float32[layers, H, S] of the model as it is now."""
        layers: dict[int, Tensor] = {}

        def receive(layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> None:
            layers[layer] = self._statistics(query, key, value, scaling, **about)

        model: Any = self._model
        ids = row[None].to(model.get_input_embeddings().weight.device)
        with observing(model, receive):
            model.get_decoder()(input_ids=ids, use_cache=False)
        figures = torch.stack([layers[layer].cpu() for layer in sorted(layers)])
        broken = figures[..., self._statistics.names.index("position_relative.0")].isnan().any(-1)
        require(not broken.any(), f"{self._name}: attention is not a number in layer {int(broken.int().argmax())}")
        return figures
