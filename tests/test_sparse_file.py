"""Sparse files: what was written comes back bit for bit, and nothing else is taken for one."""

import json
import pathlib
import struct
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from swat_jax import sparse_file
from swat_jax.errors import UsageError

FLOATS = [np.dtype(name) for name in ("f2", "f4", "f8")]
ANY = [*FLOATS, *map(np.dtype, ("i1", "i8", "u2", "bool"))]
# Any bits: NaN with a payload, infinities, -0 and numbers that are next to none.
BITS = {2: np.uint16, 4: np.uint32, 8: np.uint64}


def same_bits(a, b):
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    assert a.tobytes() == b.tobytes()


@st.composite
def sparse_arrays(draw):
    dtype = draw(st.sampled_from([*FLOATS, np.dtype(ml_dtypes.bfloat16)]))
    shape = draw(arrays_of.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9))
    bits = draw(arrays_of.arrays(BITS[dtype.itemsize], shape))
    mask = draw(arrays_of.arrays(bool, shape))
    return np.where(mask, bits, 0).astype(bits.dtype).view(dtype)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    sparse=st.dictionaries(st.text(min_size=1, max_size=8), sparse_arrays(), max_size=4),
    dense=st.dictionaries(
        st.text(min_size=1, max_size=8).map("d/".__add__),
        st.sampled_from(ANY).flatmap(
            lambda dtype: arrays_of.arrays(dtype, arrays_of.array_shapes(min_dims=0, min_side=0))
        ),
        max_size=3,
    ),
)
def test_comes_back_bit_for_bit(tmp_path, sparse, dense):
    sparse = {f"s/{name}": array for name, array in sparse.items()}
    path = tmp_path / "file.safetensors"
    facts = {"config": {"epochs": 3}, "names": ["a", "ä"]}
    size = sparse_file.write(path, {**sparse, **dense}, sparse=sparse, facts=facts)
    assert size == path.stat().st_size
    found = sparse_file.read(path)
    assert found.sparse == sparse.keys()
    assert found.facts == facts
    assert found.arrays.keys() == sparse.keys() | dense.keys()
    for name, array in {**sparse, **dense}.items():
        same_bits(found.arrays[name], array)


def example(shape=(64, 33), keep=0.1, seed=0):
    rng = np.random.default_rng(seed)
    kernel = rng.standard_normal(shape).astype(np.float32)
    kernel[rng.random(shape) >= keep] = 0
    return kernel


@pytest.mark.parametrize(("values", "width"), [(None, 4), ("bfloat16", 2)])
def test_size_is_a_bit_a_weight_and_what_is_left(tmp_path, values, width):
    kernel = example((3, 3, 128, 256))
    path = tmp_path / "file.safetensors"
    size = sparse_file.write(path, {"kernel": kernel}, sparse=["kernel"], values=values)
    floor = kernel.size / 8 + width * np.count_nonzero(kernel)
    assert floor < size < floor + 1000
    found = sparse_file.read(path).arrays["kernel"]
    assert found.dtype == np.float32
    expected = kernel if values is None else kernel.astype(ml_dtypes.bfloat16).astype(np.float32)
    same_bits(found, expected)


def test_anybody_with_safetensors_can_read_it(tmp_path):
    path, kernel = tmp_path / "file.safetensors", example()
    sparse_file.write(path, {"kernel": kernel, "bias": np.ones(3, np.float32)}, sparse=["kernel"])
    tensors = safetensors.numpy.load_file(path)
    assert tensors.keys() == {"kernel.bitmap", "kernel.values", "bias"}
    found = np.zeros(kernel.size, np.float32)
    kept = np.unpackbits(tensors["kernel.bitmap"], bitorder="little")[: kernel.size] == 1
    found[kept] = tensors["kernel.values"]
    np.testing.assert_array_equal(found.reshape(kernel.shape), kernel)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("files") / "file.safetensors"
    arrays = {"a/kernel": example((5, 7)), "a/bias": np.arange(3, dtype=np.float32)}
    sparse_file.write(path, arrays, sparse=["a/kernel"], facts={"config": {}})
    return path.read_bytes()


def refused(path, data):
    path.write_bytes(data)
    with pytest.raises(UsageError, match="is not a sparse file of swat_jax") as raised:
        sparse_file.read(path)
    return str(raised.value)


def test_a_file_that_is_cut_off_anywhere_is_refused(tmp_path, written):
    for length in range(len(written)):
        refused(tmp_path / "file", written[:length])
    refused(tmp_path / "file", written + b"\0")


def test_a_file_with_any_bit_turned_is_refused(tmp_path, written):
    for position in range(len(written)):
        damaged = bytearray(written)
        damaged[position] ^= 1 << (position % 8)
        refused(tmp_path / "file", bytes(damaged))


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.binary(max_size=200), header=st.booleans())
def test_noise_is_refused(tmp_path, data, header):
    refused(tmp_path / "file", struct.pack("<Q", len(data)) + data if header else data)


def forged(sparse, tensors, facts="{}"):
    """A file whose hash is right, whatever it claims."""
    metadata = {"format": sparse_file.FORMAT, "sparse": sparse, "facts": facts}
    metadata["sha256"] = sparse_file._digest(tensors, metadata)
    return safetensors.numpy.save(tensors, metadata)


BITMAP, VALUES = np.array([0b101], np.uint8), np.ones(2, np.float32)
GOOD = {"k.bitmap": BITMAP, "k.values": VALUES}


def claims(shape, dtype="float32"):
    return json.dumps({"k": {"shape": shape, "dtype": dtype}})


