"""The command line: ``balcaprl train | demo | evaluate | merge | report | prepare | recaption | judge-audit | ...``."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from pathlib import Path

from jsonargparse import ActionConfigFile, Namespace, set_parsing_settings

from balcaprl import __version__
from balcaprl.cli.checkpoint_settings import read_checkpoint_settings
from balcaprl.cli.judge import JUDGE_COMMANDS
from balcaprl.cli.parser import Command, CommandParser, refuse, to_config, user_path
from balcaprl.config import TrainConfig
from balcaprl.config.base import expand_home
from balcaprl.config.recipe import RecipeError, check_recipe, take_options
from balcaprl.logtext import PrintableFormatter, printable, printable_lines
from balcaprl.types import RunStoppedError

RECIPES = Path(__file__).parents[1] / "recipes"
_CLOSING_S = 5.0
"""Time, in seconds, for closing judge, sampler and threads when the user stops a run at once."""
# Errors that a user can fix are shown in one line, without a traceback.
_USER_ERRORS = (
    ValueError,
    OSError,  # a full disk, a missing file, a network that cannot be reached
    ImportError,
    RunStoppedError,
)


def main(argv: list[str] | None = None) -> int:
    """Run one command and return the exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments:
        build_parser().print_help(sys.stderr)
        return 2
    try:
        arguments = _checked(_spread_recipe(arguments))
    except RecipeError as error:
        refuse(f"balcaprl {arguments[0]}", str(error), error.hint)
    except _USER_ERRORS as error:
        return _tell(arguments[0], error)
    parser = build_parser()
    parser.command = arguments[0] if arguments[0] in _COMMANDS else ""
    options = parser.parse_args(arguments)
    command = options.command
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("balcaprl").setLevel(logging.INFO)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        return _COMMANDS[command].run(options[command])
    except _USER_ERRORS as error:
        return _tell(command, error)


def _tell(command: str, error: Exception) -> int:
    print(printable_lines(f"balcaprl {command}: {error}"), file=sys.stderr)
    if os.environ.get("BALCAPRL_TRACEBACK"):
        raise error
    return 1


def build_parser() -> CommandParser:
    """Build the parser of all commands, with help for every field of every section."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = CommandParser(prog="balcaprl", description="Balanced reinforcement learning for image captioners.")
    parser.add_argument("--version", action="version", version=f"balcaprl {__version__}")
    commands = parser.add_subcommands(dest="command")
    for name, command in _COMMANDS.items():
        commands.add_subcommand(name, command.make_parser(), help=command.help)
    return parser


def _takes_config(command: str) -> bool:
    return command in _COMMANDS and _COMMANDS[command].takes_config


def _spread_recipe(arguments: list[str]) -> list[str]:
    """Add ``--config`` to a command line that names its configuration in another way.

    ``train recipe.yaml`` means ``train --config recipe.yaml``; a bare name is a recipe that ships with the package.
    ``evaluate FOLDER`` uses the harmless part of the configuration of the run that wrote the checkpoint.
    """
    if len(arguments) < 2 or arguments[1].startswith("-"):
        return arguments
    command, name, *rest = arguments
    if command != "evaluate" and _takes_config(command):
        shipped = {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}
        if not expand_home(name).exists():
            if name not in shipped:
                raise RecipeError(f"{name}: no such file", f"recipes that ship: {', '.join(shipped)}")
            name = str(shipped[name])
        return [command, "--config", name, *rest]
    if command == "evaluate" and not any(a.split("=")[0] == "--config" for a in rest):
        return [command, name, *_settings_of_checkpoint(expand_home(name), rest), *rest]
    return arguments


def _settings_of_checkpoint(checkpoint: Path, overrides: list[str]) -> list[str]:
    """Arguments with the settings that a checkpoint may choose; the settings left out are named on standard error."""
    settings = read_checkpoint_settings(checkpoint)
    if settings is None:
        return []
    if settings.left_out:
        told = "; ".join(f"{', '.join(names)} ({why})" for why, names in settings.left_out.items())
        print(
            f"balcaprl evaluate: left out of the checkpoint's configuration: {told}. To use them, name a recipe that you "
            "trust with --config, or give them here",
            file=sys.stderr,
        )
    if settings.data_kind != "scenes" and not any(a.split("=")[0] in ("--data", "--data.kind") for a in overrides):
        raise ValueError(
            f"{checkpoint} was trained on data of kind {printable(settings.data_kind)}, which a checkpoint does not choose: "
            "name its recipe with --config, or the data with --data.kind and --data.path"
        )
    return ["--config", json.dumps(settings.taken)] if settings.taken else []


def _checked(arguments: list[str]) -> list[str]:
    """Check recipes and options by the rules of ``balcaprl.config.recipe``, and pass them on as one ``--config``."""
    command, *rest = arguments
    if not _takes_config(command) or {"-h", "--help"} & set(rest):
        return arguments
    plain, rest = take_options(rest)
    config = check_recipe(plain).model_dump(mode="json", exclude_unset=True)
    return [command, *rest, *(["--config", json.dumps(config)] if plain else [])]


def _train_parser() -> CommandParser:
    parser = CommandParser(description="Train as a recipe and dotted overrides say.")
    parser.add_argument("--config", action=ActionConfigFile, help="a recipe in YAML")
    parser.add_class_arguments(TrainConfig)
    return parser


def _demo_parser() -> CommandParser:
    parser = CommandParser(description="Train the small captioner that ships with the package on drawn scenes.")
    parser.add_argument("--out", type=user_path, default=Path("demo-run"), help="folder of everything the run writes")
    parser.add_argument("--seed", type=int, default=0, help="seed of data order and sampling")
    parser.add_argument("--steps", type=int, default=None, help="training steps; default: those of the demo recipe")
    parser.add_argument("--sampler", choices=["auto", "vllm", "hf"], default="auto", help="who samples captions")
    return parser


def _evaluate_parser() -> CommandParser:
    parser = CommandParser(description="Score a checkpoint on held-out images, under the configuration of its run.")
    parser.add_argument("folder", type=user_path, help="a checkpoint; of an adapter alone with --model.path")
    parser.add_argument(
        "--config", action=ActionConfigFile, help="a recipe; default: what is harmless of the run's own"
    )
    parser.add_argument(
        "--out",
        type=user_path,
        default=None,
        help="also write scores and captions to this folder, empty or of an evaluation",
    )
    parser.add_class_arguments(TrainConfig)
    return parser


def _merge_parser() -> CommandParser:
    parser = CommandParser(
        description="Merge the adapter (LoRA) of a checkpoint into the model that it was trained on: a stock transformers "
        "folder, in the data type of that model."
    )
    parser.add_argument("folder", type=user_path, metavar="CHECKPOINT", help="a checkpoint that holds an adapter alone")
    parser.add_argument("out", type=user_path, metavar="OUT", help="the folder to write; empty, or not there yet")
    parser.add_argument(
        "--base",
        type=str,
        default=None,
        help="the model that the adapter was trained on: a folder, a hub id, or demo. Needed, as a checkpoint does not choose "
        "what is loaded",
    )
    return parser


def _report_parser() -> CommandParser:
    parser = CommandParser(description="Write report.html of a run folder anew.")
    parser.add_argument("run", type=user_path, help="the run folder")
    return parser


def _warmstart_parser() -> CommandParser:
    parser = CommandParser(description="Train the demo's warm start from scratch (about 25 minutes on two cores).")
    parser.add_argument("out", type=user_path, help="checkpoint folder to write")
    return parser


def _run_training(config: TrainConfig) -> int:
    from balcaprl.cli.places import check_places
    from balcaprl.training.prospects import refuse_hopeless

    refuse_hopeless(config)  # runs before torch is imported and before a folder is made
    check_places(config)
    from balcaprl.training.trainer import Trainer

    _without_bars()
    trainer = Trainer(config)
    try:
        summary = trainer.train()
    except KeyboardInterrupt:  # second signal: stop even if closing takes too long
        closing = threading.Thread(target=trainer.close, daemon=True)
        closing.start()
        closing.join(_CLOSING_S)
        print(
            "balcaprl: stopped at once; run the same command again to go on from the last checkpoint", file=sys.stderr
        )
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(128 + signal.SIGINT)
    except BaseException:
        trainer.close()
        raise
    trainer.close()
    print(json.dumps(summary, indent=2))
    print(f"report: {config.output_dir / 'report.html'}", file=sys.stderr)
    return 0 if trainer.stop_signal is None else 128 + trainer.stop_signal


def _without_bars() -> None:
    """Turn off the progress bars that transformers shows while it loads or writes a model's weights."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def _train(options: Namespace) -> int:
    return _run_training(to_config(options.as_dict()))


