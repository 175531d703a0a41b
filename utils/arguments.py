"""What every command of this repository shares: its parser, and how it ends where a user has to mend something."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from utils.misc import errors_in_one_line


class CommandParser(argparse.ArgumentParser):
    """A parser that reads `~` as the home folder, also where no shell has done so (`--output=~/x`, a quoted `~/x`), and
    takes no part of a flag for the whole: a later flag could make it mean another one.

    Args:
        description: printed by `--help` as it stands; a module's docstring.
        options: of `argparse.ArgumentParser`.
    """

    def __init__(self, description: str | None, **options: Any) -> None:
        options = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False, **options}
        super().__init__(description=description, **options)

    def parse_known_args(  # parse_args calls it too
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args([_at_home(word) for word in words], namespace)

    def parse_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """As argparse's; a flag that there is not ends the program with the nearest one that there is."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._nearest(unknown)}")
        return found

    def _nearest(self, unknown: Sequence[str]) -> str:
        flags = [word.partition("=")[0] for word in unknown if word.startswith("--")]
        near = [difflib.get_close_matches(flag, self._option_string_actions, n=1) for flag in flags]
        names = [match[0] for match in near if match]
        return f"; did you mean {', '.join(names)}?" if names else ""


def _at_home(word: str) -> str:
    flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return flag + equals + (os.path.expanduser(value) if value == "~" or value.startswith("~/") else value)


def at_least(least: int) -> Callable[[str], int]:
    """The type of a flag that takes whole numbers from `least` on."""

    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}; give {least} or more")
        return value

    number.__name__ = "whole number"  # argparse names it where the text is no number
    return number


def output_file(text: str) -> Path:
    """The type of a flag that names a file which is written when the work is done: what can't be one is said before."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder; give the name of a file in it")
    there = next(folder for folder in path.absolute().parents if folder.exists())
    if not there.is_dir():
        raise argparse.ArgumentTypeError(f"{text} can't be written, because {there} is a file; choose another place")
    if not os.access(there, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text} can't be written, because {there} is read-only; choose another place")
    return path


def run_command(main: Callable[[], int | None], *also: type[Exception]) -> NoReturn:
    """Run a command and end the program; what a user can mend ends it with one line.

    Args:
        main: returns the exit code; None is 0.
        also: errors besides those of values, imports, files and networks.
    """
    with errors_in_one_line(ValueError, ImportError, OSError, *also):
        sys.exit(main())
