"""Weight thresholds of all layers found before they are called: only the time changes."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from swat_jax import data, data_parallel, kernels, training_setup
from swat_jax.kernels import choice
from swat_jax.layer_state import NextWeightThreshold
from swat_jax.layers import SwatConv, SwatLinear, find_weight_thresholds
from tests.runs import digits, needs_library


def rounded(args, /, *, dtype=None):
    """A user's own promotion: weights are rounded before the layer sees them."""
    return tuple(None if x is None else x.astype(jnp.bfloat16).astype(jnp.float32) for x in args)


class Model(nnx.Module):
    """Layers of every sort, one of them called twice, and one never."""

    def __init__(self, period, rngs):
        conv = functools.partial(SwatConv, 4, 4, (3, 3), threshold_every_steps=period, rngs=rngs)
        self.convs = nnx.List([
            conv(weight_sparsity=0.7),
            conv(weight_sparsity=0.6, granularity="channel"),
            conv(weight_sparsity=0.0, activation_sparsity=0.5),
            conv(weight_sparsity=0.7, promote_dtype=rounded),
            conv(weight_sparsity=0.5, param_dtype=jnp.bfloat16),
            conv(weight_sparsity=0.5, mask=jnp.tril(jnp.ones((3, 3, 4, 4)))),
        ])  # fmt: skip
        self.convs[0].set_sparsity(
            weight_sparsity=0.7,
            activation_sparsity=0.7,
            threshold_every_steps=period,
            dynamic_budget=True,
        )
        self.unused = conv(weight_sparsity=0.7)
        self.linear = SwatLinear(4, 3, weight_sparsity=0.5, rngs=rngs)

    def __call__(self, x):
        for conv in [*self.convs, self.convs[1], self.convs[0]]:
            x = jnp.sin(conv(x))
        return self.linear(x)


def losses(period, early):
    """Loss, gradients and state of three steps."""
    graph, params, rest = nnx.split(Model(period, nnx.Rngs(0)), nnx.Param, ...)
    x = jax.random.normal(jax.random.key(1), (2, 5, 5, 4))

    @jax.jit
    def run(params, rest):
        def loss_of(params):
            model = nnx.merge(graph, params, rest, copy=True)
            model.train()
            with find_weight_thresholds(model) if early else contextlib.nullcontext():
                assert (model.unused.next_weight_threshold is not None) == early
                loss = jnp.sum(model(x) ** 2)
            if model.unused.weight_threshold is not None:
                model.unused.weight_threshold[...] = 0  # found, though nobody uses it
            assert not jax.tree.leaves(nnx.state(model, NextWeightThreshold))
            return loss, nnx.state(model, nnx.Not(nnx.Param))

        (loss, rest), gradients = jax.value_and_grad(loss_of, has_aux=True)(params)
        return loss, gradients, jax.tree.map(lambda p, g: p - 0.01 * g, params, gradients), rest

    found = []
    for _ in range(3):
        loss, gradients, params, rest = run(params, rest)
        found.append((loss, jax.tree.leaves(gradients), jax.tree.leaves(rest)))
    return found


@pytest.mark.parametrize("period", [1, 2])
def test_losses_gradients_and_state_are_the_same_bits(period):
    early, late = losses(period, True), losses(period, False)
    assert len(early[0][2]) == len(late[0][2]) > 0
    jax.tree.map(np.testing.assert_array_equal, early, late)


def test_layers_in_evaluation_are_left_alone():
    model = Model(1, nnx.Rngs(0))
    model.eval()
    with find_weight_thresholds(model):
        assert not jax.tree.leaves(nnx.state(model, NextWeightThreshold))


def test_a_model_without_swat_layers_is_left_alone():
    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    with find_weight_thresholds(model):
        assert list(model.__dict__) == list(nnx.Linear(3, 4, rngs=nnx.Rngs(0)).__dict__)


def test_what_was_found_is_forgotten_at_the_end():
    conv, x = SwatConv(4, 4, (3, 3), weight_sparsity=0.7, rngs=nnx.Rngs(0)), jnp.ones((1, 5, 5, 4))
    conv.train()
    with find_weight_thresholds(conv):
        conv.eval()
        conv(x)
    conv.train()
    conv.kernel[...] *= 10
    fresh = SwatConv(4, 4, (3, 3), weight_sparsity=0.7, rngs=nnx.Rngs(0))
    fresh.kernel[...] *= 10
    np.testing.assert_array_equal(conv(x), fresh(x))


def test_stacked_layers_are_left_to_themselves():
    stacked = SwatConv(4, 4, (3, 3), weight_sparsity=0.7, rngs=nnx.Rngs(0))
    stacked.kernel = nnx.Param(jnp.stack([stacked.kernel[...]] * 2))
    with find_weight_thresholds(stacked):
        assert stacked.next_weight_threshold is None


def test_layers_that_differ_from_device_to_device_are_found_apart(fake_devices, monkeypatch):
    monkeypatch.setattr(choice, "has_kernel", lambda *_: True)
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Auto,), devices=fake_devices[:2])

    def limits(kernel):
        model = nnx.List(
            [SwatConv(2, 2, (1, 1), weight_sparsity=0.5, rngs=nnx.Rngs(i)) for i in (0, 1)]
        )
        model[0].kernel[...] = kernel[0]
        with find_weight_thresholds(model):
            own, same = (layer.next_weight_threshold[...] for layer in model)
        return own[None], same

    run = jax.shard_map(limits, mesh=mesh, in_specs=P("data"), out_specs=(P("data"), P()))
    own, same = jax.jit(run)(jnp.arange(1.0, 9.0).reshape(2, 1, 1, 2, 2))
    assert own.tolist() == [3, 7]
    assert same.shape == ()


@needs_library
@pytest.mark.parametrize("period", [1, 3])
def test_a_training_step_finds_them_in_one_kernel(period, monkeypatch):
    monkeypatch.setenv("SWAT_JAX_BACKEND", "cuda")
    config = digits("u90", batch_size=32, sparsity__threshold_every_steps=period)
    dataset = data.load(config)
    trainer, make_state = training_setup.make_trainer(
        config, dataset.info, data_parallel.make_mesh(1)
    )
    images, labels = next(dataset.train(0)).values()
    traced = trainer.train_step.trace(make_state(), images, labels)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@swat_jax_thresholds(") == 1
    assert kernels.backend() == "cuda"


@needs_library
def test_on_the_cpu_the_definition_is_used(monkeypatch):
    monkeypatch.setenv("SWAT_JAX_BACKEND", "cuda")
    xs = [jax.random.normal(jax.random.key(i), (50 + i,)) for i in range(3)]
    stored = [jnp.float32(i) for i in range(3)]
    run = jax.jit(lambda due: kernels.refreshed_thresholds([True, due, due], xs, [5, 6, 7], stored))
    for due in (True, False):
        expected = [np.sort(np.abs(x))[-k] for x, k in zip(xs, (5, 6, 7), strict=True)]
        expected[1:] = expected[1:] if due else [1, 2]
        np.testing.assert_array_equal(np.stack(run(due)), np.array(expected, np.float32))
