"""SWAT-M in a training loop of one's own: the budgets of the training program, to the weight."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from swat_jax import sparsify, update_with_budgets
from swat_jax.build import sparse_layers
from swat_jax.errors import UsageError
from tests import oracle
from tests.own_models import LABELS, X, stock

X_STEPS = [X * (1 + number) for number in range(3)]


def loss_of(model, x):
    return optax.softmax_cross_entropy_with_integer_labels(model(x), LABELS).mean()


def budgets_of(model):
    return {path: layer.weight_budget for path, layer in sparse_layers(model)}


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize(
    "transformation", [optax.sgd(0.1, momentum=0.9), optax.adam(1e-3)], ids=["sgd", "adam"]
)
def test_budgets_follow_the_momentum_of_what_was_kept(transformation, every):
    model = sparsify(
        stock(), sparsity=0.75, distribution="momentum", dense="stem", threshold_every_steps=every
    )
    optimizer = nnx.Optimizer(model, transformation, wrt=nnx.Param)
    decay = 0.9  # of both

    @nnx.jit
    def step(model, optimizer, x):
        grads = nnx.grad(loss_of)(model, x)
        update_with_budgets(model, optimizer, grads)
        return grads

    buffers, used, total = {}, {}, 0
    for number, x in enumerate(X_STEPS):
        kernels = {path: np.asarray(layer.kernel[...]) for path, layer in sparse_layers(model)}
        present = {path: int(one[...]) for path, one in budgets_of(model).items()}
        if number == 0:
            total = sum(present.values())
            assert present == {p: -(-kernel.size // 4) for p, kernel in kernels.items()}
        grads = step(model, optimizer, x)
        means = []
        for path, kernel in kernels.items():
            node = grads
            for part in path.split("/"):
                node = node[int(part) if part.isdigit() else part]
            scale = 1 if isinstance(optimizer.opt_state[0], optax.TraceState) else 1 - decay
            gradient = np.asarray(node["kernel"].get_value(), np.float64) * scale
            buffers[path] = decay * buffers.get(path, 0) + gradient
            is_conv = kernel.ndim == 4
            if number % every == 0 or not is_conv:
                used[path] = oracle.threshold(kernel, present[path])
            mask = np.abs(kernel) >= used[path]
            means.append(np.abs(buffers[path])[mask].mean())
        sizes = [kernel.size for kernel in kernels.values()]
        expected = oracle.momentum_budgets(np.array(means), sizes, total)
        moved = [int(one[...]) for one in budgets_of(model).values()]
        assert sum(moved) == total
        # Rounded once, and leftovers once each time that they are spread.
        np.testing.assert_allclose(moved, expected, atol=2)
        assert moved != list(present.values())
    assert type(model.stem) is nnx.Conv


@pytest.mark.newest
def test_the_weights_move_as_without_budgets():
    model, other = (sparsify(stock(), sparsity=0.75, distribution="momentum") for _ in range(2))
    pairs = [
        (m, nnx.Optimizer(m, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)) for m in (model, other)
    ]
    grads = nnx.grad(loss_of)(model, X)
    update_with_budgets(*pairs[0], grads)
    pairs[1][1].update(other, grads)
    jax.tree.map(
        np.testing.assert_array_equal,
        nnx.to_pure_dict(nnx.state(model, nnx.Param)),
        nnx.to_pure_dict(nnx.state(other, nnx.Param)),
    )


@pytest.mark.parametrize(
    ("distribution", "transformation", "words"),
    [
        ("uniform", optax.sgd(0.1, momentum=0.9), "no layer with a budget"),
        ("momentum", optax.sgd(0.1), "it has 0"),
        ("momentum", optax.chain(optax.trace(0.9), optax.trace(0.9)), "it has 2"),
    ],
)
def test_what_cannot_be_had_is_refused_before_anything_moves(distribution, transformation, words):
    model = sparsify(stock(), sparsity=0.75, distribution=distribution)
    before = np.asarray(model.wide.kernel[...])
    optimizer = nnx.Optimizer(model, transformation, wrt=nnx.Param)
    grads = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    with pytest.raises(UsageError, match=words):
        update_with_budgets(model, optimizer, grads)
    np.testing.assert_array_equal(model.wide.kernel[...], before)
