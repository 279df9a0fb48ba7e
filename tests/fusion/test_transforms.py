"""A fused function is one like any other: for JAX, for Flax, and for the layers that it calls."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from swat_jax import SwatConv, fuse
from swat_jax.fusion.marks import STOCK
from swat_jax.layers import find_weight_thresholds
from tests.fusion import training

PACKED = "one pass of batch norm, relu; packs for"


class Net(nnx.Module):
    def __init__(self, **norm_options):
        conv = functools.partial(SwatConv, pack=True, param_dtype=jnp.float64, **training.REUSED)
        self.conv1 = conv(3, 8, (3, 3), rngs=nnx.Rngs(0))
        self.norm = nnx.BatchNorm(8, param_dtype=jnp.float64, rngs=nnx.Rngs(0), **norm_options)
        self.conv2 = conv(8, 4, (3, 3), rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.conv2(nnx.relu(self.norm(self.conv1(x))))


def pure(**norm_options):
    """Weights, the rest, and the loss of them as a pure function that also returns the rest."""
    graph, weights, rest = nnx.split(training.prepared(Net(**norm_options)), nnx.Param, ...)

    def loss(weights, rest, x):
        model = nnx.merge(graph, weights, rest, copy=True)
        value = training.sum_of_squares(model, x)
        return value, nnx.state(model, nnx.Not(nnx.Param))

    return weights, rest, loss


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


def test_of_pure_functions():
    weights, rest, loss = pure()
    x, fused = training.images(4, 8, 8, 3), fuse(loss)
    both = (jax.jit(jax.value_and_grad(f, has_aux=True))(weights, rest, x) for f in (fused, loss))
    training.assert_same(*(jax.tree.map(lambda leaf: [leaf], found) for found in both))
    assert PACKED in str(fused.report.norms[0])


def test_functions_that_were_compiled_before_and_are_called_after():
    weights, rest, loss = pure()
    x, compiled = training.images(4, 8, 8, 3), jax.jit(loss)
    before, _ = compiled(weights, rest, x)
    fused = fuse(compiled)
    inside, _ = fused(weights, rest, x)
    assert PACKED in str(fused.report.norms[0])
    after, _ = jax.jit(jax.value_and_grad(compiled, has_aux=True))(weights, rest, x)
    assert jnp.allclose(jnp.stack([inside, after[0]]), before, rtol=training.BOUND)


def test_mapped_from_outside():
    weights, rest, loss = pure()
    x = training.images(3, 4, 8, 8, 3)
    over_batches = functools.partial(jax.vmap, in_axes=(None, None, 0))
    gradients = (
        jax.jit(over_batches(jax.value_and_grad(f, has_aux=True)))(weights, rest, x)
        for f in (fuse(loss), loss)
    )
    training.assert_same(*([found] for found in gradients))


@pytest.mark.parametrize("axis_name", [None, "data"])
@pytest.mark.parametrize("check_vma", [True, False])
def test_on_several_devices(fake_devices, axis_name, check_vma):
    """Statistics of a device or of all of them, with and without types that say what varies."""
    weights, rest, loss = pure(axis_name=axis_name)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=fake_devices[:2])
    x = training.images(4, 8, 8, 3)

    def run(f):
        def local(weights, rest, x):
            (value, _), gradients = jax.value_and_grad(f, has_aux=True)(weights, rest, x)
            return jax.lax.psum(value, "data"), jax.lax.pmean(gradients, "data")

        shard = jax.shard_map(
            local, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P(), check_vma=check_vma
        )
        return jax.jit(shard)(weights, rest, x)

    fused = fuse(loss)
    training.assert_same([run(fused)], [run(loss)])
    assert PACKED in str(fused.report.norms[0])


def test_a_whole_step_with_its_optimizer_and_constants():
    """Objects that share a model, keyword arguments, numbers and strings: nothing is special."""

    def step(wrap, optimizer, model, x, *, power=2, kind="sum"):
        assert isinstance(power, int)
        assert kind == "sum"

        def loss(model):
            return jnp.sum(jnp.abs(model(x)) ** power)

        value, gradients = nnx.value_and_grad(wrap(loss))(model)
        optimizer.update(model, gradients)
        return value

    found = []
    for wrap in (fuse, lambda loss: loss):
        model = training.prepared(Net())
        optimizer = nnx.Optimizer(model, optax.sgd(1e-3, momentum=0.9), wrt=nnx.Param)
        run, x = nnx.jit(functools.partial(step, wrap)), training.images(4, 8, 8, 3)
        values = [run(optimizer, model, x) for _ in range(2)]
        assert int(optimizer.step[...]) == 2
        found.append((values, nnx.state(model)))
    training.assert_same(*found)


def test_thresholds_that_the_caller_found():
    """They are used, and used up, as without `fuse`."""
    expected, model = (training.prepared(Net()) for _ in range(2))
    for one in (expected, model):
        one.conv1.threshold_age[...] = jnp.zeros((), jnp.int32)
    x = training.images(4, 8, 8, 3)
    with find_weight_thresholds(expected):
        y = expected(x)
    with find_weight_thresholds(model):
        found = fuse(lambda model, x: model(x))(model, x)
        assert model.conv1.next_weight_threshold is None
    training.assert_same([[found], nnx.state(model)], [[y], nnx.state(expected)])


def test_layers_are_as_they_were_also_after_an_error():
    calls = {kind: kind.__call__ for kind in STOCK}

    def fails(model, x):
        assert nnx.BatchNorm.__call__ is not calls[nnx.BatchNorm]
        model(x)
        raise ValueError("from inside")

    with pytest.raises(ValueError, match="from inside"):
        fuse(fails)(training.prepared(Net()), training.images(4, 8, 8, 3))
    assert {kind: kind.__call__ for kind in STOCK} == calls
    assert fuse(fails).report is None


def test_a_fused_function_within_another():
    model, x = training.prepared(Net()), training.images(4, 8, 8, 3)
    inner = fuse(lambda model, x: model(x))
    outer = fuse(lambda model, x: jnp.sum(inner(model, x) ** 2))
    expected = training.sum_of_squares(training.prepared(Net()), x)
    assert jnp.allclose(outer(model, x), expected, rtol=training.BOUND)


def test_stays_a_function_with_a_name():
    def loss(model):
        """Of the model."""
        return model

    assert (fuse(loss).__name__, fuse(loss).__doc__) == ("loss", "Of the model.")
