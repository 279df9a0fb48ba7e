"""The two kinds of failure that the command line turns into one line and an exit code; warnings."""

import difflib
import functools
import warnings
from collections.abc import Iterable, Mapping


class UsageError(ValueError):
    """The request cannot be met: bad config value, flag, path or data. Exit code 2.

    The message is one line: the argument, what was given, what is allowed.
    """


class RunError(RuntimeError):
    """A valid run had to stop: the loss is not finite, the disk is full. Exit code 1."""


@functools.cache
def warn_once(message: str) -> None:
    """Warns of what is no failure, but not what was asked for; of the same thing once a process."""
    warnings.warn(message, RuntimeWarning, stacklevel=4)


def did_you_mean(given: str, known: Iterable[str] | Mapping[str, str]) -> str:
    """What a message about an unknown name adds: up to three known ones that are like it.

    Args:
      given: the unknown name.
      known: the names that there are; a mapping also says how each of them is told.

    Returns:
      "; did you mean ...?", or "" where no name is like it.

    Example:
      >>> did_you_mean("optimiser", ["optimizer", "data", "model"])
      '; did you mean optimizer?'
      >>> did_you_mean("u9O", ["u80", "u90", "u95"])
      '; did you mean u90?'
    """
    told = known if isinstance(known, Mapping) else {name: name for name in known}
    by_look = {_look(name): name for name in told}
    look = _look(given)
    near = [look] if look in by_look else difflib.get_close_matches(look, by_look, n=3)
    names = [told[by_look[one]] for one in near]
    return f"; did you mean {' or '.join(names)}?" if names else ""


def _look(name: str) -> str:
    """Without what is easily confused: case, the letter o and zero, - and _."""
    return name.lower().replace("o", "0").replace("-", "_")
