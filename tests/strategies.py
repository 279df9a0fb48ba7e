"""Inputs that hypothesis draws: all bit patterns of a float type; grids with exact sums."""

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

DTYPES = ("float32", "bfloat16", "float16", "float64")
_UNSIGNED = {
    "bfloat16": np.uint16,
    "float16": np.uint16,
    "float32": np.uint32,
    "float64": np.uint64,
}
# Exponent and fraction bits, from which the interesting patterns follow.
_EXPONENT, _FRACTION = (
    {"bfloat16": 8, "float16": 5, "float32": 8, "float64": 11},
    {"bfloat16": 7, "float16": 10, "float32": 23, "float64": 52},
)


def precision_of(dtype: str) -> contextlib.AbstractContextManager:
    """float64 exists in JAX only where x64 is on."""
    return jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext()


def any_bits(dtype: str, shape: int | tuple[int, ...]) -> st.SearchStrategy[np.ndarray]:
    """Arrays of all bit patterns: zeros of both signs, subnormals, Inf, all NaNs, many ties."""
    unsigned = _UNSIGNED[dtype]
    width = 8 * np.dtype(unsigned).itemsize
    infinity = (2 ** _EXPONENT[dtype] - 1) << _FRACTION[dtype]
    one = np.ones((), jnp.dtype(dtype)).view(unsigned).item()
    tiny = 1 << _FRACTION[dtype]
    common = [0, 1, 2, tiny - 1, tiny, one, one + 1, infinity - 1, infinity, infinity + 1]
    signed = [pattern | sign for pattern in common for sign in (0, 1 << (width - 1))]
    elements = st.one_of(st.sampled_from(signed), st.integers(0, 2**width - 1))
    patterns = hnp.arrays(unsigned, shape, elements=elements, fill=st.nothing())
    return patterns.map(lambda bits: bits.view(jnp.dtype(dtype)))


class Grid(NamedTuple):
    """A recipe for values in eighths, with many ties; `zeros` is the part that is 0."""

    seed: int
    levels: int
    zeros: float

    def array(self, shape: Sequence[int], dtype: str = "float32", *, salt: int = 0) -> np.ndarray:
        """Values whose sums of products are exact in float32; another `salt` gives others."""
        rng = np.random.default_rng([self.seed, salt])
        values = rng.integers(1, self.levels + 1, shape) * rng.choice([-1, 1], shape) / 8
        values = np.where(rng.random(shape) < self.zeros, rng.choice([0.0, -0.0], shape), values)
        return values.astype(jnp.dtype(dtype))


def grids() -> st.SearchStrategy[Grid]:
    """All tied, some tied, hardly tied; no zeros, half zeros (as after a ReLU), all zeros."""
    return st.builds(
        Grid,
        seed=st.integers(0, 2**32 - 1),
        levels=st.sampled_from([1, 2, 5, 16]),
        zeros=st.sampled_from([0.0, 0.0, 0.5, 0.95, 1.0]),
    )


def numpy(x: jax.Array) -> np.ndarray:
    """float64 copy of an array of any float type."""
    return np.asarray(x).astype(np.float64)
