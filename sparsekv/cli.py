"""The command line: one thin command a phase. Bad input ends with one line and status 2."""

import dataclasses
import itertools
import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser
from transformers.utils.logging import disable_progress_bar

from sparsekv.errors import UserError

STOPPED = 128 + signal.SIGTERM


@dataclass
class MergeConfig:
    """Write the merged model of an adapter, equal to it in logits.

    Parameters
    ----------
    model
        The base: Hub name, local folder, or smollm2-135m.
    adapter
        Folder of the adapter, such as out/final.
    output_dir
        New folder for the merged model.
    """

    model: str
    adapter: str
    output_dir: str


def make_parser() -> ArgumentParser:
    """`sparsekv train | merge | demo`."""
    from sparsekv.demo import DemoConfig
    from sparsekv.training.config import TrainConfig

    about = "Train language models so that evicting their KV cache costs little."
    parser = ArgumentParser(prog="sparsekv", description=about, exit_on_error=False)
    commands = parser.add_subcommands(metavar="command", dest="command")
    for name, schema, summary in (
        ("train", TrainConfig, "Eviction-invariant training: from text to an adapter."),
        ("merge", MergeConfig, "Merge an adapter into its base model."),
        ("demo", DemoConfig, "Train a small real model here and compare base, control and trained."),
    ):
        command = ArgumentParser(description=summary, exit_on_error=False)
        command.add_argument("--config", action=ActionConfigFile, help="YAML file of options; flags win.")
        command.add_class_arguments(schema, as_group=False, fail_untyped=True)
        commands.add_subcommand(name, command, help=summary)
    return parser


def run(name: str, values: dict[str, Any]) -> int:
    """Run a command; returns the exit status."""
    if name == "train":
        from sparsekv.training.config import TrainConfig
        from sparsekv.training.run import train

        final = train(TrainConfig(**values))
        if final is None:
            print("stopped; the same command with --resume continues from the checkpoint just written", file=sys.stderr)
            return STOPPED
        if int(os.environ.get("RANK", 0)) == 0:
            print(final)
    elif name == "merge":
        from sparsekv.models import merge_adapter

        merge_adapter(values["model"], values["adapter"], values["output_dir"])
        print(values["output_dir"])
    else:
        from sparsekv.demo import DemoConfig, demo

        if not demo(DemoConfig(**values)):
            print("stopped; the same command continues", file=sys.stderr)
            return STOPPED
    return 0


def spell_out_switches(arguments: Sequence[str]) -> list[str]:
    """`--resume` → `--resume true`, for every option that is true or false."""
    from sparsekv.training.anchor import AnchorConfig
    from sparsekv.training.config import TrainConfig

    switches = {f"--{field.name}" for field in dataclasses.fields(TrainConfig) if field.type is bool}
    switches |= {f"--anchors.{field.name}" for field in dataclasses.fields(AnchorConfig) if field.type == "bool"}
    spelled: list[str] = []
    for argument, following in itertools.pairwise([*arguments, "--"]):
        spelled.append(argument)
        if argument in switches and following.startswith("--"):
            spelled.append("true")
    return spelled


def files_first(arguments: Sequence[str]) -> list[str]:
    """`train … --config FILE` → `train --config FILE …`: flags win wherever they stand."""
    files: list[str] = []
    others: list[str] = []
    for argument in arguments[1:]:
        is_file = argument == "--config" or argument.startswith("--config=") or files[-1:] == ["--config"]
        (files if is_file else others).append(argument)
    return [*arguments[:1], *files, *others]


def parse(arguments: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """The command and the values of its options."""
    parser = make_parser()
    try:
        options = parser.parse_args(files_first(spell_out_switches(arguments)))
    except UnicodeDecodeError as error:
        raise UserError("--config: the file is not UTF-8 text") from error
    values = parser.instantiate(options)[options.command].as_dict()
    values.pop("config", None)
    return options.command, values


def one_line(error: Exception) -> str:
    """jsonargparse's message of several lines as one, with the flag as it is typed."""
    message = " ".join(str(error).split())
    for theirs, ours in (
        ('Parser key "', "--"),
        ('":', ":"),
        ("Problems parsing config", "--config"),
        ("Unexpected config", "--config: the file holds no options"),
    ):
        message = message.replace(theirs, ours)
    return message


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `sparsekv` command."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("sparsekv").setLevel(logging.INFO)
    if not sys.stderr.isatty():
        disable_progress_bar()  # of loading weights: hundreds of lines in a log file
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        status = run(*parse(sys.argv[1:] if arguments is None else arguments))
    except (UserError, ArgumentError) as error:
        print(f"sparsekv: {one_line(error)}", file=sys.stderr)
        status = 2
    sys.exit(status)


if __name__ == "__main__":
    main()
