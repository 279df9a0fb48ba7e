"""The registry of algorithms, and layers whose products candidates compute."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import swat_jax.linen
from swat_jax import algorithms, candidates, errors, surgery
from swat_jax.algorithms import PLAIN, Algorithms
from swat_jax.candidates import OPS, Candidate, Problem
from swat_jax.convolution import Convolution
from swat_jax.functional import products, swat_conv, swat_linear
from swat_jax.layers import SwatConv, SwatLinear
from swat_jax.sparsity import packing
from tests.fake_algorithms import CALLS, FAKES, add_fakes

CONV = Convolution((1, 1), "SAME", (1, 1), (1, 1))
PROBLEM = Problem(CONV, (2, 4, 4, 16), (3, 3, 16, 8), np.dtype(jnp.bfloat16), is_packed=True)


@pytest.fixture
def fakes(monkeypatch):
    add_fakes(monkeypatch)
    return Algorithms("fake", "fake:slow", "fake")


def test_plain_is_what_there_is_without_a_choice():
    assert Algorithms() == PLAIN == Algorithms("masked", "masked", "dense")
    assert hash(Algorithms()) == hash(PLAIN)
    assert all(PLAIN.is_plain(op) for op in OPS)
    assert all(algorithms.refusal(op, PLAIN[op], PROBLEM) == "" for op in OPS)
    assert PLAIN.accepted(PROBLEM) is not None


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("given", ["no", "masked:8x8", "dense:1", "", 3, None])
def test_an_unknown_algorithm_is_refused(op, given):
    with pytest.raises(errors.UsageError, match=f"{op} must be one of {PLAIN[op]}") as caught:
        Algorithms(**{op: given})
    assert str(caught.value).endswith(f"got {given!r}")


def test_variants_are_named_and_the_first_is_the_choice_without_a_name():
    assert algorithms.variants("weight_gradient", "sparse", PROBLEM) == ["sparse:64x64/1"]
    large = dataclasses.replace(PROBLEM, x=(64, 56, 56, 256), kernel=(1, 1, 256, 128))
    found = algorithms.variants("weight_gradient", "sparse", large)
    assert found[0] == "sparse:256x128/132"
    assert len(found) == len(set(found)) >= 2
    for one in found:
        assert algorithms.refusal("weight_gradient", one, large) == ""
    why = algorithms.refusal("weight_gradient", "sparse:1x1/1", PROBLEM)
    assert why == "sparse has no variant '1x1/1' for it"
    unpacked = dataclasses.replace(PROBLEM, is_packed=False)
    assert algorithms.refusal("weight_gradient", "sparse", unpacked) == "x is not kept packed"


def operands(shape, kernel_shape, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.nn.relu(jax.random.normal(keys[0], shape, dtype))
    return x, jax.random.normal(keys[1], kernel_shape), keys[2]


def results(product, x, kernel, key):
    """Output and both gradients, compiled."""

    def run(x, kernel):
        y, pull = jax.vjp(product, x, kernel)
        return (y, *pull(jax.random.normal(key, y.shape, y.dtype)))

    return jax.jit(run)(x, kernel)


@pytest.mark.parametrize("granularity", ["unstructured", "channel"])
@pytest.mark.parametrize("capacity", [None, 400])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"strides": 2, "padding": ((1, 0), (2, 1))},
        {"feature_group_count": 2},
        {"kernel_dilation": 2},
    ],
)
def test_a_conv_by_candidates_is_the_plain_one(settings, capacity, granularity, fakes):
    """The fakes compute the same sums in the same order: bit for bit."""
    x, kernel, key = operands((2, 6, 5, 8), (3, 3, 8 // settings.get("feature_group_count", 1), 4))

    def product(chosen):
        return lambda x, kernel: swat_conv(
            x, kernel, weight_sparsity=0.7, activation_sparsity=0.6, capacity=capacity,
            granularity=granularity, algorithms=chosen, **settings,
        )  # fmt: skip

    chosen = fakes if capacity else dataclasses.replace(fakes, weight_gradient="dense")
    CALLS.clear()
    found = results(product(chosen), x, kernel, key)
    assert set(CALLS) == {("forward", "fast"), ("input_gradient", "slow")} | (
        {("weight_gradient", "fast")} if capacity else set()
    )
    for ours, theirs in zip(found, results(product(PLAIN), x, kernel, key), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 3, 4, 12)])
def test_a_linear_layer_by_candidates_is_the_plain_one(shape, fakes):
    x, kernel, key = operands(shape, (12, 7))

    def product(chosen):
        return lambda x, kernel: swat_linear(
            x, kernel, weight_sparsity=0.7, activation_sparsity=0.5, capacity=x.size,
            algorithms=chosen,
        )  # fmt: skip

    CALLS.clear()
    found = results(product(fakes), x, kernel, key)
    assert len(set(CALLS)) == 3
    for ours, theirs in zip(found, results(product(PLAIN), x, kernel, key), strict=True):
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)


def test_the_weight_gradient_of_a_linear_layer_from_packed_activations():
    """By its twin, which adds in float32 what the plain way rounds to bfloat16."""
    x, kernel, key = operands((40, 16), (16, 24), jnp.bfloat16)

    def product(chosen):
        return lambda x, kernel: swat_linear(
            x, kernel, weight_sparsity=0.5, activation_sparsity=0.5, capacity=400, algorithms=chosen
        )

    y, dx, dw = results(product(Algorithms(weight_gradient="sparse")), x, kernel, key)
    plain_y, plain_dx, plain_dw = results(product(PLAIN), x, kernel, key)
    np.testing.assert_array_equal(y, plain_y)
    np.testing.assert_array_equal(dx, plain_dx)
    dy = np.asarray(jax.random.normal(key, y.shape, y.dtype), np.float64)
    kept = np.sort(np.asarray(x, np.float64).ravel())[-320]
    exact = np.where(np.asarray(x, np.float64) >= kept, x, 0).T.astype(np.float64) @ dy
    assert np.abs(dw - exact).max() < 1e-5 * np.abs(exact).max()
    assert 1e-5 < np.abs(plain_dw - exact).max() / np.abs(exact).max() < 2**-7


def test_under_vmap_and_in_shard_map(fake_devices, fakes):
    x, kernel, _ = operands((4, 5, 5, 8), (3, 3, 8, 4))

    def loss(chosen, kernel, x):
        y = swat_conv(
            x, kernel, weight_sparsity=0.5, activation_sparsity=0.5, capacity=200,
            algorithms=chosen,
        )  # fmt: skip
        return jnp.sum(y**2)

    def both(chosen):
        each = jax.vmap(jax.grad(lambda k, x: loss(chosen, k, x[None]), (0, 1)), (None, 0))
        mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=fake_devices)

        def total(kernel, x):
            return jax.lax.psum(loss(chosen, kernel, x), "data")

        shared = jax.shard_map(jax.grad(total), mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
        return jax.tree.leaves((jax.jit(each)(kernel, x), jax.jit(shared)(kernel, x)))

    for ours, theirs in zip(both(fakes), both(PLAIN), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("fakes")
def test_what_a_candidate_does_not_take_is_plain_and_said_once():
    x, kernel, key = operands((1, 4, 4, 8), (3, 3, 8, 4), jnp.float16)
    errors.warn_once.cache_clear()
    why = "the forward of x .* is computed in the plain way .masked. and not by fake: float16"

    def product(chosen):
        return lambda x, kernel: swat_conv(
            x, kernel, weight_sparsity=0.5, activation_sparsity=0.5, algorithms=chosen
        )

    with pytest.warns(RuntimeWarning, match=why):
        found = results(product(Algorithms(forward="fake")), x, kernel, key)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results(product(Algorithms(forward="fake")), x, kernel, key)
    for ours, theirs in zip(found, results(product(PLAIN), x, kernel, key), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_layers_use_their_choice_in_training_and_are_plain_in_evaluation(kind, fakes):
    def make(**chosen):
        options = {"weight_sparsity": 0.5, "pack": True, "rngs": nnx.Rngs(0), **chosen}
        if kind == "conv":
            return SwatConv(8, 4, (3, 3), **options)
        return SwatLinear(8, 4, **options)

    x = jax.random.normal(jax.random.key(1), (2, 4, 4, 8))
    layer = make(algorithms=fakes)
    assert make().algorithms == PLAIN
    CALLS.clear()
    gradient = nnx.jit(nnx.grad(lambda layer, x: jnp.sum(layer(x) ** 2)))
    found, plain = gradient(layer, x), gradient(make(), x)
    assert {op for op, _ in CALLS} == set(OPS)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    CALLS.clear()
    layer.eval()
    layer(x)
    assert not CALLS


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize("kind", ["conv", "dense"])
def test_linen_layers_use_their_choice(kind):
    def make(chosen):
        if kind == "conv":
            return swat_jax.linen.SwatConv(4, (3, 3), weight_sparsity=0.5, algorithms=chosen)
        return swat_jax.linen.SwatDense(4, weight_sparsity=0.5, algorithms=chosen)

    x = jax.random.normal(jax.random.key(1), (2, 4, 4, 8))
    chosen = Algorithms("fake", "fake")
    variables = make(PLAIN).init(jax.random.key(0), x)

    def gradient(module):
        return jax.grad(lambda v: jnp.sum(module.apply(v, x) ** 2))(variables)

    CALLS.clear()
    found = gradient(make(chosen))
    assert {op for op, _ in CALLS} == {"forward", "input_gradient"}
    for ours, theirs in zip(*map(jax.tree.leaves, (found, gradient(make(PLAIN)))), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    CALLS.clear()
    make(chosen).apply(variables, x, deterministic=True)
    assert not CALLS
    assert isinstance(make(chosen), linen.Module)


def test_sparsify_gives_layers_the_plain_choice_and_densify_takes_it_away():
    model = surgery.sparsify(nnx.Conv(4, 4, (3, 3), rngs=nnx.Rngs(0)), sparsity=0.5)
    assert model.algorithms == PLAIN
    assert model(jnp.ones((1, 4, 4, 4))).shape == (1, 4, 4, 4)
    assert not hasattr(surgery.densify(model), "algorithms")


def test_a_problem_knows_the_shape_of_its_output():
    assert PROBLEM.y == (2, 4, 4, 8)
    strided = dataclasses.replace(
        PROBLEM, conv=dataclasses.replace(CONV, strides=(2, 2), padding="VALID")
    )
    assert strided.y == (2, 1, 1, 8)
    linear = Problem.linear((3, 5, 16), (16, 8), np.dtype("float32"))
    assert linear.y == (15, 1, 1, 8)
    assert linear.is_linear


def test_every_candidate_is_whole():
    """Of all that are registered: a refusal for what no kernel takes, variants without a colon."""
    odd = dataclasses.replace(PROBLEM, dtype=np.dtype("float64"))
    for op, found in candidates.CANDIDATES.items():
        assert op in OPS
        for name, candidate in found.items():
            assert isinstance(candidate, Candidate)
            assert ":" not in name
            assert name != PLAIN[op]
            assert candidate.refusal(odd), name
            if not candidate.refusal(PROBLEM):
                names = list(candidate.variants(PROBLEM))
                assert names
                assert not any(":" in one for one in names)


def test_the_fakes_are_no_part_of_the_package():
    assert not any("fake" in found for found in candidates.CANDIDATES.values())
    assert set(FAKES) == set(OPS)
    assert products.PLAIN is PLAIN
    assert packing.TILE > 0