def _demo(options: Namespace) -> int:
    import yaml

    plain = yaml.safe_load((RECIPES / "demo.yaml").read_text())
    plain |= {"output_dir": str(options.out), "seed": options.seed}
    if options.steps is not None:
        plain["steps"] = options.steps
    plain["rollout"]["sampler"] = options.sampler
    return _run_training(to_config(plain))


def _evaluate(options: Namespace) -> int:
    from balcaprl.cli.places import check_data_path

    plain = options.as_dict()
    folder, out = plain.pop("folder"), plain.pop("out")
    config = to_config(plain)
    check_data_path(config.data)  # before torch is imported
    from balcaprl.evaluation.standalone import evaluate_checkpoint

    _without_bars()
    scores = evaluate_checkpoint(folder, config, out)
    print(json.dumps(scores, indent=2))
    return 0


def _merge(options: Namespace) -> int:
    from balcaprl.cli.places import check_merge

    base = None if options.base is None else str(expand_home(options.base))
    check_merge(options.folder, options.out, base)  # before torch is imported
    from balcaprl.checkpoints.merge import merge_checkpoint

    _without_bars()
    merge_checkpoint(options.folder, options.out, base)
    print(options.out)
    return 0


def _report(options: Namespace) -> int:
    from balcaprl.reporting.report import write_report

    print(write_report(options.run))
    return 0


def _warmstart(options: Namespace) -> int:
    from balcaprl.demo.warmstart import WarmstartConfig, build_warmstart

    build_warmstart(options.out, WarmstartConfig())
    return 0


def _doctor(_: Namespace) -> int:
    from balcaprl.cli.doctor import print_doctor

    return print_doctor()


_COMMANDS = {
    "train": Command(
        "train as a recipe says: balcaprl train recipe.yaml [--steps 100 ...]", _train_parser, _train, takes_config=True
    ),
    "demo": Command("train the small captioner that ships with the package, in minutes", _demo_parser, _demo),
    "evaluate": Command("score a checkpoint on held-out images", _evaluate_parser, _evaluate, takes_config=True),
    "merge": Command(
        "write an adapter's checkpoint and its model as one stock transformers folder", _merge_parser, _merge
    ),
    "report": Command("write report.html of a run folder anew", _report_parser, _report),
    **JUDGE_COMMANDS,
    "warmstart": Command("rebuild the demo's warm start from scratch", _warmstart_parser, _warmstart),
    "doctor": Command("what is installed, what will be used, what is wrong", CommandParser, _doctor),
}

if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main())
