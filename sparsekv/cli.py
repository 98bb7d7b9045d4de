"""The command line: one thin command a phase. Bad input ends with one line and status 2."""

import dataclasses
import itertools
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any, cast, get_type_hints

from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser

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


# Command → what it does, and where the schema of its options is: `--help` imports none, a command its own.
COMMANDS = {
    "train": ("Eviction-invariant training: from text to an adapter.", "sparsekv.training.config:TrainConfig"),
    "eval": ("The press × ratio matrix: what eviction costs a model.", "sparsekv.evaluation.matrix.config:EvalConfig"),
    "compare": ("Results of base, control and trained side by side: what training changed.", None),
    "merge": ("Merge an adapter into its base model.", "sparsekv.cli:MergeConfig"),
    "demo": ("Train a small real model here and compare base, control and trained.", "sparsekv.demo:DemoConfig"),
}


def make_parser(commands: Iterable[str] = COMMANDS) -> ArgumentParser:
    """`sparsekv train | eval | compare | merge | demo`; only the commands named know their options."""
    about = "Train language models so that evicting their KV cache costs little."
    parser = ArgumentParser(prog="sparsekv", description=about, exit_on_error=False)
    subcommands = parser.add_subcommands(metavar="command", dest="command")
    for name, (summary, schema) in COMMANDS.items():
        command = ArgumentParser(description=summary, exit_on_error=False)
        if schema is None:
            command.add_argument("folders", nargs="+", help="Results of the base, a control if any, the trained model.")
            command.add_argument("--output", type=str, help="Folder for compare.md and compare.csv.")
        elif name in commands:
            command.add_argument("--config", action=ActionConfigFile, help="YAML file of options; flags win.")
            command.add_class_arguments(resolve_name(schema), as_group=False, fail_untyped=True)
        subcommands.add_subcommand(name, command, help=summary)
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
    elif name == "eval":
        from sparsekv.evaluation.matrix.config import EvalConfig
        from sparsekv.evaluation.matrix.run import evaluate

        stopped = evaluate(EvalConfig(**values))
        if stopped is not None:
            print("stopped; the same command continues", file=sys.stderr)
            return 128 + stopped
    elif name == "compare":
        from sparsekv.evaluation.comparison.compare import compare

        compare(values["folders"], values["output"])
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
    schema = COMMANDS.get(arguments[0], ("", None))[1] if arguments else None
    switches = set(_switches(resolve_name(schema))) if schema else set()
    spelled: list[str] = []
    for argument, following in itertools.pairwise([*arguments, "--"]):
        spelled.append(argument)
        if argument in switches and following.startswith("--"):
            spelled.append("true")
    return spelled


def _switches(schema: type, prefix: str = "--") -> Iterator[str]:
    for name, kind in get_type_hints(schema).items():
        if kind is bool:
            yield prefix + name
        elif dataclasses.is_dataclass(kind):
            yield from _switches(cast(type, kind), f"{prefix}{name}.")


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
    parser = make_parser(arguments[:1])
    try:
        options = parser.parse_args(files_first(spell_out_switches(arguments)))
    except UnicodeDecodeError as error:
        raise UserError("--config: the file is not UTF-8 text") from error
    except RecursionError as error:
        raise UserError("--config: the file is nested too deeply, or holds itself") from error
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
    logging.getLogger("kvpress").setLevel(logging.ERROR)  # some presses advise whenever one is made
    from transformers.utils.logging import disable_progress_bar

    if not sys.stderr.isatty():
        disable_progress_bar()  # of loading weights: hundreds of lines in a log file
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        status = run(*parse(sys.argv[1:] if arguments is None else arguments))
    except (UserError, ArgumentError) as error:
        print(f"sparsekv: {one_line(error)}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    sys.exit(status)


if __name__ == "__main__":
    main()
