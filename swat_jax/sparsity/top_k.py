"""Exact top-K selection by magnitude, without sorting.

The magnitude of a float is its bit pattern with the sign removed: for IEEE floats the patterns
order as the values do, so the K-th largest magnitude is found by bisection on an integer, one
bit per pass over the data, whatever the distribution of the values. The cost is O(n) time per
bit and O(n) memory; a sort costs more of both, and `jax.lax.top_k` far more for the large K that
SWAT needs.

The rules (SWAT keeps what is at least the K-th largest):

* ties survive: every value whose magnitude equals the threshold is kept;
* zeros never count as kept, even where the threshold is 0;
* NaN orders above infinity and is always kept, so that it reaches the loss.
"""

from __future__ import annotations

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from swat_jax.errors import UsageError
from swat_jax.sparsity.varying import varying_like

# A scalar count: a Python int, a 32-bit integer array, or a uint32 array of shape (2,) that holds
# the high and the low word of a count that needs more than 31 bits.
Count = int | jax.Array

# Sizes from here on are counted in two 32-bit words (JAX has no 64-bit integers by default).
_ONE_WORD_LIMIT = 2**31


def keep_count(sparsity: float | str, size: int, *, argument: str = "sparsity") -> int:
    """Number of values to keep: ``ceil((1 - sparsity) * size)``, in exact decimal arithmetic.

    The sparsity counts as the decimal number that it prints as: ``(1 - 0.7) * 10`` is
    3.0000000000000004 in floats, whose ceiling is 4; this function returns 3.

    Args:
      sparsity: fraction of zeros, in ``[0, 1)``.
      size: number of values.
      argument: what the sparsity is called where it came from, for the error message.

    Raises:
      UsageError: if ``sparsity`` is no number in ``[0, 1)``.

    Example:
      >>> keep_count(0.7, 10)
      3
    """
    return math.ceil((1 - check_sparsity(sparsity, argument)) * size)


def check_sparsity(sparsity: float | str, argument: str = "sparsity") -> Fraction:
    """The exact decimal value of a sparsity, or a `UsageError` if it is not in ``[0, 1)``."""
    try:
        value = Fraction(str(sparsity))
    except (ValueError, ZeroDivisionError):
        value = None
    if value is None or not 0 <= value < 1:
        raise UsageError(
            f"{argument} must be a fraction of zeros in [0, 1), got {sparsity!r}"
            + (": 1 would keep nothing" if value == 1 else "")
        )
    return value


def split_count(count: int) -> np.ndarray:
    """A count as the two-word form: uint32 array ``[high, low]``.

    Example:
      >>> split_count(2**32 + 5).tolist()
      [1, 5]
    """
    return np.array([count >> 32, count & 0xFFFFFFFF], np.uint32)


def magnitude(x: jax.Array) -> jax.Array:
    """Bit patterns (unsigned, as wide as ``x``) that order as ``abs(x)`` does, all NaNs on top."""
    dtype = x.dtype
    info = jnp.finfo(dtype)
    unsigned = jnp.dtype(f"uint{info.bits}")
    bits = lax.bitcast_convert_type(x, unsigned) & jnp.array(2 ** (info.bits - 1) - 1, unsigned)
    return jnp.minimum(bits, jnp.array(_nan_magnitude(dtype), unsigned))


def magnitude_in(x: jax.Array, wide: jnp.dtype) -> jax.Array:
    """`magnitude` of ``x`` after an exact conversion to ``wide``, at least as wide a type."""
    if x.dtype == wide or jnp.finfo(wide).bits < 64:
        return magnitude(x.astype(wide))
    # XLA may take subnormals for 0 on the way to float64, where they are ordinary numbers.
    info = jnp.finfo(x.dtype)
    bits = magnitude(x)
    subnormal = bits.astype(wide) * float(info.smallest_subnormal)
    ordinary = bits >= jnp.array(2**info.nmant, bits.dtype)
    return magnitude(jnp.where(ordinary, x.astype(wide), subnormal))


