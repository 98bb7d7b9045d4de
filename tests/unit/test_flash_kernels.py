"""Which kernels torch's flash attention runs, on a machine without a GPU."""

import logging
from types import SimpleNamespace

import pytest
import torch

from sparsekv import packed_attention
from sparsekv.training import flash_kernels
from tests.flash import rows_of_different_lengths

attention = pytest.importorskip("torch.nn.attention")
SHAPE = (4, 2, 16, torch.device("cpu"))
pytestmark = pytest.mark.skipif(
    not hasattr(attention, "activate_flash_attention_impl"), reason="this torch has one flash attention"
)


@pytest.fixture
def installed(monkeypatch):
    """Makes `works_like` the FA3 of a machine whose GPU takes packed rows."""
    monkeypatch.setattr(flash_kernels, "packs", lambda query, dropout: True)
    monkeypatch.setattr(flash_kernels, "IMPLEMENTATIONS", {"FA3": "math", "FA4": "no_such_package.cute"})
    monkeypatch.setattr(packed_attention, "flash_attention", rows_of_different_lengths)
    monkeypatch.setattr(attention._registry, "_FLASH_ATTENTION_IMPLS", {})

    registered = []

    def install(works_like):
        def register():
            registered.append(works_like)
            before = packed_attention.flash_attention
            packed_attention.flash_attention = works_like
            return SimpleNamespace(remove=lambda: setattr(packed_attention, "flash_attention", before))

        attention.register_flash_attention_impl("FA3", register_fn=register)
        return registered

    yield install
    attention.restore_flash_attention_impl(_raise_warn=False)


def test_what_is_installed_and_right_is_used(installed, caplog):
    def right(*arguments, **options):
        return rows_of_different_lengths(*arguments, **options)

    registered = installed(right)
    with caplog.at_level(logging.WARNING):
        flash_kernels.use_newest(*SHAPE)
        flash_kernels.use_newest(*SHAPE)  # active already
    assert packed_attention.flash_attention is right
    assert registered == [right]
    assert flash_kernels.torch_version() == f"{torch.__version__}, FA3"
    assert not caplog.records


def wrong(query, *arguments, **options):
    return (rows_of_different_lengths(query, *arguments, **options)[0] * 1.1,)


def not_a_number(query, *arguments, **options):
    return (rows_of_different_lengths(query, *arguments, **options)[0] * float("nan"),)


def too_old(*arguments, **options):
    raise NotImplementedError("heads of 16 are not supported\nat all")


@pytest.mark.parametrize(
    ("works_like", "reason"),
    [(wrong, "differs from torch's own by 0.1"), (not_a_number, "by nan"), (too_old, "heads of 16 are not supported")],
)
def test_what_attends_otherwise_is_left_out_with_one_line(works_like, reason, installed, caplog):
    installed(works_like)
    with caplog.at_level(logging.WARNING):
        flash_kernels.use_newest(*SHAPE)
    assert packed_attention.flash_attention is rows_of_different_lengths
    assert flash_kernels.active() is None
    [record] = caplog.records
    assert record.getMessage().startswith("attention without FA3: ")
    assert reason in record.getMessage()
    assert "\n" not in record.getMessage()


def test_a_cpu_has_none_to_try(installed, monkeypatch, caplog):
    monkeypatch.setattr(flash_kernels, "packs", packed_attention.packs)
    installed(too_old)
    flash_kernels.use_newest(*SHAPE)
    assert flash_kernels.active() is None
    assert not caplog.records


@pytest.mark.parametrize(
    ("changes", "tried"),
    [
        ({}, [(4, 2, 16)]),
        ({"num_key_value_heads": None}, [(4, 4, 16)]),
        ({"attention_dropout": 0.1}, []),
        ({"num_attention_heads": [4, 8]}, []),
    ],
)
def test_a_models_heads(changes, tried, monkeypatch):
    found = []
    monkeypatch.setattr(flash_kernels, "use_newest", lambda *shape: found.append(shape[:3]))
    known = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64, "attention_dropout": 0.0}
    config = SimpleNamespace(**known | changes)
    config.get_text_config = lambda: config
    flash_kernels.use_newest_for(SimpleNamespace(config=config, device=torch.device("cpu")))
    assert found == tried
