"""The weight gradient from packed activations: its definition, and what `swat_conv` makes of it."""

import contextlib
import dataclasses
import shutil
import subprocess
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from swat_jax import errors, kernels, sparse_convolution
from swat_jax.algorithms import Algorithms
from swat_jax.convolution import Convolution
from swat_jax.errors import UsageError
from swat_jax.functional import swat_conv
from swat_jax.layers import SwatConv
from swat_jax.sparsity import packing

ROOT = Path(__file__).parents[1]
ONES = (1, 1)
SPARSE = Algorithms(weight_gradient="sparse")
# Window, strides, padding, of an input (3, 7, 6, 16).
CONVS = [
    ((1, 1), (1, 1), "SAME"),
    ((1, 1), (2, 2), "VALID"),
    ((1, 1), (2, 1), ((0, 0), (0, 0))),
    ((1, 1), (1, 1), ((1, 2), (0, 1))),
    ((3, 3), (1, 1), "SAME"),
    ((3, 3), (2, 2), ((1, 1), (1, 1))),
    ((3, 3), (2, 2), "SAME"),
    ((3, 2), (1, 3), "SAME_LOWER"),
    ((3, 3), (1, 1), "VALID"),
    ((5, 7), (3, 2), ((4, 0), (2, 6))),
    ((2, 2), (1, 1), ((0, -1), (0, -2))),
]


def convolution(strides=ONES, padding: object = "SAME", **changes):
    return Convolution(
        strides, padding, **{"input_dilation": ONES, "kernel_dilation": ONES} | changes
    )


def draw(window, strides, padding, dtype=jnp.bfloat16, shape=(3, 7, 6, 16), out=8):
    """A convolution, its packed input of small numbers, a threshold, the output's gradient."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(-4, 5, shape) * (rng.random(shape) < 0.4), dtype)
    conv = convolution(strides, padding)
    kernel = jax.ShapeDtypeStruct((*window, shape[-1], out), dtype)
    output = jax.eval_shape(conv, x, kernel)
    assert output.size > 0
    dy = jnp.asarray(rng.integers(-4, 5, output.shape), dtype)
    return conv, packing.pack(x, 1.0, x.size), jnp.float32(2), dy


def by_numpy(x, dy, window, strides, low):
    """In float64, output pixel by output pixel."""
    x, dy = np.asarray(x, np.float64), np.asarray(dy, np.float64)
    dw = np.zeros((*window, x.shape[-1], dy.shape[-1]))
    for r, c, i, j in np.ndindex(dy.shape[1], dy.shape[2], *window):
        row, column = r * strides[0] + i - low[0], c * strides[1] + j - low[1]
        if 0 <= row < x.shape[1] and 0 <= column < x.shape[2]:
            dw[i, j] += x[:, row, column].T @ dy[:, r, c]
    return dw


@pytest.mark.parametrize(("window", "strides", "padding"), CONVS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_definition(window, strides, padding, dtype):
    conv, packed, least, dy = draw(window, strides, padding, dtype)
    low = [low for low, _ in sparse_convolution.pads(conv, packed.shape[1:-1], window)]
    x = np.asarray(packing.unpack(packed), np.float64)
    kept = np.where(np.abs(x) >= 2, x, 0)
    found = kernels.sparse_conv_weight_gradient(packed, least, dy, conv, window)
    assert found.dtype == jnp.float32
    # Whole numbers this small have exact sums in any order.
    np.testing.assert_array_equal(found, by_numpy(kept, dy, window, strides, low))
    everything = kernels.sparse_conv_weight_gradient(packed, None, dy, conv, window)
    np.testing.assert_array_equal(everything, by_numpy(x, dy, window, strides, low))


@pytest.mark.parametrize(("window", "strides", "padding"), CONVS)
def test_the_gradient_of_swat_conv(window, strides, padding):
    """Computed from the packed input it is that of the dense one, and so is the input's."""
    _, packed, least, dy = draw(window, strides, padding)
    x = packing.unpack(packed)
    rng = np.random.default_rng(1)
    kernel = jnp.asarray(rng.integers(-4, 5, (*window, 16, 8)), jnp.float32)

    def gradients(**options):
        def product(x, kernel):
            return swat_conv(
                x, kernel, weight_sparsity=0.5, strides=strides, padding=padding, **options
            )

        return jax.jit(lambda x, kernel, dy: jax.vjp(product, x, kernel)[1](dy))(x, kernel, dy)

    kept = jnp.where(jnp.abs(x) >= 2, x, 0).astype(jnp.float32)
    conv = convolution(strides, padding)
    (expected,) = jax.vjp(lambda k: conv(kept, k), kernel)[1](dy.astype(jnp.float32))
    given = {"packed": packed, "activation_threshold": least}
    made = {"capacity": x.size, "activation_threshold": least}
    dense_dx, _ = gradients(**given)
    for options in (given, made):
        dx, dw = gradients(algorithms=SPARSE, **options)
        np.testing.assert_array_equal(dx, dense_dx)
        assert dw.dtype == kernel.dtype
        np.testing.assert_array_equal(dw, expected)


