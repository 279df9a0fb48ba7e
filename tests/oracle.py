"""What SWAT should compute, written a second time in plain numpy float64.

Nothing here imports `swat_jax` or JAX. Masks are made by sorting, convolutions by loops over taps,
budgets by the words of the method, so that an error in the package cannot hide behind the same
error in its tests. Arrays keep the caller's dtype (bfloat16 through ml_dtypes) until a mask is
taken; sums are in float64.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

Padding = str | Sequence[tuple[int, int]]
_BITS = {2: np.uint16, 4: np.uint32, 8: np.uint64}


class Gradients(NamedTuple):
    """What a layer returns and what it sends back, all float64."""

    y: np.ndarray
    dx: np.ndarray
    dkernel: np.ndarray


# --- Selection ----------


def keep_count(sparsity: float, n: int) -> int:
    """`ceil((1 - s) * n)` for the decimal that is written, not for the nearest binary fraction."""
    return math.ceil((1 - Fraction(str(sparsity))) * n)


def widen(x: np.ndarray | np.generic | float) -> np.ndarray:
    """float64 of any float type; a signalling NaN is no reason to warn."""
    with np.errstate(invalid="ignore"):
        return np.asarray(x).astype(np.float64)


def magnitude_bits(x: np.ndarray) -> np.ndarray:
    """Bit patterns of `abs(x)`, whose integer order is 0 < subnormals < ... < Inf < NaN."""
    unsigned = _BITS[x.dtype.itemsize]
    sign = unsigned(1) << unsigned(8 * x.dtype.itemsize - 1)
    return np.ascontiguousarray(x).view(unsigned) & ~sign


def threshold(x: np.ndarray, keep: int) -> np.ndarray:
    """The `keep`-th largest magnitude (scalar of x's dtype); 0 when there are fewer values."""
    bits = magnitude_bits(x).reshape(-1)
    if keep > bits.size:
        return np.zeros((), x.dtype)
    return np.sort(bits)[::-1][keep - 1 : keep].view(x.dtype)[0]


def mask(x: np.ndarray, limit: np.ndarray | np.generic | float) -> np.ndarray:
    """True where the magnitude reaches `limit` and is not zero; ties and NaN are kept."""
    wide = np.abs(widen(x))
    level = float(widen(limit))
    if math.isnan(level):
        return np.isnan(wide)
    return np.isnan(wide) | ((wide >= level) & (wide > 0))


def top_mask(x: np.ndarray, keep: int) -> np.ndarray:
    """The mask of the `keep` largest magnitudes with ties, where NaNs take up places too."""
    bits = magnitude_bits(x)
    level = magnitude_bits(np.atleast_1d(threshold(x, keep)))[0]
    return ((bits >= level) & (bits > 0)) | np.isnan(widen(x))


# --- Granularity ----------


def unit_axes(ndim: int, granularity: str) -> tuple[int, ...]:
    """The axes that one unit of `granularity` spans, for a kernel of shape (taps..., in, out)."""
    return {
        "unstructured": (),
        "channel": tuple(range(ndim - 2)),
        "filter": tuple(range(ndim - 1)),
    }[granularity]


def vectors(kernel: np.ndarray, granularity: str) -> list[np.ndarray]:
    """The weights of all units of "vector..." of a kernel, as views."""
    length = int(granularity.removeprefix("vector"))
    rows = kernel.reshape(-1, kernel.shape[-1])
    return [row[i : i + length] for row in rows for i in range(0, len(row), length)]


def units(shape: Sequence[int], granularity: str) -> int:
    if granularity.startswith("vector"):
        return len(vectors(np.empty(shape), granularity))
    spanned = unit_axes(len(shape), granularity)
    return math.prod(size for axis, size in enumerate(shape) if axis not in spanned)


def weight_mask(
    kernel: np.ndarray,
    *,
    keep: int | None,
    granularity: str = "unstructured",
    limit: float | np.ndarray | None = None,
) -> np.ndarray:
    """Weights of the units whose L1 norm is among the `keep` largest, or reaches `limit`."""
    if granularity == "unstructured":
        if limit is not None:
            return mask(kernel, limit)
        assert keep is not None
        return top_mask(kernel, keep)
    if granularity.startswith("vector"):
        scores = [np.abs(widen(one)).sum() for one in vectors(kernel, granularity)]
        score = np.array(scores)
        kept = mask(score, limit) if limit is not None else top_mask(score, int(keep or 0))
        result = np.zeros(kernel.shape, bool)
        for one, flag in zip(vectors(result, granularity), kept, strict=True):
            one[...] = flag
        return result
    score = np.abs(widen(kernel)).sum(axis=unit_axes(kernel.ndim, granularity), keepdims=True)
    if limit is not None:
        kept = mask(score, limit)
    else:
        assert keep is not None
        kept = top_mask(score, keep)
    return np.broadcast_to(kept, kernel.shape)


def sparsify(x: np.ndarray, kept: np.ndarray) -> np.ndarray:
    return np.where(kept, widen(x), 0.0)


# --- Convolution ----------


def pads(
    size: Sequence[int],
    window: Sequence[int],
    strides: Sequence[int],
    padding: Padding,
    kernel_dilation: Sequence[int],
) -> list[tuple[int, int]]:
    """(low, high) padding per spatial axis."""
    if not isinstance(padding, str):
        return [(int(low), int(high)) for low, high in padding]
    if padding == "VALID":
        return [(0, 0)] * len(size)
    result = []
    for n, k, stride, dilation in zip(size, window, strides, kernel_dilation, strict=True):
        span = (k - 1) * dilation + 1
        total = max((math.ceil(n / stride) - 1) * stride + span - n, 0)
        small, large = total // 2, total - total // 2
        result.append({"SAME": (small, large), "SAME_LOWER": (large, small)}[padding])
    return result


class _Geometry(NamedTuple):
    """Where output o meets input i, by tap: i * input_dilation + low == o * stride + tap."""

    output: tuple[int, ...]
    pairs: dict[tuple[int, ...], tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]]


