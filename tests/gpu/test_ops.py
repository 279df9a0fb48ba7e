"""Every kernel of `ops/` against numpy, written from the rules, and against its jnp twin."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from swat_jax import batch_norm, dropout_bits, kernels
from swat_jax.kernels.selection import COUNTS_OF_ONE, selection_words
from swat_jax.max_pool import Pool
from swat_jax.sparsity import packing, top_k
from tests import oracle
from tests.runs import needs_library

DTYPES = [jnp.bfloat16, jnp.float16, jnp.float32]
# Around an octet, a bitmap word, a tile and a span, and large enough for many blocks.
SIZES = [1, 7, 8, 33, 2047, 2048, 2049, 8_192, 8_193, 100_001, 3_000_001]

pytestmark = needs_library


@pytest.fixture(autouse=True)
def kernels_are_in_use():
    assert kernels.backend() == "cuda"


def draw(size, dtype, kind="normal", seed=0):
    rng = np.random.default_rng([size, seed])
    values = rng.normal(size=size)
    if kind == "relu":
        values = np.maximum(values, 0)
    elif kind == "ties":
        values = np.round(values * 2) / 2
    elif kind == "constant":
        values = np.full(size, -1.5)
    elif kind == "zeros":
        values = np.zeros(size)
    elif kind == "sorted":  # what a sample of a part would misjudge
        values = np.sort(values)
    elif kind == "special":
        odd = [np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, 6e-8, 1e38]
        chosen = rng.integers(0, 40, size)
        for i, value in enumerate(odd):
            values[chosen == i] = value
    with np.errstate(over="ignore"):
        return values.astype(dtype)


def kinds_for(size):
    """Large inputs are slow to check in numpy: there the values that ops meet in training."""
    if size > 10**6:
        return ["relu", "ties", "sorted"]
    return ["normal", "relu", "ties", "constant", "zeros", "special", "sorted"]


def same(found, expected, message=""):
    """Equal as float64: numpy takes two NaNs of a foreign type for different."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.dtype == expected.dtype, message
    if found.dtype.kind not in "iub":
        found, expected = found.astype(np.float64), expected.astype(np.float64)
    np.testing.assert_array_equal(found, expected, err_msg=message)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_threshold_is_the_kth_largest(dtype, size):
    traced = jax.jit(kernels.threshold)
    for kind in kinds_for(size):
        x = draw(size, dtype, kind)
        for keep in {1, max(1, size // 10), (size + 1) // 2, size, size + 5}:
            found = np.asarray(traced(x, jnp.uint32(keep)))
            same(found, oracle.threshold(x, keep), f"{kind}, {keep}")
        assert np.isnan(traced(x, jnp.uint32(0)))


def test_a_sample_that_misleads_changes_nothing():
    # The sample looks at one octet in many, and finds what is nowhere else: of every thread's place
    # in a tile those of four tiles.
    size = 2**22
    x = np.random.default_rng(0).normal(size=size).astype(jnp.bfloat16)
    tiles, threads = size // packing.TILE, packing.TILE // 8
    places = np.arange(4 * threads)
    sampled = places * tiles // (4 * threads) * threads + places % threads
    for value in (0.0, 1e30):
        x.reshape(-1, 8)[sampled] = value
        for keep in (10, size // 10, size - sampled.size * 8 + 1):
            same(kernels.threshold(jnp.asarray(x), keep), oracle.threshold(x, keep))


def test_threshold_of_nothing_is_zero():
    assert float(kernels.threshold(jnp.zeros((0,), jnp.bfloat16), 1)) == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_refreshed_threshold_computes_only_at_a_refresh(dtype):
    x = jnp.asarray(draw(5000, dtype))
    step = jax.jit(lambda due, stored: kernels.refreshed_threshold(due, x, 500, stored))
    stored = jnp.float32(1.25)
    assert float(step(False, stored)) == 1.25
    assert float(step(True, stored)) == float(oracle.threshold(np.asarray(x), 500))


def many(xs, keeps, due, stored):
    """The thresholds of many tensors by the kernel."""
    run = jax.jit(lambda *a: kernels.refreshed_thresholds(*a))
    flags = [jnp.asarray(flag) for flag in due]
    return run(flags, [jnp.asarray(x) for x in xs], keeps, [jnp.float32(one) for one in stored])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "kind", ["normal", "relu", "ties", "constant", "zeros", "special", "sorted"]
)
def test_thresholds_of_many_tensors(dtype, kind):
    sizes = [0, *SIZES[:-1], 64, 9 * 64 * 64, 500_000, 1, 3]
    xs = [draw(size, dtype, kind, seed) for seed, size in enumerate(sizes)]
    for share in (0.0, 0.1, 1.0, 1.5):
        keeps = [jnp.uint32(math.ceil(share * size)) for size in sizes]
        for due in ([True] * len(sizes), [i % 3 > 0 for i in range(len(sizes))]):
            found = many(xs, keeps, due, range(len(sizes)))
            for i, x in enumerate(xs):
                # Nothing is to be kept: no number is large enough.
                exact = oracle.threshold(x, int(keeps[i])) if keeps[i] else np.nan
                same(found[i], np.float32(exact if due[i] else i), f"{share}, {x.size}")


def test_thresholds_of_more_tensors_than_a_launch_takes():
    xs = [draw(100 + 37 * i, np.float32, "normal", i) for i in range(203)]
    keeps = [jnp.uint32(i // 2 + 1) for i in range(203)]
    found = many(xs, keeps, [i != 100 for i in range(203)], [7] * 203)
    for i, x in enumerate(xs):
        same(found[i], np.float32(7 if i == 100 else oracle.threshold(x, int(keeps[i]))))
    # Nothing is due: nothing is read.
    same(np.stack(many(xs, keeps, [False] * 203, [7] * 203)), np.full(203, 7, np.float32))


def test_thresholds_of_many_tensors_under_vmap_and_again_and_again():
    xs = [np.stack([draw(size, np.float32, "relu", i) for i in range(3)]) for size in (99, 50_001)]
    keeps = [jnp.array([1, 10, 50], jnp.uint32), jnp.array([1000, 9, 40_000], jnp.uint32)]
    due = [jnp.array([True, False, True])] * 2
    run = jax.jit(jax.vmap(lambda *a: kernels.refreshed_thresholds(*a)))
    first = run(due, [*map(jnp.asarray, xs)], keeps, [jnp.full(3, 2.0, jnp.float32)] * 2)
    for x, keep, limits in zip(xs, keeps, first, strict=True):
        expected = [oracle.threshold(x[i], int(keep[i])) for i in range(3)]
        same(limits, np.array([expected[0], 2, expected[2]], np.float32))
    for _ in range(20):
        again = run(due, [*map(jnp.asarray, xs)], keeps, [jnp.full(3, 2.0, jnp.float32)] * 2)
        jax.tree.map(same, again, first)


def test_thresholds_of_a_large_tensor_among_small_ones():
    xs = [draw(size, np.float32, "normal", size) for size in (64, 30_000_001, 2048)]
    keeps = [jnp.uint32(size) for size in (7, 3_000_000, 2048)]
    found = many(xs, keeps, [True] * 3, [0] * 3)
    for x, keep, limit in zip(xs, keeps, found, strict=True):
        same(limit, np.float32(np.partition(np.abs(x), -int(keep))[-int(keep)]))


def packed_by_numpy(x, limit, capacity):
    """The packed form from the rules: values, mask, dropped."""
    with np.errstate(invalid="ignore"):
        wanted = oracle.mask(x, limit)
    mask = wanted
    if wanted.sum() > capacity:
        limit = oracle.threshold(x, capacity)
        mask = oracle.mask(x, limit)
        ties = mask & (oracle.magnitude_bits(x) == oracle.magnitude_bits(limit))
        if np.isnan(limit):
            ties = mask & np.isnan(x.astype(np.float32))
        room = capacity - (mask & ~ties).sum()
        mask = (mask & ~ties) | (ties & (np.cumsum(ties) <= room))
    values = np.zeros(capacity, x.dtype)
    values[: mask.sum()] = x[mask]
    return values, mask, wanted.sum() - mask.sum()


def check_packed(packed, x, limit, capacity, message):
    values, mask, dropped = packed_by_numpy(x, limit, capacity)
    same(packed.values, values, message)
    words = np.zeros(packing.bitmap_words(x.size) * 32, bool)
    words[: x.size] = mask
    bitmap = np.packbits(words, bitorder="little").view(np.uint32)
    np.testing.assert_array_equal(packed.bitmap, bitmap, err_msg=message)
    starts = np.arange(0, x.size, packing.TILE)
    before = np.concatenate([[0], np.cumsum(mask)])[starts]
    np.testing.assert_array_equal(packed.offsets, before, err_msg=message)
    assert int(packed.overflow) == dropped, message


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_pack_and_unpack(dtype, size):
    capacity = max(1, size // 8)
    pack = jax.jit(lambda x, t: kernels.pack(x, t, capacity))
    unpack = jax.jit(kernels.unpack)
    for kind in kinds_for(size):
        x = draw(size, dtype, kind, seed=1)
        # Fewer than there is room for, a few more, far more, everything.
        for keep in {max(1, size // 10), max(1, size // 7), size // 2 + 1, size}:
            limit = np.float32(oracle.threshold(x, keep))
            packed = pack(x, limit)
            check_packed(packed, x, limit, capacity, f"{kind}, {keep}")
            mask = packed_by_numpy(x, limit, capacity)[1]
            same(unpack(packed), np.where(mask, x, x.dtype.type(0)))
            least = np.float32(1.0)
            both = mask & oracle.mask(x, least)
            same(unpack(packed, least), np.where(both, x, x.dtype.type(0)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_batch_of_problems_under_vmap(dtype):
    x = jnp.stack([jnp.asarray(draw(4099, dtype, "relu", seed)) for seed in range(5)])
    keep = jnp.array([1, 10, 100, 1000, 4000], jnp.uint32)
    limits = jax.jit(jax.vmap(kernels.threshold))(x, keep)
    packed = jax.jit(jax.vmap(lambda x, t: kernels.pack(x, t, 500)))(x, limits)
    dense = jax.jit(jax.vmap(kernels.unpack))(packed)
    for i in range(5):
        assert limits[i] == kernels.threshold(x[i], int(keep[i]))
        one = kernels.pack(x[i], limits[i], 500)
        many = jax.tree.map(lambda leaf, i=i: leaf[i], packed)
        jax.tree.map(same, one, many)
        same(dense[i], kernels.unpack(one))


SHAPES = [
    (1, 1), (3, 5), (1, 8), (200, 3), (1000, 64), (333, 96), (129, 2048), (40, 4096), (77, 1000),
    (5000, 256), (2, 10_000), (70_001, 16),
]  # fmt: skip
# Relative to the largest term that is added up: a few roundings of float32, one of the result.
BOUNDS = {jnp.float32: 1e-6, jnp.bfloat16: 8e-3, jnp.float16: 1.5e-3}


def close(found, expected, dtype, terms):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    scale = max(float(np.abs(expected).max(initial=0)), *(float(jnp.abs(t).max()) for t in terms))
    np.testing.assert_allclose(found / scale, expected / scale, atol=BOUNDS[dtype], rtol=0)


def norm_inputs(shape, dtype, seed=0):
    rng = np.random.default_rng([*shape, seed])
    channels = shape[1]
    x = rng.normal(size=shape) * rng.uniform(0.5, 2, channels) + 3 * rng.normal(size=channels)
    return {
        "x": jnp.asarray(x, dtype),
        "residual": jnp.asarray(rng.normal(size=shape), dtype),
        "dy": jnp.asarray(rng.normal(size=shape), dtype),
        "dy2": jnp.asarray(rng.normal(size=shape), dtype),
        "scale": jnp.asarray(rng.normal(size=channels), jnp.float32),
        "bias": jnp.asarray(rng.normal(size=channels), jnp.float32),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_batch_norm_statistics(shape, dtype):
    x = norm_inputs(shape, dtype)["x"]
    mean, variance = jax.jit(kernels.batch_norm_statistics)(x)
    wide = np.asarray(x, np.float64)
    np.testing.assert_allclose(mean, wide.mean(0), rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(variance, wide.var(0), rtol=2e-5, atol=1e-6)


def test_statistics_of_a_small_spread_around_a_large_mean():
    x = 1000 + np.random.default_rng(0).normal(size=(100_000, 8)).astype(np.float32)
    x[0] = 2000  # an outlier where a careless shift would be taken from
    mean, variance = jax.jit(kernels.batch_norm_statistics)(x)
    np.testing.assert_allclose(mean, x.astype(np.float64).mean(0), rtol=1e-6)
    np.testing.assert_allclose(variance, x.astype(np.float64).var(0), rtol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("adds", [True, False])
def test_batch_norm_passes(shape, dtype, relu, adds):
    given = norm_inputs(shape, dtype)
    x, residual = given["x"], given["residual"] if adds else None
    mean, variance = batch_norm.statistics(x)
    vectors = batch_norm.Vectors(mean, variance, given["scale"], given["bias"])
    options = {"epsilon": 1e-5, "relu": relu}
    forward = functools.partial(kernels.batch_norm_relu, **options, keeps_signs=True)
    found = jax.jit(forward)(x, vectors, residual)
    expected = batch_norm.normalize(x, vectors, residual, **options)
    factor = given["scale"] / jnp.sqrt(variance + 1e-5)
    close(found.y, expected, dtype, [mean * factor])
    np.testing.assert_array_equal(found.positive, batch_norm.positive(found.y))
    positive = found.positive if adds and relu else None
    rows = shape[0]
    # The sign of y is that of the kernel's own y: rounding may differ where y is almost 0.
    signs = found.positive if relu else None
    for dys in ([given["dy"]], [given["dy"], given["dy2"]]):
        merges = adds or len(dys) > 1
        total, moment, dz = jax.jit(
            functools.partial(kernels.batch_norm_gradient_sums, **options, keeps_dz=merges)
        )(x, dys, positive, vectors)
        wide = [dy.astype(jnp.float32) for dy in dys]
        if merges:
            exact_dz = batch_norm.gradient_sums(x, dys, signs, vectors, **options, keeps_dz=True)[2]
            same(dz, exact_dz)
            wide, passes = [dz.astype(jnp.float32)], {"epsilon": 1e-5, "relu": False}
        else:
            assert dz is None
            passes = options
        exact = batch_norm.gradient_sums(
            x.astype(jnp.float32), wide, None if merges else signs, vectors, **passes
        )[:2]
        for found_sum, reference in zip((total, moment), exact, strict=True):
            np.testing.assert_allclose(
                found_sum, reference, atol=2e-5 * math.sqrt(rows) + 1e-5, rtol=2e-5
            )
        dy = dz if merges else dys[0]
        for through in (None, given["dy2"]):
            dx = jax.jit(functools.partial(kernels.batch_norm_gradient, **passes, count=rows))(
                x, dy, vectors, exact, through
            )
            masked = (
                dy
                if merges
                else batch_norm.gradient_sums(x, dys, signs, vectors, **options, keeps_dz=True)[2]
            )
            twin_dx = batch_norm.gradient(
                x, masked, vectors, exact, through, epsilon=1e-5, relu=False, count=rows
            )
            slope = factor * exact[1] / rows / jnp.sqrt(variance + 1e-5)
            terms = [slope * mean, factor * exact[0] / rows, factor * dys[0].astype(jnp.float32)]
            close(dx, twin_dx, dtype, terms)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(3, 5), (1000, 64), (333, 96), (5000, 256), (70_001, 16), (9000, 192)]
)
@pytest.mark.parametrize("readers", [1, 2])
def test_selection_within_batch_norm(shape, dtype, readers):
    given = norm_inputs(shape, dtype)
    x = given["x"]
    mean, variance = batch_norm.statistics(x)
    vectors = batch_norm.Vectors(mean, variance, given["scale"], given["bias"])
    size = math.prod(shape)
    keeps = [max(1, size // 10), max(1, size // 5)][:readers]
    capacity = packing.capacity(max(keeps), size)

    @functools.partial(jax.jit, static_argnames="flagged")
    def run(refresh, stored, flagged, keeps=tuple(keeps)):
        words = jnp.array([[0, keep] for keep in keeps], jnp.uint32)
        state = {"is_refresh": refresh, "stored": stored} if flagged else {}
        selection = kernels.Selection(words, capacity, **state)
        return kernels.batch_norm_relu(x, vectors, epsilon=1e-5, relu=True, selection=selection)

    y = np.asarray(run(True, jnp.zeros(readers), False).y).ravel()
    exact = np.array([oracle.threshold(y, keep) for keep in keeps]).astype(np.float32)

    def kept(limit):
        return np.sum((np.abs(y.astype(np.float32)) >= limit) & (y != 0))

    stale = exact * np.float32(1.1)
    loose = exact * np.float32(0.3)
    for refresh, stored, flagged, limits in [
        (True, loose, False, exact),
        (True, loose, True, exact),
        (False, stale, True, stale),
        # What would keep more than fits is refreshed early.
        (False, loose, True, loose if kept(loose.min()) <= capacity else exact),
        (False, np.zeros_like(exact), True, exact if kept(0) > capacity else exact * 0),
    ]:
        found = run(refresh, jnp.asarray(stored), flagged)
        same(np.asarray(found.y).ravel(), y)
        same(found.thresholds, limits)
        check_packed(found.packed, y, limits.min(), capacity, str((refresh, flagged)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", ["unpacked", "exact", "given", "given, too low", "two readers"])
def test_dropout_within_batch_norm(shape, dtype, mode):
    given = norm_inputs(shape, dtype)
    x, size = given["x"], math.prod(shape)
    mean, variance = batch_norm.statistics(x)
    vectors = batch_norm.Vectors(mean, variance, given["scale"], given["bias"])
    flags = np.random.default_rng(size).random(shape) < 0.7
    kept = packing.to_bitmap(jnp.asarray(flags))
    options = {"epsilon": 1e-5, "relu": True, "kept": kept, "kept_factor": 1 / 0.7}
    keeps = [max(1, size // 10), max(1, size // 20)][: 1 + (mode == "two readers")]
    capacity = packing.capacity(keeps[0], size)
    expected = batch_norm.normalize(x, vectors, **options)
    stored = np.array([oracle.threshold(np.asarray(expected).ravel(), keeps[0])], np.float32)
    stored *= np.float32(0.3 if "too low" in mode else 1)

    @jax.jit
    def run(x):
        state = {"is_refresh": jnp.zeros((), bool), "stored": stored} if "given" in mode else {}
        words = jnp.array([[0, keep] for keep in keeps], jnp.uint32)
        selection = kernels.Selection(words, capacity, **state)
        selection = None if mode == "unpacked" else selection
        return kernels.batch_norm_relu(x, vectors, **options, keeps_signs=True, selection=selection)

    found = run(x)
    factor = given["scale"] / jnp.sqrt(variance + 1e-5)
    close(found.y, expected, dtype, [mean * factor / 0.7])
    assert not np.any(np.asarray(found.y)[~flags])
    np.testing.assert_array_equal(found.positive, batch_norm.positive(found.y))
    if mode != "unpacked":
        y = np.asarray(found.y).ravel()
        exact = np.array([oracle.threshold(y, keep) for keep in keeps], np.float32)
        kept_by_stored = np.sum((np.abs(y.astype(np.float32)) >= stored[0]) & (y != 0))
        given_is_used = "given" in mode and kept_by_stored <= capacity
        same(found.thresholds, stored if given_is_used else exact)
        check_packed(found.packed, y, np.asarray(found.thresholds).min(), capacity, mode)
    sums = {"epsilon": 1e-5, "relu": True, "keeps_dz": True, "factor": 1 / 0.7}
    total, moment, dz = jax.jit(functools.partial(kernels.batch_norm_gradient_sums, **sums))(
        x, [given["dy"]], found.positive, vectors
    )
    twin = batch_norm.gradient_sums(x, [given["dy"]], found.positive, vectors, **sums)
    same(dz, twin[2])
    for sum_found, reference in zip((total, moment), twin[:2], strict=True):
        np.testing.assert_allclose(
            sum_found, reference, atol=2e-5 * math.sqrt(shape[0]) + 1e-5, rtol=2e-5
        )


def values_for_guesses(kind, dtype):
    """(rows, 64) values, so many that the kernel guesses thresholds from a sample."""
    rng = np.random.default_rng(7)
    x = rng.normal(size=(140_003, 64)).astype(np.float32)
    if kind == "sorted":
        x.sort(axis=0)
    elif kind == "uneven channels":
        x *= np.exp(2 * rng.normal(size=64)).astype(np.float32)
    elif kind == "few positives":
        x -= 2.0
    elif kind == "constant":
        x = np.full_like(x, 0.75)
    elif kind == "zeros":
        x = np.full_like(x, -0.75)
    elif kind == "special":
        x.ravel()[rng.integers(0, x.size, 1000)] = np.nan
        x.ravel()[rng.integers(0, x.size, 1000)] = np.inf
    return jnp.asarray(x).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("readers", [1, 2])
@pytest.mark.parametrize(
    "kind",
    ["normal", "sorted", "uneven channels", "few positives", "constant", "zeros", "special"],
)
def test_exact_thresholds_by_a_guess(kind, dtype, readers):
    x = values_for_guesses(kind, dtype)
    ones, zeros = jnp.ones(64), jnp.zeros(64)
    keeps = [x.size // 10, x.size // 20][:readers]
    capacity = packing.capacity(keeps[0], x.size)

    @jax.jit
    def run(x):
        words = jnp.array([[0, keep] for keep in keeps], jnp.uint32)
        found = kernels.batch_norm_relu(
            x,
            batch_norm.Vectors(zeros, ones, ones, zeros),
            epsilon=0.0,
            relu=True,
            selection=kernels.Selection(words, capacity),
        )
        return found, [kernels.unpack(found.packed, limit) for limit in found.thresholds]

    found, unpacked = run(x)
    same(found.y, np.asarray(jnp.maximum(x, 0)))
    y = np.asarray(found.y).ravel()
    limits = np.array([oracle.threshold(y, keep) for keep in keeps]).astype(np.float32)
    same(found.thresholds, limits)
    # What was packed is what reaches some limit, which is the threshold or a little below.
    words = np.asarray(found.packed.bitmap).view(np.uint8)
    mask = np.unpackbits(words, bitorder="little")[: y.size].astype(bool)
    least = limits.min()
    if mask.any():
        least = min(least, np.nanmin(y[mask].astype(np.float32)))
    if kind in ("normal", "sorted", "uneven channels", "special"):
        assert mask.sum() > oracle.mask(y, limits.min()).sum(), "there was no guess"
    check_packed(found.packed, y, least, capacity, kind)
    for reader, limit in enumerate(limits):
        _, mask, _ = packed_by_numpy(y, limit, capacity)
        same(np.asarray(unpacked[reader]).ravel(), np.where(mask, y, np.zeros_like(y)))
    again, _ = run(x)
    jax.tree.map(lambda a, b: same(a, np.asarray(b)), found, again)


def test_more_kept_than_there_is_room_for():
    x = jnp.asarray(draw(64 * 1000, jnp.bfloat16)).reshape(1000, 64)
    ones, zeros = jnp.ones(64), jnp.zeros(64)
    for dtype in DTYPES:
        selection = kernels.Selection(jnp.array([[0, 5000]], jnp.uint32), 1000)
        found = jax.jit(
            lambda x, selection=selection: kernels.batch_norm_relu(
                x,
                batch_norm.Vectors(zeros, ones, ones, zeros),
                epsilon=0.0,
                relu=True,
                selection=selection,
            )
        )(x.astype(dtype))
        y = np.asarray(found.y).ravel()
        limit = np.float32(oracle.threshold(y, 1000))
        same(found.thresholds, np.array([limit]))
        check_packed(found.packed, y, limit, 1000, str(dtype))


@pytest.mark.parametrize("drops", [True, False])
def test_vmapped_batch_norm(drops):
    x = jnp.stack([norm_inputs((333, 24), jnp.bfloat16, seed)["x"] for seed in range(3)])
    flags = jnp.asarray(np.random.default_rng(0).random(x.shape) < 0.7)
    scale, bias = jnp.ones(24), jnp.zeros(24)

    def both(x, flags):
        mean, variance = kernels.batch_norm_statistics(x)
        vectors = batch_norm.Vectors(mean, variance, scale, bias)
        selection = kernels.Selection(jnp.array([[0, 700]], jnp.uint32), 800)
        dropout = {"kept": packing.to_bitmap(flags), "kept_factor": 1 / 0.7} if drops else {}
        options = {"epsilon": 1e-5, "relu": True}
        result = kernels.batch_norm_relu(
            x, vectors, **options, **dropout, keeps_signs=drops, selection=selection
        )
        sums = kernels.batch_norm_gradient_sums(
            x, [result.y], result.positive, vectors, **options, keeps_dz=drops,
            factor=1 / 0.7 if drops else 1.0,
        )  # fmt: skip
        return mean, variance, result, sums

    many = jax.jit(jax.vmap(both))(x, flags)
    for i in range(3):
        one = jax.jit(both)(x[i], flags[i])
        jax.tree.map(lambda a, b, i=i: same(a, np.asarray(b)[i]), one, many)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [5, 24])
@pytest.mark.parametrize(
    ("window", "strides", "padding"),
    [((3, 3), (2, 2), ((1, 1), (1, 1))), ((2, 2), (2, 2), ((0, 0), (0, 0))),
     ((3, 2), (1, 3), ((2, 0), (0, 1)))],
)  # fmt: skip
def test_max_pool_gradient(dtype, channels, window, strides, padding):
    pool = Pool(window, strides, padding, (2, 11, 14, channels))
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(-2, 3, pool.shape), dtype)
    winner = np.asarray(pool.winner(x))
    # Small whole numbers: sums are exact.
    dy = rng.integers(-3, 4, winner.shape).astype(np.float64)
    padded = np.zeros((2, 11 + sum(padding[0]), 14 + sum(padding[1]), channels))
    for index in np.ndindex(*winner.shape):
        n, row, column, channel = index
        down, right = divmod(int(winner[index]), window[1])
        padded[n, row * strides[0] + down, column * strides[1] + right, channel] += dy[index]
    (top, _), (left, _) = padding
    expected = padded[:, top : top + 11, left : left + 14].astype(dtype)
    gradient = functools.partial(kernels.max_pool_gradient, pool)
    same(jax.jit(gradient)(winner, jnp.asarray(dy, dtype)), expected)
    many = jax.jit(jax.vmap(gradient))(jnp.stack([winner] * 3), jnp.stack([dy] * 3).astype(dtype))
    same(many, np.stack([expected] * 3))


@pytest.mark.parametrize("size", [1, 31, 32, 33, 2049, 100_001])
def test_what_dropout_keeps(size):
    key = jax.random.key(size)
    words = np.asarray(jax.random.bits(key, (2,), jnp.uint32))
    for rate in (0.0, 0.3, 2**-16, 0.9999):
        found = jax.jit(lambda key, r=rate: kernels.draw_kept(key, r, size))(key)
        flags = oracle.dropout_flags(words, size, round(rate * 2**16))
        same(found, packing.to_bitmap(jnp.asarray(flags)), f"{rate}")
    keys = jax.random.split(key, 3)
    draw = functools.partial(kernels.draw_kept, rate=0.3, size=size)
    many = jax.jit(jax.vmap(draw))(keys)
    for one, key in zip(many, keys, strict=True):
        same(one, jax.jit(draw)(key))


def test_what_dropout_keeps_of_many_values_is_its_definition():
    size = 50_000_003
    with_kernel = jax.jit(lambda key: kernels.draw_kept(key, 0.3, size))
    key = jax.random.key(7)
    words = jax.random.bits(key, (2,), jnp.uint32)
    twin = jax.jit(lambda words: dropout_bits.draw(words, size, round(0.3 * 2**16)))
    same(with_kernel(key), twin(words))


def test_twenty_runs_have_the_same_bits():
    shape = (30_000, 128)
    given = norm_inputs(shape, jnp.bfloat16)

    @jax.jit
    def run(x, dy):
        mean, variance = kernels.batch_norm_statistics(x)
        vectors = batch_norm.Vectors(mean, variance, given["scale"], given["bias"])
        selection = kernels.Selection(jnp.array([[0, 300_000]], jnp.uint32), 310_000)
        result = kernels.batch_norm_relu(x, vectors, epsilon=1e-5, relu=True, selection=selection)
        sums = kernels.batch_norm_gradient_sums(x, [dy], None, vectors, epsilon=1e-5, relu=True)
        dx = kernels.batch_norm_gradient(
            x, dy, vectors, sums[:2], epsilon=1e-5, relu=True, count=shape[0]
        )
        return mean, variance, result, sums, dx, kernels.unpack(result.packed)

    first = jax.device_get(run(given["x"], given["dy"]))
    for _ in range(20):
        again = jax.device_get(run(given["x"], given["dy"]))
        jax.tree.map(same, first, again)


def test_more_than_two_to_the_31_values():
    size = 2**31 + 12_345
    x = jax.jit(lambda: (jnp.arange(size, dtype=jnp.uint32) % 1000).astype(jnp.bfloat16))()
    keep = size // 10
    limit = jax.jit(lambda x: kernels.threshold(x, keep))(x)
    assert float(limit) == float(jnp.bfloat16(900))
    packed = jax.jit(lambda x, t: kernels.pack(x, t, int(keep * 1.05)))(x, limit)
    dense = jax.jit(kernels.unpack)(packed)
    same = jax.jit(lambda x, d, t: jnp.all(d == top_k.sparsify(x, t)))(x, dense, limit)
    assert int(packed.overflow) == 0
    assert bool(same)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("density", [0.02, 0.3, 1.0])
@pytest.mark.parametrize("fits", [True, False])
def test_many_rounds_of_16_bit_values(dtype, density, fits):
    """A grid of 264 blocks packs as many values in five rounds; from end to end unevenly many."""
    size = 20_000_003
    x = np.abs(draw(size, np.float32)) + np.float32(0.01)
    x *= np.linspace(0.5, 1.5, size, dtype=np.float32)
    x = np.where(np.random.default_rng(1).random(size) < density, x, 0).astype(dtype)
    wanted = int(np.count_nonzero(x))
    capacity = wanted if fits else int(0.7 * wanted)
    limit = np.float32(1e-3)
    packed = jax.jit(lambda x, t: kernels.pack(x, t, capacity))(x, limit)
    check_packed(packed, x, limit, capacity, f"{density}, {fits}")


def test_tensors_and_stored_thresholds_that_do_not_fit_are_refused():
    limit, scratch = (jax.ShapeDtypeStruct((n,) * (n > 1), d) for n, d in
                      ((1, jnp.float32), (COUNTS_OF_ONE, jnp.uint32)))  # fmt: skip
    call = jax.ffi.ffi_call("swat_jax_thresholds", (scratch, limit))
    keep, due = jnp.zeros((1, 2), jnp.uint32), jnp.ones((1,), bool)
    for message, operands in (
        ("a tensor and a stored threshold for every result, got 1 for 1", [jnp.ones(8)]),
        ("stored must have 1 values, got 2", [jnp.ones(8), jnp.zeros(2)]),
        ("x must be float32", [jnp.ones(8, jnp.int32), jnp.zeros(())]),
    ):
        with pytest.raises(Exception, match=message):
            jax.block_until_ready(jax.jit(call)(keep, due, *operands))


def test_operands_that_do_not_fit_are_refused():
    with pytest.raises(Exception, match="keep must have 2 values, got 3"):
        jax.block_until_ready(
            jax.jit(
                lambda x: jax.ffi.ffi_call(
                    "swat_jax_threshold",
                    (
                        jax.ShapeDtypeStruct((), jnp.float32),
                        jax.ShapeDtypeStruct((selection_words(8),), jnp.uint32),
                    ),
                )(x, jnp.zeros(3, jnp.uint32), jnp.ones((), bool), jnp.zeros(()))
            )(jnp.ones(8))
        )