def test_under_vmap_and_in_shard_map(fake_devices):
    conv, packed, least, dy = draw((3, 3), (1, 1), "SAME", shape=(4, 5, 4, 16))
    whole = kernels.sparse_conv_weight_gradient(packed, least, dy, conv, (3, 3))
    x = packing.unpack(packed)

    def part(x, dy):
        own = packing.pack(x, 1.0, x.size)
        return kernels.sparse_conv_weight_gradient(own, least, dy, conv, (3, 3))

    each = jax.vmap(part)(x[:, None], dy[:, None])
    assert each.shape == (4, *whole.shape)
    np.testing.assert_array_equal(jnp.sum(each, axis=0), whole)

    kernel = jnp.ones((3, 3, 16, 8))
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=fake_devices)
    spec = jax.sharding.PartitionSpec

    def loss(kernel, x, dy):
        y = swat_conv(
            x, kernel, weight_sparsity=0, activation_threshold=2.0, capacity=x.size,
            algorithms=SPARSE,
        )  # fmt: skip
        return jax.lax.psum(jnp.sum((y * dy).astype(jnp.float32)), "data")

    gradient = jax.shard_map(
        jax.grad(loss), mesh=mesh, in_specs=(spec(), spec("data"), spec("data")), out_specs=spec()
    )
    np.testing.assert_array_equal(jax.jit(gradient)(kernel, x, dy), whole)


def test_nothing_kept_no_pixels_and_nan():
    conv = convolution()
    zeros = packing.pack(jnp.zeros((2, 3, 3, 8), jnp.bfloat16), 1.0, 4)
    dy = jnp.ones((2, 3, 3, 8), jnp.bfloat16)
    gradient = kernels.sparse_conv_weight_gradient
    assert not gradient(zeros, None, dy, conv, (1, 1)).any()
    empty = packing.Packed(
        zeros.values, *[jnp.zeros(0, jnp.uint32)] * 2, zeros.overflow, (0, 3, 3, 8)
    )
    assert not gradient(empty, None, dy[:0], conv, (1, 1)).any()
    x = jnp.zeros((2, 3, 3, 8), jnp.bfloat16).at[1, 2, 0, 5].set(jnp.nan)
    found = np.isnan(gradient(packing.pack(x, 1.0, 4), jnp.float32(2), dy, conv, (1, 1)))
    assert found[0, 0, 5].all()
    assert found.sum() == 8