def threshold(x: jax.Array, keep: Count) -> jax.Array:
    """The ``keep``-th largest magnitude of ``x``, exactly.

    Args:
      x: floats of any shape and any float type.
      keep: how many values to keep, possibly traced. More than ``x.size`` gives 0, fewer than 1
        gives NaN (above every number, so that only NaNs are kept). At and above 2**31 values it
        may be given in two words (see `split_count`).

    Returns:
      Scalar of the type of ``x``. An empty ``x`` gives 0.

    Example:
      >>> float(threshold(jnp.array([3.0, -1.0, -2.0, 0.5]), 2))
      2.0

    Source: SWAT (Raihan & Aamodt, NeurIPS 2020), section 3: top-K by magnitude.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise UsageError(f"x must be an array of floats, got {x.dtype}")
    bits = magnitude(x)
    two_words = x.size >= _ONE_WORD_LIMIT
    wanted = words(keep, two_words)
    top = _nan_magnitude(x.dtype)
    one = jnp.array(1, bits.dtype)

    # Invariant: at least `keep` magnitudes are >= found. Bits are decided from the top down.
    def decide(i: jax.Array, found: jax.Array) -> jax.Array:
        candidate = found | (one << (top.bit_length() - 1 - i).astype(bits.dtype))
        enough = _at_least(_count(bits >= candidate, two_words), wanted)
        return jnp.where(enough & (candidate <= top), candidate, found)

    start = varying_like(jnp.zeros((), bits.dtype), bits, wanted)
    found = lax.fori_loop(0, top.bit_length(), decide, start)
    value = lax.bitcast_convert_type(found, x.dtype)
    # One NaN has many patterns: any that is larger than infinity's means "NaN".
    return jnp.where(found > _nan_magnitude(x.dtype) - 1, jnp.array(jnp.nan, x.dtype), value)


def mask(x: jax.Array, threshold: jax.Array | float) -> jax.Array:
    """Booleans: which values of ``x`` have a magnitude of at least ``threshold``.

    Zeros are never kept, NaNs always. A threshold of another float type is compared exactly, in
    the wider of the two types.

    Example:
      >>> mask(jnp.array([3.0, -1.0, 0.0]), 0.0).tolist()
      [True, True, False]
    """
    limit = jnp.asarray(threshold)
    if not jnp.issubdtype(limit.dtype, jnp.floating):
        limit = limit.astype(x.dtype)
    wide = jnp.promote_types(x.dtype, limit.dtype)
    return (magnitude_in(x, wide) >= magnitude_in(limit, wide)) & (magnitude(x) != 0)


def sparsify(x: jax.Array, threshold: jax.Array | float) -> jax.Array:
    """``x`` where its magnitude is at least ``threshold``, 0 elsewhere (see `mask`)."""
    return jnp.where(mask(x, threshold), x, jnp.zeros((), x.dtype))


def scale_count(keep: Count, size: int, new_size: int) -> Count:
    """``ceil(keep * new_size / size)`` for a possibly traced ``keep``, without rounding.

    Turns a layer's weight budget into the budget of its activations at the same sparsity.

    Args:
      keep: count out of ``size``; a Python int or a 32-bit scalar.
      size: what ``keep`` counts out of, below 2**30.
      new_size: what the result counts out of.

    Returns:
      A Python int for a Python int; else uint32, a scalar below 2**31 values and two words from
      there on.

    Example:
      >>> scale_count(3, 10, 25)
      8
    """
    if isinstance(keep, int):
        return -(-keep * new_size // size)
    if size >= 2**30:
        raise UsageError(f"size must be below 2**30 for a traced count, got {size}")
    whole, rest = divmod(new_size, size)
    bits = keep.astype(jnp.uint32)
    quotient = _scaled_up(bits, rest, size)
    if new_size < _ONE_WORD_LIMIT:
        return bits * jnp.uint32(whole) + quotient
    high, low = wide_product(bits, whole)
    total = low + quotient
    return jnp.stack([high + (total < low), total])


# A float quotient is made so much smaller that its roundings, at most four of 2**-24, cannot make
# it too large.
_SLIGHTLY_LESS = 1 - 2**-21


def _scaled_up(value: jax.Array, factor: int, divisor: int) -> jax.Array:
    """``ceil(value * factor / divisor)`` for ``value <= divisor`` and ``factor < divisor < 2**30``.

    Without a loop, every turn of which would be launched on a GPU: a quotient of floats falls short
    by less than 1,000, that of what is left after it by at most one, and the rest is exact.
    """
    first = (value.astype(jnp.float32) * (factor / divisor * _SLIGHTLY_LESS)).astype(jnp.uint32)
    high, low = wide_product(value, factor)
    done_high, done_low = wide_product(first, divisor)
    high, low = high - done_high - (low < done_low), low - done_low
    left = high.astype(jnp.float32) * 2.0**32 + low.astype(jnp.float32)
    second = (left * (_SLIGHTLY_LESS / divisor)).astype(jnp.uint32)
    # Below twice the divisor, so one word holds it.
    rest = low - second * jnp.uint32(divisor)
    return first + second + (rest > 0) + (rest > divisor)


def _nan_magnitude(dtype: jnp.dtype) -> int:
    """The pattern one above infinity's, to which every NaN is mapped."""
    unsigned = np.dtype(f"uint{jnp.finfo(dtype).bits}")
    return int(np.array(jnp.inf, dtype).view(unsigned)) + 1


