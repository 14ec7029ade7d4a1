"""A command of the command line, and the parser, which answers a usage error with at most three lines of text."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from jsonargparse import ArgumentParser, Namespace

from balcaprl.config import TrainConfig
from balcaprl.config.base import expand_home
from balcaprl.config.recipe import check_recipe, did_you_mean
from balcaprl.logtext import printable_lines


class Command(NamedTuple):
    """One command of the command line."""

    help: str
    """What the command does, for the list of all commands."""
    make_parser: Callable[[], CommandParser]
    run: Callable[[Namespace], int]
    """Runs the command with its options, and returns the exit status."""
    takes_config: bool = False
    """Whether the command takes a whole configuration."""


def to_config(plain: dict[str, Any]) -> TrainConfig:
    """Make the configuration from the parsed options of a command that takes one."""
    plain.pop("config", None)
    return check_recipe(plain)


def user_path(text: str) -> Path:
    """Convert a path that the user wrote, and expand ``~``, which shells leave as it is in ``--out=~/x``."""
    return expand_home(text)


def refuse(program: str, message: str, hint: str = "") -> NoReturn:
    """Print what is wrong, what helps and where to look, one line each, and exit with status 2."""
    lines = [f"{program}: {message}", *([hint] if hint else []), f"`{program} --help` explains every option"]
    print("\n".join(printable_lines(" ".join(line.split())) for line in lines), file=sys.stderr)
    raise SystemExit(2)


class CommandParser(ArgumentParser):
    """Parser that says what is wrong with a command line and which option may have been meant."""

    command = ""
    """Command that is being parsed, for messages; only the outermost parser has it."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        parser = getattr(ex, "subcommand_parser", None) or self
        program = f"{parser.prog.replace(' [options]', '')} {parser.command}".strip()
        choice = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        if choice:
            known = re.findall(r"[\w-]+", choice[2])
            close = difflib.get_close_matches(choice[1], known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
            refuse(program, f"{choice[1]} is no choice here", hint)
        unknown = re.search(r"unrecognized arguments: (?:--([\w.]+))?", message)
        if unknown and unknown[1]:
            own = [name.removeprefix("--") for action in parser._actions for name in action.option_strings]
            close = difflib.get_close_matches(unknown[1], own, n=1)
            hint = f"did you mean --{close[0]}?" if close else ""
            if not close and any("." in name for name in own):  # a command that takes a whole configuration
                hint = did_you_mean(unknown[1]).replace("`", "`--", 1)
            refuse(program, f"there is no option --{unknown[1]}", hint)
        # Of a pydantic error, keep only the message, without the type of the error and the link to its documentation.
        plain = re.sub(r'Parser key "([^"]*)":', r"--\1:", message)
        plain = re.sub(r"\d+ validation errors? for \S+\n\s*", "", plain)
        plain = re.sub(r" \[type=.*|\n +For further information.*", "", plain)
        refuse(program, plain)
