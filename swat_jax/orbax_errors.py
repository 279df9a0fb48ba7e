"""What goes wrong inside orbax, told once and in one line."""

import contextlib
import logging
import os
import re
import sys
import time
from collections.abc import Iterator
from typing import Any

# How long what orbax had under way may take to report after a failure.
_LATE_SECONDS = 0.5


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Mutes orbax's threads: they print as tracebacks the errors that are raised here anyway."""
    logger = logging.getLogger("absl")

    def mute(record: logging.LogRecord) -> bool:
        return f"{os.sep}orbax{os.sep}" not in record.pathname

    # Of many reads the first that fails ends orbax's event loop; those under way miss it then.
    report = sys.unraisablehook

    def report_others(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            report(unraisable)

    logger.addFilter(mute)
    sys.unraisablehook = report_others
    try:
        yield
    except Exception:
        time.sleep(_LATE_SECONDS)
        raise
    finally:
        sys.unraisablehook = report
        logger.removeFilter(mute)


def refused_by_disk(error: BaseException | None) -> str | None:
    """What the file system said, where it is the cause; tensorstore only writes it in its text."""
    if error is None:
        return None
    if isinstance(error, OSError):
        return error.strerror or one_line(error)
    if code := re.search(r"os_error_code='(\d+)'", str(error)):
        return os.strerror(int(code[1]))
    return refused_by_disk(error.__cause__ or error.__context__)


def one_line(error: BaseException) -> str:
    """The type of an error and the first line of what it says."""
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"