def words(count: Count, two_words: bool = True) -> tuple[jax.Array, ...]:
    """A count as uint32 words, the highest first; what is negative counts as 0."""
    if isinstance(count, int | np.integer):
        count = max(int(count), 0)
        if not two_words:
            return (jnp.uint32(min(count, 2**32 - 1)),)
        high, low = split_count(count)
        return (jnp.uint32(high), jnp.uint32(low))
    count = jnp.asarray(count)
    if count.shape == (2,):
        words = (count[0].astype(jnp.uint32), count[1].astype(jnp.uint32))
        # A high word means more than there is: the largest single word says the same.
        return words if two_words else (jnp.where(words[0] > 0, jnp.uint32(2**32 - 1), words[1]),)
    if count.shape != () or not jnp.issubdtype(count.dtype, jnp.integer):
        raise UsageError(
            "keep must be an int, an integer scalar or uint32[2] (high and low word), "
            f"got {count.dtype}{list(count.shape)}"
        )
    low = jnp.maximum(count, 0).astype(jnp.uint32)
    return (jnp.zeros_like(low), low) if two_words else (low,)


def _count(flags: jax.Array, two_words: bool) -> tuple[jax.Array, ...]:
    """How many flags are set, as uint32 words."""
    if not two_words:
        return (jnp.sum(flags, dtype=jnp.uint32),)
    # Sum the trailing axes that fit one word, then add the partial counts in 16-bit digits.
    split = flags.ndim
    while split > 0 and math.prod(flags.shape[split - 1 :]) < _ONE_WORD_LIMIT:
        split -= 1
    if split == flags.ndim or math.prod(flags.shape[:split]) >= 2**16:
        raise UsageError(
            f"x of shape {flags.shape} is too large: needs an axis split with at most 2**16 "
            f"leading values and fewer than {_ONE_WORD_LIMIT} trailing ones; reshape it"
        )
    parts = jnp.sum(flags, axis=tuple(range(split, flags.ndim)), dtype=jnp.uint32).ravel()
    low = jnp.sum(parts & 0xFFFF, dtype=jnp.uint32)
    high = jnp.sum(parts >> 16, dtype=jnp.uint32) + (low >> 16)
    return (high >> 16, (high << 16) | (low & 0xFFFF))


def _at_least(count: tuple[jax.Array, ...], wanted: tuple[jax.Array, ...]) -> jax.Array:
    if len(count) == 1:
        return count[0] >= wanted[0]
    return (count[0] > wanted[0]) | ((count[0] == wanted[0]) & (count[1] >= wanted[1]))


def wide_product(value: jax.Array, factor: int) -> tuple[jax.Array, jax.Array]:
    """The 64-bit product of a uint32 and a constant below 2**32, as (high, low)."""
    a_high, a_low = value >> 16, value & 0xFFFF
    b_high, b_low = jnp.uint32(factor >> 16), jnp.uint32(factor & 0xFFFF)
    low = a_low * b_low
    middle = a_high * b_low + (low >> 16)
    carry = a_low * b_high + (middle & 0xFFFF)
    return a_high * b_high + (middle >> 16) + (carry >> 16), (carry << 16) | (low & 0xFFFF)
