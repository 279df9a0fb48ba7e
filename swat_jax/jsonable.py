"""Values as JSON has words for them."""

import json
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np


def jsonable(value: Any) -> Any:
    """A value as JSON can hold it: what is not finite becomes None, a path text.

    Args:
      value: nested dicts, lists, tuples and scalars (numpy's and JAX's too).

    Raises:
      TypeError: the value holds something else.

    Example:
      >>> jsonable({"loss": float("nan"), "shape": (2, 3)})
      {'loss': None, 'shape': [2, 3]}
    """
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if not isinstance(value, float):
        # A scalar of numpy or JAX; bfloat16 has no Python twin and goes by float32.
        array = np.asarray(value)
        if array.ndim or array.dtype == object:
            raise TypeError(f"cannot write {type(value).__name__} as JSON: {value!r}")
        value = array.item() if array.dtype.kind in "biu" else float(array.astype(np.float64))
    return value if not isinstance(value, float) or math.isfinite(value) else None


def plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """As it comes back from JSON: tuples are lists, keys are text."""
    return json.loads(json.dumps(value))