def _geometry(
    size: Sequence[int],
    window: Sequence[int],
    strides: Sequence[int],
    padding: Padding,
    input_dilation: Sequence[int],
    kernel_dilation: Sequence[int],
) -> _Geometry:
    edges = pads(size, window, strides, padding, kernel_dilation)
    output, per_axis = [], []
    for axis, n in enumerate(size):
        low, high = edges[axis]
        padded = (n - 1) * input_dilation[axis] + 1 + low + high
        span = (window[axis] - 1) * kernel_dilation[axis] + 1
        outputs = max((padded - span) // strides[axis] + 1, 0)
        output.append(outputs)
        taps = []
        for tap in range(window[axis]):
            reads, writes = [], []
            for o in range(outputs):
                place = o * strides[axis] + tap * kernel_dilation[axis] - low
                if place % input_dilation[axis] == 0 and 0 <= place // input_dilation[axis] < n:
                    reads.append(place // input_dilation[axis])
                    writes.append(o)
            taps.append((np.array(reads, int), np.array(writes, int)))
        per_axis.append(taps)
    pairs = {}
    for tap in itertools.product(*(range(k) for k in window)):
        chosen = [per_axis[axis][t] for axis, t in enumerate(tap)]
        pairs[tap] = (tuple(c[0] for c in chosen), tuple(c[1] for c in chosen))
    return _Geometry(tuple(output), pairs)


def _place(
    axes: tuple[np.ndarray, ...], batch: int, channels: slice, total: int
) -> tuple[np.ndarray, ...]:
    return np.ix_(np.arange(batch), *axes, np.arange(total)[channels])


def conv(
    x: np.ndarray,
    kernel: np.ndarray,
    *,
    strides: Sequence[int],
    padding: Padding = "SAME",
    input_dilation: Sequence[int] | None = None,
    kernel_dilation: Sequence[int] | None = None,
    groups: int = 1,
) -> np.ndarray:
    """Dense correlation: x (batch, space..., in), kernel (taps..., in / groups, out)."""
    x, kernel = x.astype(np.float64), kernel.astype(np.float64)
    rank = x.ndim - 2
    ones = (1,) * rank
    geometry = _geometry(
        x.shape[1:-1],
        kernel.shape[:rank],
        strides,
        padding,
        input_dilation or ones,
        kernel_dilation or ones,
    )
    y = np.zeros((x.shape[0], *geometry.output, kernel.shape[-1]))
    for tap, group, ins, outs in _taps(geometry, x, kernel, groups):
        reads, writes = geometry.pairs[tap]
        source = x[_place(reads, len(x), ins, x.shape[-1])]
        y[_place(writes, len(x), outs, y.shape[-1])] += source @ kernel[tap][:, outs]
        del group
    return y


def _taps(geometry: _Geometry, x: np.ndarray, kernel: np.ndarray, groups: int):
    """Every (tap, group) with the slices of input and output channels that it joins."""
    ins, outs = x.shape[-1] // groups, kernel.shape[-1] // groups
    for tap in geometry.pairs:
        for group in range(groups):
            yield (
                tap,
                group,
                slice(group * ins, (group + 1) * ins),
                slice(group * outs, (group + 1) * outs),
            )


def conv_gradients(
    x_forward: np.ndarray,
    x_saved: np.ndarray,
    kernel: np.ndarray,
    dy: np.ndarray,
    *,
    strides: Sequence[int],
    padding: Padding = "SAME",
    input_dilation: Sequence[int] | None = None,
    kernel_dilation: Sequence[int] | None = None,
    groups: int = 1,
) -> Gradients:
    """Output for `x_forward`; input gradient through `kernel`; kernel gradient from `x_saved`."""
    rank = x_forward.ndim - 2
    ones = (1,) * rank
    options: dict[str, Any] = {
        "strides": strides,
        "padding": padding,
        "input_dilation": input_dilation or ones,
        "kernel_dilation": kernel_dilation or ones,
    }
    saved, kernel, dy = (a.astype(np.float64) for a in (x_saved, kernel, dy))
    geometry = _geometry(x_forward.shape[1:-1], kernel.shape[:rank], **options)
    dx, dkernel = np.zeros(x_forward.shape), np.zeros(kernel.shape)
    batch, inner = len(saved), saved.shape[-1]
    for tap, _, ins, outs in _taps(geometry, saved, kernel, groups):
        reads, writes = geometry.pairs[tap]
        flow = dy[_place(writes, batch, outs, dy.shape[-1])]
        dx[_place(reads, batch, ins, inner)] += flow @ kernel[tap][:, outs].T
        source = saved[_place(reads, batch, ins, inner)]
        dkernel[tap][:, outs] += np.tensordot(source, flow, axes=(range(rank + 1), range(rank + 1)))
    return Gradients(conv(x_forward, kernel, groups=groups, **options), dx, dkernel)


def swat_conv(
    x: np.ndarray,
    kernel: np.ndarray,
    dy: np.ndarray,
    *,
    weight_keep: int | None = None,
    activation_keep: int | None = None,
    weight_threshold: float | np.ndarray | None = None,
    activation_threshold: float | np.ndarray | None = None,
    granularity: str = "unstructured",
    **geometry: Any,
) -> Gradients:
    """SWAT's rules: dense input forward, masked weights both ways, sparse input for dkernel."""
    kept = weight_mask(kernel, keep=weight_keep, granularity=granularity, limit=weight_threshold)
    return conv_gradients(
        x, _saved(x, activation_keep, activation_threshold), sparsify(kernel, kept), dy, **geometry
    )


def swat_linear(
    x: np.ndarray,
    kernel: np.ndarray,
    dy: np.ndarray,
    *,
    weight_keep: int | None = None,
    activation_keep: int | None = None,
    weight_threshold: float | np.ndarray | None = None,
    activation_threshold: float | np.ndarray | None = None,
) -> Gradients:
    """The same for a matrix: x (..., in), kernel (in, out), dy (..., out)."""
    used = sparsify(kernel, weight_mask(kernel, keep=weight_keep, limit=weight_threshold))
    saved = _saved(x, activation_keep, activation_threshold).reshape(-1, x.shape[-1])
    dy = dy.astype(np.float64)
    return Gradients(
        y=x.astype(np.float64) @ used,
        dx=dy @ used.T,
        dkernel=saved.T @ dy.reshape(-1, dy.shape[-1]),
    )


def _saved(x: np.ndarray, keep: int | None, limit: float | np.ndarray | None) -> np.ndarray:
    if limit is not None:
        return sparsify(x, mask(x, limit))
    assert keep is not None
    return sparsify(x, top_mask(x, keep))


# --- Distribution ----------


def erdos_renyi_kernel(shapes: Mapping[str, Sequence[int]], sparsity: float) -> dict[str, float]:
    """Densities `min(1, eps * sum(shape) / prod(shape))`; eps by bisection on their total."""
    target = (1 - sparsity) * sum(math.prod(shape) for shape in shapes.values())

    def densities(eps: float) -> dict[str, float]:
        return {name: min(1.0, eps * sum(s) / math.prod(s)) for name, s in shapes.items()}

    low, high = 0.0, max(math.prod(s) / sum(s) for s in shapes.values())
    for _ in range(200):
        middle = (low + high) / 2
        total = sum(d * math.prod(shapes[name]) for name, d in densities(middle).items())
        low, high = (middle, high) if total < target else (low, middle)
    return {name: 1 - density for name, density in densities(high).items()}


def momentum_budgets(
    mean_momentum: Sequence[float], sizes: Sequence[int], total: int
) -> np.ndarray:
    """Real-valued keep counts of SWAT-M, float64.

    Shares in proportion to the mean momentum; a layer above 99 % of its size is dense; the surplus
    is spread evenly (the same number of weights each) over the others, which may make another one
    dense.
    """
    momentum, size = np.asarray(mean_momentum, np.float64), np.asarray(sizes, np.float64)
    keep = total * momentum / momentum.sum()
    dense = np.zeros(len(size), bool)
    while True:
        dense |= keep > 0.99 * size
        keep = np.where(dense, size, keep)
        surplus = total - keep.sum()
        if dense.all() or abs(surplus) < 1e-9 * total:
            return keep
        keep = np.where(dense, size, keep + surplus / (~dense).sum())


def dropout_flags(key: np.ndarray, size: int, dropped: int) -> np.ndarray:
    """Which values dropout keeps, in Python's integers: 16 bits of Philox4x32-10 for each."""
    flags = []
    for index in range(-(-size // 8)):
        a, b, c, d, one, two = index & 0xFFFFFFFF, index >> 32, 0, 0, int(key[0]), int(key[1])
        for _ in range(10):
            low, high = 0xD2511F53 * a, 0xCD9E8D57 * c
            a, b = (high >> 32) ^ b ^ one, high & 0xFFFFFFFF
            c, d = (low >> 32) ^ d ^ two, low & 0xFFFFFFFF
            one, two = (one + 0x9E3779B9) & 0xFFFFFFFF, (two + 0xBB67AE85) & 0xFFFFFFFF
        for word in (a, b, c, d):
            flags += [word & 0xFFFF >= dropped, word >> 16 >= dropped]
    return np.array(flags[:size])
