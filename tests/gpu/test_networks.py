"""Whole networks with kernels against the same networks without, and with CUDA graphs or not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from swat_jax import data, data_parallel, step, training_setup
from tests.models.test_packing import NETWORKS, SHAPE, build, loss_of
from tests.runs import digits, needs_library

pytestmark = needs_library


def loss_gradients_state(name, period, budgets="equal", **options):
    graph, params, rest = nnx.split(build(name, True, period, budgets), nnx.Param, ...)
    x = jax.random.normal(jax.random.key(1), SHAPE)
    # Convolutions in full float32: with TF32 the two backends would select other values.
    with jax.default_matmul_precision("highest"):
        run = jax.jit(
            jax.value_and_grad(functools.partial(loss_of, graph), argnums=2, has_aux=True),
            **options,
        )
        (loss, state), gradients = run(rest, x, params)
    return jax.device_get((loss, jax.tree.leaves(gradients), jax.tree.leaves(state)))


@pytest.mark.parametrize(
    ("name", "period", "budgets"),
    [
        *((name, 1, "equal") for name in NETWORKS),
        ("resnet", 10, "equal"),
        ("imagenet", 10, "equal"),
        ("resnet", 10, "dynamic"),
        ("imagenet", 1, "dynamic"),
        ("imagenet", 1, "unlike"),
    ],
)
def test_kernels_train_as_their_twins(name, period, budgets, monkeypatch):
    """Float32, bounds as in tests/models/test_packing.py: sums are in another order.

    Budgets are dynamic under SWAT-M; here some have grown, one so that all is kept.
    """
    found = []
    for backend in ("cuda", "xla"):
        monkeypatch.setenv("SWAT_JAX_BACKEND", backend)
        found.append(loss_gradients_state(name, period, budgets))
    (loss, gradients, state), (twin_loss, twin_gradients, twin_state) = found
    np.testing.assert_allclose(loss, twin_loss, rtol=1e-4)
    largest = max(np.abs(leaf).max() for leaf in twin_gradients)
    for one, other in zip(gradients, twin_gradients, strict=True):
        bound = 2e-4 * np.abs(other).max() + 2e-5 * largest
        np.testing.assert_allclose(one, other, rtol=0, atol=bound)
    for one, other in zip(state, twin_state, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["resnet", "imagenet"])
def test_cuda_graphs_change_nothing(name):
    found = []
    for least in (1, 10**6):
        options = {"xla_gpu_graph_min_graph_size": least, "xla_gpu_autotune_level": 0}
        found.append(loss_gradients_state(name, 10, compiler_options=options))
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_bfloat16_loss_is_close_on_both_backends(monkeypatch):
    losses = []
    for backend in ("cuda", "xla"):
        monkeypatch.setenv("SWAT_JAX_BACKEND", backend)
        graph, params, rest = nnx.split(build("resnet", True, 1), nnx.Param, ...)
        x = jax.random.normal(jax.random.key(1), SHAPE, jnp.bfloat16)
        losses.append(float(jax.jit(functools.partial(loss_of, graph))(rest, x, params)[0]))
    assert losses[0] == pytest.approx(losses[1], rel=0.05, abs=0.05)


def test_thresholds_that_are_shared_survive_in_a_state_that_is_used_up():
    """The conv of a shortcut shares its threshold with another; the state is donated."""
    config = digits("u90", sparsity__threshold_every_steps=10, batch_size=64)
    dataset = data.load(config)
    trainer, make_state = training_setup.make_trainer(
        config, dataset.info, data_parallel.make_mesh(1)
    )
    state = make_state()
    batch = next(dataset.train(0))
    images, labels = step.put_batch(trainer, batch["image"], batch["label"])
    for _ in range(3):
        state, _ = trainer.train_step(state, images, labels)
    thresholds = [float(leaf[0]) for leaf in jax.tree.leaves(state["activation_thresholds"])]
    assert min(thresholds) > 0
    for path, (_, zeros, dropped) in trainer.measure(state, images, labels).items():
        assert path == "stem" or zeros > 0.85, path
        assert dropped == 0, path