@pytest.mark.parametrize(
    ("sparse", "tensors", "told"),
    [
        (claims([10**12]), GOOD, "bitmap of k"),  # a terabyte
        (claims([2**40, 0]), GOOD, "bitmap of k"),
        (claims([0, 10**30]), {"k.bitmap": BITMAP[:0], "k.values": VALUES[:0]}, "no shape"),
        (claims([-1, -3]), GOOD, "no shape"),
        (claims([True, 3]), GOOD, "no shape"),
        (claims([1] * 40), GOOD, "no shape"),
        (claims("3"), GOOD, "no shape"),
        (claims([3], "object"), GOOD, "no shape"),
        (claims([3], ["float32"]), GOOD, "no shape"),
        (claims([3]), {"k.bitmap": BITMAP, "k.values": VALUES[:1]}, "values of k"),
        (claims([3]), {"k.bitmap": BITMAP, "k.values": VALUES.astype(np.int32)}, "values of k"),
        (claims([3]), {"k.bitmap": BITMAP | 8, "k.values": np.ones(3, np.float32)}, "values of k"),
        (claims([3]), {"k.bitmap": BITMAP.astype(np.int8), "k.values": VALUES}, "bitmap of k"),
        (claims([3]), {"k.bitmap": BITMAP[:, None], "k.values": VALUES}, "bitmap of k"),
        (claims([3]), {"k.bitmap": BITMAP}, "lacks its values"),
        (claims([3]), {"k.values": VALUES}, "lacks its bitmap"),
        (claims([3]), {**GOOD, "k": VALUES}, "there twice"),
        (json.dumps({"k": 3}), GOOD, "no shape"),
        (claims([10**4000] * 32), GOOD, "no shape"),
        ("[]", GOOD, "no table"),
        ("{", GOOD, "sparse cannot be read"),
        ("[" * 100_000, GOOD, "sparse cannot be read"),
    ],
)  # fmt: skip
def test_what_a_forger_claims_is_refused(tmp_path, sparse, tensors, told):
    assert told in refused(tmp_path / "file", forged(sparse, tensors))


def test_a_forged_file_that_is_right_is_read(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(forged(claims([3]), GOOD))
    np.testing.assert_array_equal(sparse_file.read(path).arrays["k"], [1, 0, 1])
    assert "facts" in refused(path, forged(claims([3]), GOOD, facts="3"))


def test_no_more_memory_than_a_hundred_times_the_file(tmp_path):
    size = 2**22
    tensors = {"k.bitmap": np.zeros(size // 8, np.uint8), "k.values": np.ones(0, np.float32)}
    data = forged(claims([size], "float64"), tensors)
    (tmp_path / "file").write_bytes(data)
    tracemalloc.start()
    sparse_file.read(tmp_path / "file")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100 * len(data)


def test_other_safetensors_files_are_refused(tmp_path):
    nothing = b'{"__metadata__":null}'
    assert "is None" in refused(tmp_path / "file", struct.pack("<Q", len(nothing)) + nothing)
    with pytest.raises(UsageError, match="cannot be read: embedded null"):
        sparse_file.read(pathlib.Path("a\0b"))
    with pytest.raises(UsageError, match="cannot be read: Is a directory"):
        sparse_file.read(tmp_path)
    told = refused(tmp_path / "file", safetensors.numpy.save({"kernel": VALUES}))
    assert "its format is None" in told
    with pytest.raises(UsageError, match=r"none\.safetensors cannot be read: No such file"):
        sparse_file.read(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("arrays", "options", "told"),
    [
        ({"k": np.zeros(3, complex)}, {}, "k has the type complex128"),
        ({"k": np.zeros(3, np.int32)}, {"sparse": ["k"]}, "int32, not floating point"),
        ({"k": VALUES}, {"sparse": ["other"]}, "no array: other"),
        ({"k": VALUES}, {"values": "int8"}, r"values must be None or one of .* got 'int8'"),
        ({"k": VALUES, "k.bitmap": BITMAP}, {"sparse": ["k"]}, r"would be called k\.bitmap"),
        ({"k.values": VALUES, "k": VALUES}, {"sparse": ["k"]}, r"would be called k\.values"),
        ({"__metadata__": VALUES}, {}, "'__metadata__' is no name"),
        ({"\ud800": VALUES}, {}, "is no name"),
        ({3: VALUES}, {}, "3 is no name"),
        ({"k": np.ones((1,) * 33, np.float32)}, {}, "33 axes"),
        ({"k": VALUES}, {"facts": {"a": float("nan")}}, "facts must be what JSON can hold"),
        ({"k": VALUES}, {"facts": {"a": {1}}}, "facts must be what JSON can hold"),
        ({"k": 1e9 * VALUES}, {"sparse": ["k"], "values": "float16"}, "which float16 cannot"),
        ({"k": 1e-9 * VALUES}, {"sparse": ["k"], "values": "float16"}, "which float16 cannot"),
    ],
)
def test_what_cannot_be_written_is_refused_and_leaves_what_was_there(
    tmp_path, arrays, options, told
):
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with pytest.raises(UsageError, match=told):
        sparse_file.write(path, arrays, **options)
    assert path.read_bytes() == b"before"


def test_where_nothing_can_be_written_nothing_is_left(tmp_path):
    with pytest.raises(OSError, match="is a folder"):
        sparse_file.write(tmp_path, {"k": VALUES})
    with pytest.raises(OSError, match="is a folder"):
        sparse_file.write(pathlib.Path("."), {"k": VALUES})
    assert not list(tmp_path.parent.glob(".*.tmp"))


def test_other_byte_orders_and_strides_are_written_as_they_read(tmp_path):
    array = example((6, 4)).astype(">f4").T[::-1]
    sparse_file.write(tmp_path / "file", {"k": array}, sparse=["k"])
    found = sparse_file.read(tmp_path / "file").arrays["k"]
    np.testing.assert_array_equal(found, array)