@pytest.mark.parametrize(
    ("changes", "shape", "dtype", "kernel", "reason"),
    [
        ({}, (2, 4, 4, 8), jnp.float32, (1, 1, 8, 8), "x is float32"),
        ({}, (2, 4, 8), jnp.bfloat16, (1, 8, 8), "1 spatial axes"),
        ({}, (2, 4, 4, 12), jnp.bfloat16, (1, 1, 12, 8), "12 input and 8 output"),
        ({}, (2, 4, 4, 8), jnp.float16, (1, 1, 8, 10), "8 input and 10 output"),
        ({"feature_group_count": 2}, (2, 4, 4, 16), jnp.bfloat16, (1, 1, 8, 16), "group"),
        ({"input_dilation": (1, 2)}, (2, 4, 4, 8), jnp.bfloat16, (1, 1, 8, 8), "dilated"),
        ({"kernel_dilation": (2, 2)}, (2, 4, 4, 8), jnp.bfloat16, (3, 3, 8, 8), "dilated"),
        ({"padding": ((-1, 0), (0, 0))}, (2, 4, 4, 8), jnp.bfloat16, (1, 1, 8, 8), "cuts off"),
        ({"preferred_element_type": jnp.float32}, (2, 4, 4, 8), jnp.bfloat16, (1, 1, 8, 8), "type"),
        ({}, (2**13, 2**8, 2**8, 8), jnp.bfloat16, (1, 1, 8, 8), "fewer than"),
    ],
)
def test_refusals(changes, shape, dtype, kernel, reason):
    assert reason in sparse_convolution.refusal(convolution(**changes), shape, dtype, kernel)


def test_what_is_refused_is_computed_from_dense_activations_and_says_so_once():
    x = jax.random.normal(jax.random.key(0), (2, 5, 5, 8))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 8, 8))
    errors.warn_once.cache_clear()

    def gradient(weight_gradient, **options):
        def loss(kernel):
            y = swat_conv(
                x, kernel, weight_sparsity=0.5, activation_sparsity=0.5,
                algorithms=Algorithms(weight_gradient=weight_gradient), **options,
            )  # fmt: skip
            return jnp.sum(y**2)

        return jax.grad(loss)(kernel)

    for options, reason in (({"capacity": 210}, "x is float32"), ({}, "x is not kept packed")):
        with pytest.warns(RuntimeWarning, match=f"by sparse: {reason}"):
            found = gradient("sparse", **options)
        np.testing.assert_array_equal(found, gradient("dense", **options))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            gradient("sparse", **options)


def test_a_layer_takes_the_choice():
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 16), jnp.bfloat16)

    def gradients(weight_gradient):
        layer = SwatConv(
            16, 8, (3, 3), weight_sparsity=0.5, pack=True, dtype=jnp.bfloat16, rngs=nnx.Rngs(0),
            algorithms=Algorithms(weight_gradient=weight_gradient),
        )  # fmt: skip
        with contextlib.ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("error")
            found = nnx.grad(lambda layer: jnp.sum(layer(x).astype(jnp.float32)))(layer)
            layer.eval()
            layer(x)
        return np.asarray(found.kernel[...])

    dense, sparse = gradients("dense"), gradients("sparse")
    assert not np.array_equal(dense, sparse)  # rounded to bfloat16, and not
    np.testing.assert_allclose(sparse, dense, rtol=2**-8, atol=2**-8)
    with pytest.raises(UsageError, match="weight_gradient must be one of dense, sparse; got 'no'"):
        gradients("no")


def test_bad_operands_are_refused():
    conv, packed, least, dy = draw((1, 1), (1, 1), "SAME")
    gradient = kernels.sparse_conv_weight_gradient
    with pytest.raises(UsageError, match=r"dy must be like the output, bfloat16\[3, 7, 6, 8\]"):
        gradient(packed, least, dy[:2], conv, (1, 1))
    with pytest.raises(UsageError, match="dy must be like the output"):
        gradient(packed, least, dy.astype(jnp.float32), conv, (1, 1))
    with pytest.raises(UsageError, match="packed has no weight gradient of its own"):
        gradient(packed, least, dy[..., :7], conv, (1, 1))
    good = sparse_convolution.cut(conv, packed.shape, dy.shape, (1, 1))
    for changes, message in (
        ({"tile": (64, 128)}, r"cut.tile must be one of \(\(64, 64\), .*got \(64, 128\)"),
        ({"gathers": True, "tile": (64, 256)}, r"cut.tile must be one of .*got \(64, 256\)"),
        ({"gathers": True}, ""),
        ({"splits": 0}, "cut.splits must be in \\[1, 2\\], got 0"),
        ({"splits": 3}, "cut.splits must be in \\[1, 2\\], got 3"),
    ):
        cut = dataclasses.replace(good, **changes)
        if message:
            with pytest.raises(UsageError, match=message):
                gradient(packed, least, dy, conv, (1, 1), cut)
        else:
            gradient(packed, least, dy, conv, (1, 1), cut)
    conv, packed, least, dy = draw((3, 3), (1, 1), "SAME")
    with pytest.raises(UsageError, match=r"cut\.gathers must be True"):
        gradient(packed, least, dy, conv, (3, 3), good)


