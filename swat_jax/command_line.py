"""What the programs have in common: flags, `--help`, `--json`, exit codes, colours.

A program makes a `Parser` of its docstring, which is its help, and gives it to `run` with the
function that does the work. That one returns an `Answer` and raises `UsageError` or `RunError`;
nothing else in the package prints an answer or chooses an exit code.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn, TextIO

from swat_jax.errors import RunError, UsageError, did_you_mean
from swat_jax.jsonable import jsonable

DONE, FAILED, WRONG_USE, INTERRUPTED = 0, 1, 2, 130

COMMON = """
  --json             one JSON document on standard output, of an error too
  --quiet            print errors only (and the JSON document)
  --verbose          print what libraries log too, and where an error comes from

Exit code: 0 done, 1 failed, 2 wrong command, config or file, 130 Ctrl-C.
"""

_COLORS = {"red": 31, "green": 32}


class Answer(NamedTuple):
    """What a program prints at its end.

    Attributes:
      value: for `--json`; what `swat_jax.jsonable` takes.
      text: for people; "" prints nothing. `--quiet` prints it where the code says that it is of an
        error.
      code: the exit code.
    """

    value: Any
    text: str
    code: int = DONE


class Parser(argparse.ArgumentParser):
    """The flags of a program, with `--json`, `--quiet` and `--verbose` among them.

    Args:
      doc: the docstring of the program, which is its help. `COMMON` is added to it.

    Example:
      >>> parser = Parser("Adds numbers.")
      >>> _ = parser.add_argument("--most", type=int)
      >>> parser.parse_args(["--most=3"]).most
      3
      >>> parser.parse_args(["--mots=3"])
      Traceback (most recent call last):
      swat_jax.errors.UsageError: unknown flag --mots; did you mean --most?
    """

    def __init__(self, doc: str | None) -> None:
        super().__init__(add_help=False, allow_abbrev=False)
        self._doc = (doc or "").strip()
        for name in ("--json", "--quiet", "--verbose"):
            self.add_argument(name, action="store_true")
        self.add_argument("-h", "--help", action="store_true")

    def format_help(self) -> str:
        return f"{self._doc}\n{COMMON}"

    def knows(self, flag: str) -> bool:
        """Whether a flag, such as `--json`, is one of the program's."""
        return flag in self._option_string_actions

    # The parameters are those of argparse. A namespace to fill is not taken.
    def parse_args(self, args: Sequence[str] | None = None, namespace: None = None) -> Any:  # type: ignore[override]
        """Raises `UsageError` where argparse would end the process."""
        args = list(sys.argv[1:] if args is None else args)
        # First of all, or a flag that is missing would hide the one that was meant to be it.
        for argument in args:
            if argument == "--":
                break
            flag = argument.partition("=")[0]
            if flag.startswith("--") and not self.knows(flag):
                known = {name.lstrip("-"): name for name in self._option_string_actions}
                near = did_you_mean(flag.lstrip("-"), known)
                self.error(f"unknown flag {flag}{near or '; --help names those there are'}")
        return super().parse_args(args)

    def error(self, message: str) -> NoReturn:
        """Raises a `UsageError` in place of printing a usage and ending the process."""
        kind, _, names = message.partition("the following arguments are required: ")
        if names and not kind:
            message = f"{names} {'are' if ',' in names else 'is'} missing; --help shows examples"
        raise UsageError(message.removeprefix("argument "))


def run(
    parser: Parser,
    work: Callable[[Any], Answer | None],
    argv: Sequence[str] | None = None,
    *,
    stopped: str = "stopped",
) -> int:
    """Parses a command line, does the work, prints the answer.

    Args:
      parser: of the program.
      work: gets the parsed flags; None is the answer of one who has nothing to say.
      argv: the arguments, without the program's name; None: those of the process.
      stopped: what to say after Ctrl-C.

    Returns:
      The exit code: `DONE`, `FAILED` (`RunError`), `WRONG_USE` (`UsageError`), `INTERRUPTED`, or
      that of the answer. Any other error is a bug, and passes.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(arguments):
        print(parser.format_help(), end="")
        return DONE
    verbose = "--verbose" in arguments
    try:
        options = parser.parse_args(arguments)
        with _loudness(options):
            answer = work(options)
    except (UsageError, RunError) as error:
        if verbose:
            traceback.print_exc()
        line = "; ".join(str(error).split("\n"))
        print(f"{colored('error:', 'red', sys.stderr)} {line}", file=sys.stderr)
        return _failed(line, WRONG_USE if isinstance(error, UsageError) else FAILED, arguments)
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        return _failed(stopped, INTERRUPTED, arguments)
    if answer is None:
        return DONE
    if options.json:
        _print(json.dumps(jsonable(answer.value), indent=2, allow_nan=False))
    elif answer.text and (answer.code or not options.quiet):
        _print(answer.text)
    return answer.code


def _failed(line: str, code: int, arguments: Sequence[str]) -> int:
    """The flag is looked for among the arguments, since it may be they that were wrong."""
    if "--json" in arguments:
        _print(json.dumps({"error": line, "exit_code": code}, indent=2))
    return code


def _print(text: str) -> None:
    """A reader that has read enough, such as `head`, is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Python would try again at its end, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _loudness(options: Any) -> Iterator[None]:
    """Sends what the work prints, and what libraries log, to where the flags say."""
    if options.quiet and options.verbose:
        raise UsageError("--quiet and --verbose: give one of them")
    with contextlib.ExitStack() as stack:
        if options.quiet:
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
            stack.callback(logging.disable, logging.root.manager.disable)
            logging.disable(logging.WARNING)
        elif options.json:
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        if options.verbose:
            handler = logging.StreamHandler(sys.stderr)
            handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
            # That of absl, by which Orbax logs, has a level of its own.
            for logger in (logging.getLogger(), logging.getLogger("absl")):
                stack.callback(logger.setLevel, logger.level)
                logger.setLevel(logging.INFO)
            stack.callback(logging.root.removeHandler, handler)
            logging.root.addHandler(handler)
        yield


def colored(text: str, color: str, stream: TextIO) -> str:
    """A text in "red" or "green" where the stream shows colours.

    `NO_COLOR` forbids them and `FORCE_COLOR` asks for them, in this order, where they are set and
    not empty; else it takes a terminal.
    """
    if os.environ.get("NO_COLOR"):
        shown = False
    elif os.environ.get("FORCE_COLOR"):
        shown = True
    else:
        shown = stream.isatty() and os.environ.get("TERM") != "dumb"
    return f"\x1b[{_COLORS[color]}m{text}\x1b[0m" if shown else text
