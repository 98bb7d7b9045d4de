"""The command line: one thin command a phase. Bad input ends with one line and status 2."""

import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

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

    summary = "Train language models so that evicting their KV cache costs little."
    parser = ArgumentParser(prog="sparsekv", description=summary)
    commands = parser.add_subcommands(metavar="command")
    for name, schema, summary in (
        ("train", TrainConfig, "Eviction-invariant training: from text to an adapter."),
        ("merge", MergeConfig, "Merge an adapter into its base model."),
        ("demo", DemoConfig, "Train a small real model here and compare base, control and trained."),
    ):
        command = ArgumentParser(description=summary)
        command.add_argument("--config", action=ActionConfigFile, help="YAML file of options; flags win.")
        command.add_class_arguments(schema, as_group=False, fail_untyped=True)
        commands.add_subcommand(name, command, help=summary)
    return parser


def run(options: Namespace, parser: ArgumentParser) -> int:
    """Run the chosen command; returns the exit status."""
    name = options.subcommand
    values = parser.instantiate_classes(options)[name].as_dict()
    values.pop("config", None)
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

        demo(DemoConfig(**values))
    return 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `sparsekv` command."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("sparsekv").setLevel(logging.INFO)
    warnings.filterwarnings("ignore", category=FutureWarning)
    parser = make_parser()
    try:
        status = run(parser.parse_args(arguments), parser)
    except UserError as error:
        print(f"sparsekv: {error}", file=sys.stderr)
        status = 2
    sys.exit(status)


if __name__ == "__main__":
    main()