@pytest.mark.parametrize("window", [(1, 1), (3, 3)])
@pytest.mark.parametrize("channels", [(8, 8), (64, 256), (256, 64), (512, 128), (2048, 512)])
def test_cuts_cover_everything_with_blocks_for_a_large_gpu(window, channels):
    conv, (inputs, outputs) = convolution(), channels
    for pixels in (1, 49, 12544, 802_816):
        shape, dy = (1, pixels, 1, inputs), (1, pixels, 1, outputs)
        chosen = sparse_convolution.cut(conv, shape, dy, window)
        for tile in (None, *sparse_convolution.tiles(chosen.gathers)):
            cut = sparse_convolution.cut(conv, shape, dy, window, tile)
            assert cut.tile == tile or tile is None
            assert cut.tile in sparse_convolution.tiles(chosen.gathers)
            assert 1 <= cut.splits <= max(1, -(-pixels // 32))
            blocks = cut.splits * window[0] * window[1]
            blocks *= -(-inputs // cut.tile[0]) * -(-outputs // cut.tile[1])
            assert blocks <= 264 or cut.splits == 1
            assert cut.gathers == (window != (1, 1) or inputs > 512)


@pytest.mark.parametrize(
    ("channels", "expected"),
    [
        ((64, 256), {"64x256/132", "64x256/264"}),
        ((256, 64), {"256x64/132", "256x64/264"}),
        ((64, 64), {"64x64/132", "64x64/264"}),
        # Not 64x64, whose blocks would unpack each value eight times.
        ((128, 512), {"128x256/66", "128x256/132", "64x256/33", "64x256/66", "128x128/33",
                      "128x128/66"}),
    ],
)  # fmt: skip
def test_cuts_that_are_worth_a_try(channels, expected):
    shape, dy = (256, 56, 56, channels[0]), (256, 56, 56, channels[1])
    found = sparse_convolution.cuts(convolution(), shape, dy, ONES)
    assert {one.name for one in found} == expected
    assert found[0] == sparse_convolution.cut(convolution(), shape, dy, ONES)


# What is missing or wrong in one line of the kernel, and has to be found.
FAULTS = {
    "nothing": ("", ""),
    "a tile of x that is not full": ("gpu.sync(full(turn)", "gpu.arrive(full(turn)"),
    "a tile of x that is still read": ("gpu.sync(empty(turn)", "gpu.arrive(empty(turn)"),
    "a tile of x that others clear": ("gpu.sync(kAmongProducers, 32 * Gpu::kProducers);", ""),
    "a copy of dY that is not waited for": ("problem.stages) - 2);", "problem.stages) - 1);"),
    "copied values that are not waited for": ("gpu.wait(1);", "gpu.wait(2);"),
    "a table that is still written": ("gpu.sync_warp();\n    const Found", "const Found"),
    "one slot for two turns": ("(turn % 2 * most_units + unit)", "unit"),
    "sums over what is still read": (
        "gpu.sync(kAmongConsumers, 32 * kConsumers);  // all", "// all",
    ),
    "more arrivals than turns": ("if (turn + kRing < chunks) gpu.arrive", "gpu.arrive"),
    "operands of another order": ("return lane % 8 + lane / 16 * 8;",
                                  "return lane % 8 + lane / 8 % 2 * 8;"),
}  # fmt: skip


HOPPER_FAULTS = {
    "nothing": ("", ""),
    "a tile of x that is still read": ("        if (pass == 0) wait_for_stage();\n", ""),
    "a tile of x of the turn before": (
        "  barrier_wait(empty + 8 * stage.at, (stage.turn - 1) & 1)",
        "  barrier_wait(empty + 8 * stage.at, stage.turn & 1)",
    ),
    "more chunks at once than there are tiles": (
        "min(C::kUnpackers, units_of_chunk * problem.x_stages)", "C::kUnpackers"
    ),
    "copied values that are not waited for": (
        "    barrier_wait(arrivals + 8 * slot.at, slot.turn & 1);\n", ""
    ),
    "copied values of the turn before": ("slot.turn & 1", "(slot.turn - 1) & 1"),
    "bytes that are not counted": ("barrier_expect(arrival, bytes_of_words + bytes)",
                                   "barrier_expect(arrival, bytes)"),
    "stores that no fence follows": ("    fence_stores();\n", ""),
    "channels of another block": ("is_own[w] ? read[0][w] : 0", "read[0][w]"),
    "values of another half": ("+ block * kWords +", "+"),
    "values of 32 units before": ("      now = next;\n", ""),
    "a slot that is still read": ("slot.at == 0 ? kSlots - 1 : slot.at - 1", "slot.at"),
    "copies of more than there is": ("end > whole) end = whole", "false) end = whole"),
    "copies of words from anywhere": ("is_whole = is_even && ", "is_whole = "),
    "dY that is not waited for": ("    barrier_wait(y_full + 8 * y.at, y.turn & 1);\n", ""),
    "x that is not waited for": ("    barrier_wait(x_full + 8 * x.at, x.turn & 1);\n", ""),
    "a tile of dY that is still read": ("if (stage.turn > 0) barrier_", "if (false) barrier_"),
    "products that are not waited for": ("wgmma_wait<1>()", "wgmma_wait<2>()"),
    "registers that products still read": (
        "wgmma_wait<0>();\n      give_back", "wgmma_wait<1>();\n      give_back"
    ),
    "another pattern of x": ("pixel % 8 * 16", "pixel % 4 * 16"),
    "another order of operands": ("kStride = 1024", "kStride = 512"),
    "another order in registers": ("lane / 16 * 8 + lane % 8", "lane / 8 % 2 * 8 + lane % 8"),
    "places of another pass": (
        "      if (!are_alike) find_places(in_chunk * C::kPasses + pass);\n", ""
    ),
    "values before their rank": ("near + 2 * ranks[w]", "near"),
    "values of the pass before": ("      passed = total;\n", ""),
    "values that are moved too little": ("first % 4 * 8", "first % 2 * 8"),
    "values beyond the last": ("&& rank < problem.capacity", ""),
}  # fmt: skip
# Which headers of `ops` a kernel is made of, and what may be wrong in one of them.
KERNELS = {
    "sparse_conv": ("sparse_conv.cuh", FAULTS),
    "sparse_conv_hopper": ("sparse_conv_hopper*.cuh", HOPPER_FAULTS),
}


@pytest.mark.newest
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.parametrize(
    ("kernel", "fault"), [(kernel, fault) for kernel in KERNELS for fault in KERNELS[kernel][1]]
)
def test_what_a_block_does_emulated_thread_by_thread(kernel, fault, tmp_path):
    """The source of the CUDA kernels, compiled for the CPU."""
    headers, faults = KERNELS[kernel]
    right, wrong = faults[fault]
    sources = {path.name: path.read_text() for path in (ROOT / "ops").glob(headers)}
    places = [name for name, source in sources.items() if right and right in source]
    assert len(places) == (fault != "nothing"), places
    for name, source in sources.items():
        is_there = name in places
        (tmp_path / name).write_text(source.replace(right, wrong, 1) if is_there else source)
    program = tmp_path / "emulate"
    command = ["g++", "-std=c++17", "-O0", "-I", str(tmp_path), "-I", str(ROOT / "ops")]
    command += [str(ROOT / f"tests/emulate_{kernel}.cpp"), "-o", str(program)]
    subprocess.run(command, check=True)
    result = subprocess.run([program], capture_output=True, text=True, check=False)
    assert (result.returncode == 0) == (fault == "nothing"), result.stdout
    assert ("everything as by naive loops" in result.stdout) == (fault == "nothing")
