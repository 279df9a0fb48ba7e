"""Programs that are compiled ahead of their first call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


class Program:
    """A function that is compiled for operands of given shapes, and takes no others.

    Args:
      function: of arrays.
      shapes: like its operands, of `jax.ShapeDtypeStruct` or arrays.
    """

    def __init__(self, function: Callable[..., Any], *shapes: Any) -> None:
        self._lowered = jax.jit(function).lower(*shapes)
        self._run: Any = None

    def compile(self) -> None:
        self._run = self._lowered.compile()

    def __call__(self, *operands: Any) -> Any:
        return self._run(*operands)
