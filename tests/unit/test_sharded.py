"""Weights that FSDP2 divides are asked for one module ahead."""

import itertools

from tiny import make_tiny
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from sparsekv.training.sharded import gather_ahead


def test_every_divided_module_asks_for_the_next_and_no_other_does(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        FSDPModule, "set_modules_to_forward_prefetch", lambda module, others: asked.append((module, *others))
    )
    decoder = make_tiny("llama").get_decoder()
    gather_ahead(decoder)
    assert asked == []
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for module in (*decoder.layers, decoder.embed_tokens, decoder.norm):  # in another order than they run
            fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
    finally:
        distributed.destroy_process_group()
    gather_ahead(decoder)
    parts = [decoder.embed_tokens, *decoder.layers, decoder.norm]
    assert asked == list(itertools.pairwise(parts))
