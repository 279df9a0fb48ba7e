"""Selection: every float type and every bit pattern against a sort of the patterns."""

import functools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swat_jax.errors import UsageError
from swat_jax.sparsity import top_k
from tests import oracle
from tests.strategies import DTYPES, any_bits, precision_of

SIZE = 24


@functools.cache
def compiled_threshold():
    return jax.jit(top_k.threshold)


@functools.cache
def compiled_mask():
    return jax.jit(lambda x, limit: (top_k.mask(x, limit), top_k.sparsify(x, limit)))


def assert_same_value(actual, expected):
    """Equal bit for bit in type and value; one NaN is as good as another."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    nan = np.isnan(oracle.widen(expected))
    np.testing.assert_array_equal(np.isnan(oracle.widen(actual)), nan)
    bits = np.dtype(f"uint{8 * actual.dtype.itemsize}")
    np.testing.assert_array_equal(
        np.where(nan, 0, actual.view(bits)), np.where(nan, 0, expected.view(bits))
    )


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=60)
@given(data=st.data())
def test_threshold_mask_and_sparsify_match_a_sort(dtype, data):
    x = data.draw(any_bits(dtype, (4, SIZE // 4)))
    keep = data.draw(st.integers(1, SIZE + 2))
    with precision_of(dtype):
        limit = compiled_threshold()(x, np.int32(keep))
        assert limit.shape == ()
        expected = oracle.threshold(x, keep)
        assert_same_value(np.abs(np.asarray(limit)), np.abs(expected))
        kept, sparse = compiled_mask()(x, limit)
    expected_mask = oracle.top_mask(x, keep)
    np.testing.assert_array_equal(kept, expected_mask)
    assert_same_value(sparse, np.where(expected_mask, x, np.zeros((), x.dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=40)
@given(data=st.data())
def test_mask_by_a_threshold_that_is_not_among_the_values(dtype, data):
    x = data.draw(any_bits(dtype, SIZE))
    limit = data.draw(any_bits(dtype, ()))
    with precision_of(dtype):
        kept, _ = compiled_mask()(x, np.abs(limit))
    np.testing.assert_array_equal(kept, oracle.mask(x, np.abs(limit)))


@pytest.mark.parametrize(
    ("dtype", "limit_dtype"),
    [
        ("bfloat16", "float32"),
        ("float16", "float32"),
        ("float16", "bfloat16"),
        ("float32", "bfloat16"),
        ("float32", "float64"),
        ("float64", "float32"),
    ],
)
@settings(max_examples=40)
@given(data=st.data())
def test_threshold_of_another_type_is_compared_exactly(dtype, limit_dtype, data):
    x = data.draw(any_bits(dtype, SIZE))
    limit = np.abs(data.draw(any_bits(limit_dtype, ())))
    with precision_of("float64" if "float64" in (dtype, limit_dtype) else dtype):
        kept, _ = compiled_mask()(x, limit)
    np.testing.assert_array_equal(kept, oracle.mask(x, limit))


@pytest.mark.parametrize("kind", ["python", "int32", "uint32", "words", "int8"])
@pytest.mark.parametrize("keep", [1, 3, 5, 6])
def test_keep_may_come_in_any_form(kind, keep):
    x = np.array([[0.5, -4.0, 1.0], [3.0, -2.0, 0.0]], np.float32)
    count = {
        "python": keep,
        "int32": jnp.int32(keep),
        "uint32": jnp.uint32(keep),
        "words": jnp.asarray(top_k.split_count(keep)),
        "int8": jnp.int8(keep),
    }[kind]
    find = top_k.threshold if kind == "python" else compiled_threshold()
    assert float(find(jnp.asarray(x), count)) == float(oracle.threshold(x, keep))


def test_keep_beyond_the_size_gives_zero_and_below_one_keeps_only_nan():
    x = jnp.array([1.0, 2.0, jnp.nan, 0.0])
    assert float(top_k.threshold(x, 5)) == 0.0
    assert float(top_k.threshold(x, jnp.asarray(top_k.split_count(2**40)))) == 0.0
    assert float(top_k.threshold(x, 2**40)) == 0.0
    assert top_k.mask(x, top_k.threshold(x, 5)).tolist() == [True, True, True, False]
    assert top_k.mask(x, top_k.threshold(x, 0)).tolist() == [False, False, True, False]
    assert top_k.mask(x, top_k.threshold(x, jnp.int32(-3))).tolist() == [False, False, True, False]


def test_all_ties_survive_and_all_zero_keeps_nothing():
    ties = jnp.array([-1.0, 1.0, 1.0, 0.0, -1.0])
    assert top_k.mask(ties, top_k.threshold(ties, 1)).tolist() == [True, True, True, False, True]
    zeros = jnp.array([0.0, -0.0, 0.0])
    assert float(top_k.threshold(zeros, 2)) == 0.0
    assert top_k.mask(zeros, 0.0).tolist() == [False] * 3


def test_nan_and_infinity_come_first_and_nan_is_never_dropped():
    x = jnp.array([jnp.inf, 1.0, -jnp.nan, jnp.nan, -jnp.inf])
    for keep, expected in [(1, 2), (2, 2), (3, 4), (4, 4), (5, 5)]:
        kept = top_k.mask(x, top_k.threshold(x, keep))
        assert int(kept.sum()) == expected
        assert kept.tolist()[2:4] == [True, True]
    assert top_k.mask(x, jnp.inf).tolist() == [True, False, True, True, True]


@pytest.mark.parametrize("limit", [0.1, 1, np.float32(0.1), jnp.bfloat16(0.1)])
def test_python_and_numpy_thresholds(limit):
    x = np.array([0.1, 0.0996, 0.1001, -1.0, 0.0], jnp.bfloat16)
    level = np.float32(limit)
    np.testing.assert_array_equal(top_k.mask(jnp.asarray(x), limit), oracle.mask(x, level))


@settings(max_examples=300)
@given(
    sparsity=st.one_of(
        st.integers(0, 999).map(lambda n: n / 1000),
        st.integers(0, 99).map(lambda n: np.float32(n / 100)),
        st.floats(0, 1, exclude_max=True),
        st.sampled_from(["0.9", "0.975", "1e-3", 0, 1 - 2.0**-53]),
    ),
    n=st.integers(1, 2**40),
)
def test_keep_count_is_exact_in_decimal(sparsity, n):
    keep = top_k.keep_count(sparsity, n)
    assert isinstance(keep, int)
    assert keep == oracle.keep_count(sparsity, n)
    assert 1 <= keep <= n
    dropped = n - keep
    assert dropped <= Fraction(str(sparsity)) * n < dropped + 1


def test_keep_count_where_floats_go_wrong():
    assert math.ceil((1 - 0.7) * 10) == 4
    assert top_k.keep_count(0.7, 10) == 3
    assert top_k.keep_count(0.9, 10) == 1
    assert top_k.keep_count(0.9, 11) == 2
    assert top_k.keep_count(0, 7) == 7


@pytest.mark.parametrize(
    "sparsity",
    [1.0, 1, "1", -0.1, 1.5, float("nan"), float("inf"), "x", "", "1/0", None, True, [0.5], 0.5j],
)
def test_sparsity_that_cannot_be_met_is_refused(sparsity):
    with pytest.raises(UsageError, match=r"weight_sparsity.*\[0, 1\)"):
        top_k.keep_count(sparsity, 10, argument="weight_sparsity")


def test_what_is_not_float_is_refused():
    with pytest.raises(UsageError, match="int32"):
        top_k.threshold(jnp.arange(3), 1)
    with pytest.raises(UsageError, match=r"keep.*float32"):
        top_k.threshold(jnp.ones(3), jnp.float32(1.0))
    with pytest.raises(UsageError, match="keep"):
        top_k.threshold(jnp.ones(3), jnp.ones(3, jnp.uint32))


def test_vmap_is_the_loop():
    x = jax.random.normal(jax.random.key(0), (5, 17))
    keeps = jnp.arange(1, 6)
    both = jax.jit(jax.vmap(top_k.threshold))(x, keeps)
    data = jax.jit(jax.vmap(lambda row: top_k.threshold(row, 4)))(x)
    counts = jax.jit(jax.vmap(lambda keep: top_k.threshold(x, keep)))(keeps)
    for i in range(5):
        assert both[i] == compiled_threshold()(x[i], i + 1)
        assert data[i] == compiled_threshold()(x[i], 4)
        assert counts[i] == compiled_threshold()(x, i + 1)


def test_one_compilation_for_all_counts():
    traces = []

    @jax.jit
    def f(x, keep):
        traces.append(1)
        return top_k.threshold(x, keep)

    x = jnp.arange(8.0)
    assert [float(f(x, jnp.int32(k))) for k in (1, 4, 8)] == [7.0, 4.0, 0.0]
    assert len(traces) == 1


# --- Counts of two words ----------


@pytest.mark.parametrize("traced", [False, True])
def test_counting_in_two_words_changes_nothing(monkeypatch, traced):
    monkeypatch.setattr(top_k, "_ONE_WORD_LIMIT", 8)
    x = np.random.default_rng(0).normal(size=(5, 2, 3)).round(1).astype(np.float32)
    given = jnp.asarray(x)
    f = jax.jit(lambda x, keep: top_k.threshold(x, keep)) if traced else top_k.threshold
    for keep in (1, 7, 8, 15, 30):
        for count in (keep, jnp.int32(keep), jnp.asarray(top_k.split_count(keep))):
            assert float(f(given, count)) == float(oracle.threshold(x, keep))
    for keep in (31, 2**32, 2**32 + 3):
        assert float(f(given, jnp.asarray(top_k.split_count(keep)))) == 0.0


def test_two_words_carry_between_digits(monkeypatch):
    monkeypatch.setattr(top_k, "_ONE_WORD_LIMIT", 2**17)
    x = np.zeros((3, 130_000), np.float16)
    x[:2] = 1.0
    x[2, :5] = 2.0
    f = jax.jit(lambda x, keep: top_k.threshold(x, keep))
    for keep, expected in [(5, 2.0), (6, 1.0), (260_005, 1.0), (260_006, 0.0)]:
        assert float(f(x, jnp.asarray(top_k.split_count(keep)))) == expected


def test_more_than_four_billion_values():
    """Broadcasts are never written out, so 2**32 + 2**30 values cost no memory."""
    rows = 2**30
    values = jnp.array([1.0, 4.0, 0.5, 2.0, 3.0], jnp.float16)

    @jax.jit
    def count(limit):
        flags = jnp.broadcast_to((values >= limit)[:, None], (5, rows))
        return jnp.stack(top_k._count(flags, two_words=True))

    for limit, expected in [(4.0, 1), (1.0, 4), (0.5, 5)]:
        high, low = np.asarray(count(jnp.float16(limit))).astype(object)
        assert (high << 32) + low == expected * rows


def test_too_large_for_two_words_is_refused(monkeypatch):
    monkeypatch.setattr(top_k, "_ONE_WORD_LIMIT", 8)
    with pytest.raises(UsageError, match="reshape"):
        top_k.threshold(jnp.ones(9), 1)


# --- Counts at another size ----------


@functools.cache
def compiled_scale(size, new_size):
    return jax.jit(lambda keep: top_k.scale_count(keep, size, new_size))


SIZES = [(10, 25), (432, 49152), (2**30 - 1, 2**31 - 1), (7, 3), (9, 2**33 + 5), (27, 2**31)]


@pytest.mark.parametrize(("size", "new_size"), SIZES)
@settings(max_examples=25)
@given(data=st.data())
def test_scale_count_is_the_exact_ceiling(size, new_size, data):
    keep = data.draw(st.one_of(st.integers(1, size), st.sampled_from([1, size - 1, size])))
    expected = math.ceil(Fraction(keep * new_size, size))
    assert top_k.scale_count(keep, size, new_size) == expected
    for form in (np.int32, np.uint32):
        scaled = np.asarray(compiled_scale(size, new_size)(form(keep))).astype(object)
        value = scaled.item() if scaled.shape == () else (int(scaled[0]) << 32) + int(scaled[1])
        assert value == expected
        assert scaled.shape == (() if new_size < 2**31 else (2,))


@pytest.mark.parametrize(
    ("size", "new_size"),
    [(1, 5), (37, 90), (48_000, 48_001), (999_999_937, 999_999_936), (2**30 - 1, 2**33 + 5)],
)
def test_scale_count_of_many_counts(size, new_size):
    ends = np.arange(min(size + 1, 3000))
    keeps = np.concatenate(
        [ends, size - ends, np.random.default_rng(0).integers(0, size + 1, 5000)]
    )
    found = np.asarray(jax.vmap(compiled_scale(size, new_size))(keeps.astype(np.uint32)))
    if new_size >= 2**31:
        found = found[:, 0].astype(np.uint64) * 2**32 + found[:, 1]
    assert found.tolist() == [-(-keep * new_size // size) for keep in keeps.tolist()]


def test_scale_count_has_no_loop():
    """Every turn of a loop would be launched on a GPU, for every layer in every step."""
    program = compiled_scale(432, 49153).lower(np.uint32(5)).compile().as_text()
    assert "while(" not in program
