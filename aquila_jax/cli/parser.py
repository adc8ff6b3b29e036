"""How the command line presents itself: help that fits a screen, and ends with an example."""

import argparse
import difflib
import shutil
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

# Wider lines are hard to read; narrower ones break the flags' descriptions.
_WIDTH = (80, 100)
# Where descriptions begin: behind the longest of most flags.
_COLUMN = 27


def at_least(least: int) -> Callable[[str], int]:
    """A flag's type: a whole number, no smaller than `least`."""

    def whole_number(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(
                f"must be a whole number of at least {least}, not {text!r}"
            )
        return number

    return whole_number


def _hint(given: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(given, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


class _Formatter(argparse.HelpFormatter):
    """One short line for each flag."""

    def __init__(self, prog: str) -> None:
        columns = shutil.get_terminal_size().columns - 2
        width = min(max(columns, _WIDTH[0]), _WIDTH[1])
        super().__init__(prog, max_help_position=_COLUMN, width=width)


class Parser(argparse.ArgumentParser):
    """A parser whose usage names what is required, and whose help is one list and an example.

    A mistake is one line, as every other mistake of a person is, and exit code 2.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=_Formatter, allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and where the help is, and end."""
        self.exit(2, f"error: {message}; `{self.prog} --help` shows what there is\n")

    def refuse_unknown(self, unknown: Iterable[str]) -> NoReturn:
        """End because of arguments that mean nothing, with the flags that were perhaps meant."""
        flags = [name for action in self._actions for name in action.option_strings]
        told = [
            f"{argument}{_hint(argument.partition('=')[0], flags)}"
            for argument in unknown
            # What follows an unknown flag is likely its value.
            if argument.startswith("-")
        ]
        self.error(f"unknown arguments: {', '.join(told or unknown)}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        choices = [] if action.choices is None else list(action.choices)
        if choices and value not in choices:
            hint = _hint(str(value), choices) or f"; there are {', '.join(map(str, choices))}"
            raise argparse.ArgumentError(action, f"no {value!r}{hint}")

    def format_usage(self) -> str:
        """One line, of what must be given."""
        return f"usage: {self._line()}\n"

    def format_help(self) -> str:
        """Usage, what the command is for, its arguments in one list, an example."""
        formatter = self._get_formatter()
        formatter.add_text(self.description)
        commands: list[Any] = [
            action for action in self._actions if isinstance(action, argparse._SubParsersAction)
        ]
        formatter.start_section(None)
        for choice in commands:
            # Each with its line of help, without a line for the choice itself.
            formatter.add_arguments(list(choice._get_subactions()))
        formatter.add_arguments(
            [
                action
                for action in self._actions
                if action not in commands and not isinstance(action, argparse._HelpAction)
            ]
        )
        formatter.end_section()
        # An example is copied, so it is not broken to fit the screen.
        example = f"\n{self.epilog}\n" if self.epilog else ""
        return f"{self.format_usage()}{formatter.format_help().lstrip()}{example}"

    def _line(self) -> str:
        needed, is_more = [], False
        for action in self._actions:
            name = action.metavar if isinstance(action.metavar, str) else action.dest
            if isinstance(action, argparse._SubParsersAction):
                needed.append("COMMAND ...")
            elif not action.option_strings:
                needed.append(f"[{name}]" if action.nargs == "?" else name)
                needed += ["..."] if action.nargs == "+" else []
            elif action.required:
                needed.append(f"{action.option_strings[0]} {name}")
            else:
                is_more |= not isinstance(action, argparse._HelpAction)
        return " ".join([self.prog, *needed, *(["[flags]"] if is_more else [])])
