"""How the command line presents itself: help that fits a screen, and ends with an example."""

import argparse
import shutil
from typing import Any

# Wider lines are hard to read; narrower ones break the flags' descriptions.
_WIDTH = (80, 100)
# Where descriptions begin: behind the longest of most flags.
_COLUMN = 27


class _Formatter(argparse.HelpFormatter):
    """One short line for each flag."""

    def __init__(self, prog: str) -> None:
        columns = shutil.get_terminal_size().columns - 2
        width = min(max(columns, _WIDTH[0]), _WIDTH[1])
        super().__init__(prog, max_help_position=_COLUMN, width=width)


class Parser(argparse.ArgumentParser):
    """A parser whose usage names what is required, and whose help is one list and an example."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=_Formatter, allow_abbrev=False, **settings)

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
