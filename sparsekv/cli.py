"""The command line: arguments → the options of a command. Bad input ends with one line and status 2."""

import difflib
import itertools
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Iterable, Sequence
from pkgutil import resolve_name
from typing import Any, cast, get_args

from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, Namespace

from sparsekv.cluster.config import CLUSTER, PIPELINE
from sparsekv.commands import COMMANDS
from sparsekv.errors import LostProcessError, UserError
from sparsekv.option_files import check_value, options_of, reading
from sparsekv.parser_messages import one_line


def make_parser(commands: Iterable[str] = COMMANDS) -> ArgumentParser:
    """`sparsekv train | eval | … | demo`; only the commands named know their options."""
    about = "Train language models so that evicting their KV cache costs little."
    parser = ArgumentParser(prog="sparsekv", description=about, exit_on_error=False, allow_abbrev=False)
    subcommands = parser.add_subcommands(metavar="command", dest="command")
    for name, known in COMMANDS.items():
        command = ArgumentParser(description=known.summary, exit_on_error=False, allow_abbrev=False)
        if name == "compare":
            command.add_argument(
                "folders",
                nargs="+",
                help="Results of the base, a control if any, the trained model; a,b,c: of several seeds.",
            )
            command.add_argument("--output", type=str, help="Folder for compare.md and compare.csv.")
        elif name == "report":
            command.add_argument("results", nargs="+", help="Folders of eval, train, analyze or demo.")
            command.add_argument("--out", type=str, default="report.html", help="The page to write.")
            command.add_argument("--figures", action="store_true", help="Also every chart as PNG, SVG and CSV.")
            command.add_argument("--latex", action="store_true", help="Also every table as LaTeX and Markdown.")
        elif name in ("submit", "status", "cancel"):
            add_cluster_arguments(command, name)
        elif known.schema and name in commands:
            command.add_argument("--config", action=ActionConfigFile, help="YAML file of options; flags win.")
            command.add_class_arguments(resolve_name(known.schema), as_group=False, fail_untyped=True)
        subcommands.add_subcommand(name, command, help=known.summary)
    return parser


def add_cluster_arguments(command: ArgumentParser, name: str) -> None:
    """The options of `submit`, `status` and `cancel`."""
    if name == "submit":
        command.add_argument("target", help="pipeline; or KEY for phase 1 of a model, KEY_trained for phase 3.")
    command.add_argument("--model", type=str, help="Key of the model in the experiment file.")
    command.add_argument("--pipeline", type=str, default=PIPELINE, help="The experiment file.")
    if name == "submit":
        command.add_argument("--cluster", type=str, default=CLUSTER, help="The site file.")
        command.add_argument("--executor", default="slurm", help="slurm, or local: this machine, one process a GPU.")
        command.add_argument("--batch", type=int, help="Jobs of a matrix at a time; default: of the experiment file.")
        command.add_argument("--gpus", type=int, help="GPUs of a job of a matrix; default: of the experiment file.")
        command.add_argument("--dry_run", action="store_true", help="Only show jobs and their cost.")
        command.add_argument("--yes", action="store_true", help="Submit without a question.")


def with_underscores(arguments: Sequence[str]) -> list[str]:
    """`--prompt-file` → `--prompt_file`: both spellings of every option."""
    halves = [argument.partition("=") if argument.startswith("--") else ("", "", argument) for argument in arguments]
    return [flag[:2] + flag[2:].replace("-", "_") + equals + value for flag, equals, value in halves]


def spell_out_switches(arguments: Sequence[str]) -> list[str]:
    """`--resume` → `--resume true`, for every option that is true or false."""
    switches = {flag for flag, kind in known_flags(arguments) if kind is bool}
    spelled: list[str] = []
    for argument, following in itertools.pairwise([*arguments, "--"]):
        spelled.append(argument)
        if argument in switches and following.startswith("--"):
            spelled.append("true")
    return spelled


def known_flags(arguments: Sequence[str]) -> list[tuple[str, Any]]:
    """(flag, type) of every option of the command that the arguments begin with."""
    schema = schema_of(arguments)
    return [(f"--{name}", kind) for name, kind in options_of(schema)] if schema else []


def schema_of(arguments: Sequence[str]) -> type | None:
    """The dataclass of the options of the command that the arguments begin with, where it has one."""
    schema = COMMANDS[arguments[0]].schema if arguments and arguments[0] in COMMANDS else None
    return cast(type, resolve_name(schema)) if schema else None


def with_near_flag(message: str, arguments: Sequence[str]) -> str:
    """The message, and the option that an unknown one may have been meant for."""
    unknown = re.match(r"unrecognized arguments: (--[\w.]+)", message)
    near = difflib.get_close_matches(unknown[1], [flag for flag, _ in known_flags(arguments)], n=1) if unknown else []
    return f"{message}; did you mean {near[0]}?" if near else message


def files_first(arguments: Sequence[str]) -> list[str]:
    """`train … --config=FILE` → `train --config FILE …`: flags win wherever they stand, and --anchors over --config."""
    groups: dict[str | None, list[str]] = {"--config": [], "--anchors": [], None: []}
    awaited = None  # the option whose file comes next
    for argument in arguments[1:]:
        flag, *file = argument.split("=", 1)
        if flag in groups:
            groups[flag] += [flag, *file]
            awaited = None if file else flag
        else:
            groups[None if argument.startswith("--") else awaited].append(argument)
            awaited = None
    return [*arguments[:1], *itertools.chain(*groups.values())]


def parse(arguments: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """The command and the values of its options."""
    parser = make_parser(arguments[:1])
    words = files_first(spell_out_switches(with_underscores(arguments)))
    schema = schema_of(arguments)
    for flag, value in itertools.pairwise(words if schema else []):
        check_value(flag, value, words[0], cast(type, schema))
    with reading("--config"):
        options = parser.parse_args(words)
    refuse_nulls(words, options[options.command])
    values = parser.instantiate(options)[options.command].as_dict()
    values.pop("config", None)
    return options.command, values


def refuse_nulls(arguments: Sequence[str], options: Namespace) -> None:
    """Raise UserError for an option that a file calls null and that needs a value: jsonargparse lets it through."""
    for flag, kind in known_flags(arguments):
        if type(None) not in get_args(kind) and options.get(flag[2:], ...) is None:
            raise UserError(f"{flag} null: give a value, or leave it out")


def quieten() -> None:
    """Of what other packages say, keep what matters to a user."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("sparsekv").setLevel(logging.INFO)
    logging.getLogger("kvpress").setLevel(logging.ERROR)  # some presses advise whenever one is made
    if not sys.stderr.isatty():  # of loading weights: hundreds of lines in a log file
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read when transformers is imported
    warnings.filterwarnings("ignore", category=FutureWarning)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `sparsekv` command."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        quieten()
        command, values = parse(arguments)
        status = COMMANDS[command].run(values)
    except (UserError, ArgumentError) as error:
        print(f"sparsekv: {with_near_flag(one_line(error), arguments)}", file=sys.stderr)
        status = 2
    except LostProcessError as error:
        print(f"\nsparsekv: {error}", file=sys.stderr)  # below the bar of a progress that ends here
        status = 1
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except BrokenPipeError:  # whoever read the output has left; at exit Python would flush into nothing
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 128 + signal.SIGPIPE
    sys.exit(status)


if __name__ == "__main__":
    main()
