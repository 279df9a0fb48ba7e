"""Processes that compile at once, and take turns where that takes the GPU.

XLA tries algorithms for a convolution on the GPU while it compiles, each of them once, and takes
the fastest. What other processes run there meanwhile would choose with it, so only one process at
a time compiles such programs. Others compile what tries nothing.
"""

from __future__ import annotations

import fcntl
from collections.abc import Sequence
from typing import Protocol


class Lowered(Protocol):
    """What has been traced and can be compiled: a `Program`, or a `swat_jax.timing.Timer`."""

    def compile(self) -> None: ...


class Turn:
    """Compiles programs, and while another process tries algorithms none that do so too.

    Args:
      path: a file that all these processes lock; None: there are no others.
    """

    def __init__(self, path: str | None = None) -> None:
        # It stays open, and locked at times, as long as the process lives.
        self._lock = None if path is None else open(path, "w")  # noqa: SIM115

    def compile(self, trying: Sequence[Lowered], others: Sequence[Lowered]) -> None:
        """Compiles all, the others first where another process has the turn.

        Args:
          trying: programs for which XLA tries algorithms.
          others: those for which it does not.
        """
        first = self._take(wait=False)
        for program in () if first else others:
            program.compile()
        if not first:
            self._take(wait=True)
        for program in trying:
            program.compile()
        if self._lock is not None:
            fcntl.flock(self._lock, fcntl.LOCK_UN)
        for program in others if first else ():
            program.compile()

    def _take(self, *, wait: bool) -> bool:
        try:
            if self._lock is not None:
                fcntl.flock(self._lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        return True
