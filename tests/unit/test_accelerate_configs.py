"""Every file in configs/accelerate is what accelerate makes of it."""

import pytest
import yaml
from launching import ACCELERATE, fsdp_environment, launch_options

FILES = sorted(ACCELERATE.glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_accelerate_reads_it(file):
    options = launch_options(file)
    values = yaml.safe_load(file.read_text("utf-8"))
    assert options.num_processes == values["num_processes"] > 1
    assert options.mixed_precision == "no"
    for name, value in values.get("fsdp_config", {}).items():
        assert getattr(options, name) == value, name


def test_ddp_does_not_shard_and_fsdp2_does():
    assert [file.stem for file in FILES] == ["ddp", "fsdp2"]
    ddp, fsdp = map(launch_options, FILES)
    assert (ddp.multi_gpu, ddp.use_fsdp) == (True, False)
    assert (fsdp.multi_gpu, fsdp.use_fsdp) == (False, True)
    assert fsdp_environment(FILES[0]) == {}
    found = fsdp_environment(FILES[1])
    wanted = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
    assert wanted.items() <= found.items()
