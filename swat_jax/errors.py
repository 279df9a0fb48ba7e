"""The two kinds of failure that the command line turns into one line and an exit code."""


class UsageError(ValueError):
    """The request cannot be met: bad config value, flag, path or data. Exit code 2.

    The message is one line: the argument, what was given, what is allowed.
    """


class RunError(RuntimeError):
    """A valid run had to stop: the loss is not finite, the disk is full. Exit code 1."""
