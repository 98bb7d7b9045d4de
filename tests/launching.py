"""What `accelerate launch` makes of a configuration file."""

from argparse import Namespace
from pathlib import Path

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

ACCELERATE = Path(__file__).parents[1] / "configs" / "accelerate"


def launch_options(file: Path) -> Namespace:
    """The launcher's options, those of the file included."""
    return _validate_launch_command(launch_command_parser().parse_args(["--config_file", str(file), "train.py"]))[0]


def fsdp_environment(file: Path) -> dict[str, str]:
    """The variables by which processes learn how the model is sharded; empty where it is not."""
    environment = prepare_multi_gpu_env(launch_options(file))
    return {name: value for name, value in environment.items() if name.startswith(("FSDP_", "ACCELERATE_USE_FSDP"))}
