"""On a CUDA device the figures are those of the CPU."""

import pytest
import torch

from sparsekv.analysis.head_statistics import HeadStatistics
from sparsekv.anchors import AnchorConfig
from sparsekv.observe import BLOCK_ELEMENTS, observing, received_attention
from tests.tiny import make_sharp

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
LENGTH = 301


def figures_of(model: torch.nn.Module, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Figures [layers, H, S] and received attention [layers, H, L] of a row of random tokens, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 300, (1, LENGTH), generator=generator)
    classes = torch.randint(0, 6, (LENGTH,), generator=generator, dtype=torch.uint8)
    statistics, figures, received = HeadStatistics(LENGTH, AnchorConfig(recent_size=20)), [], []

    def receive(_, query, key, value, scaling) -> None:
        figures.append(statistics(query, key, value, scaling, classes, classes < 2).cpu())
        received.append(received_attention(query, key, scaling)[0].cpu())

    with torch.no_grad(), observing(model.to(device), receive):
        model.get_decoder()(input_ids=ids.to(device), use_cache=False)
    return torch.stack(figures), torch.stack(received)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("rows", [13, LENGTH])
def test_figures_equal_those_of_the_cpu(family: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BLOCK_ELEMENTS, "cuda", 4 * LENGTH * rows)
    model = make_sharp(family)
    (wanted, wanted_received), (figures, received) = figures_of(model, "cpu"), figures_of(model, "cuda")
    torch.testing.assert_close(received, wanted_received, atol=1e-4, rtol=1e-4)
    names = HeadStatistics(LENGTH, AnchorConfig(recent_size=20)).names
    for index, name in enumerate(names):  # a count may turn on the last bit of a sum: one token then
        tolerance = 1.01 / LENGTH if "tokens_for" in name else 1e-4
        torch.testing.assert_close(
            figures[..., index], wanted[..., index], atol=tolerance, rtol=1e-4, equal_nan=True, msg=name
        )
