"""Names of layers by pattern: ``stage1/*/conv?`` over paths such as ``stage1/0/conv1``."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Collection, Iterable, Sequence

from swat_jax.errors import UsageError


def matches(pattern: str, path: str) -> bool:
    """Whether a path fits a pattern.

    ``*``, ``?`` and ``[...]`` stand for characters of one name between slashes, ``**`` for any
    number of names. Upper and lower case differ. The path of a layer that is the whole model is
    empty.

    Example:
      >>> matches("stage1/*/conv?", "stage1/0/conv1"), matches("stage1/*", "stage1/0/conv1")
      (True, False)
      >>> matches("stage1/**", "stage1/0/conv1"), matches("**/conv1", "conv1")
      (True, True)
    """
    return _fits(pattern.split("/"), path.split("/"))


def _fits(patterns: Sequence[str], names: Sequence[str]) -> bool:
    if not patterns:
        return not names
    first, *rest = patterns
    if first == "**":
        return any(_fits(rest, names[skipped:]) for skipped in range(len(names) + 1))
    return bool(names) and fnmatch.fnmatchcase(names[0], first) and _fits(rest, names[1:])


def select(pattern: str, paths: Collection[str], argument: str) -> list[str]:
    """The paths that fit a pattern.

    Args:
      pattern: see `matches`.
      paths: of all layers.
      argument: what the pattern was given as, for the message.

    Raises:
      UsageError: none does; says what may have been meant.

    Example:
      >>> select("*/conv", ["stem", "block1/conv", "block2/conv"], "dense")
      ['block1/conv', 'block2/conv']
    """
    if not isinstance(pattern, str):
        raise UsageError(f"{argument} must have patterns that are text, got {pattern!r}")
    found = [path for path in paths if matches(pattern, path)]
    if not found:
        holds_layers = any(path.startswith(f"{pattern}/") for path in paths)
        meant = f"did you mean '{pattern}/**'?" if holds_layers else ""
        raise UsageError(
            f"{argument}: no layer fits {pattern!r}; "
            + (meant or did_you_mean(pattern, paths, "layers"))
        )
    return found


def did_you_mean(given: str, known: Iterable[str], kind: str) -> str:
    """The end of a message about a name that is not known: what it may mean, or all there is.

    Example:
      >>> did_you_mean("cnv1", ["conv1", "head"], "layers")
      "did you mean 'conv1'? (layers: conv1, head)"
    """
    names = list(known)
    close = difflib.get_close_matches(given, names, n=3, cutoff=0.5)
    # One that starts alike but is much longer is not close to difflib.
    close = close or [name for name in names if given and name.startswith(given)][:3]
    listed = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    if not close:
        return f"{kind}: {listed}"
    return f"did you mean {' or '.join(map(repr, close))}? ({kind}: {listed})"
