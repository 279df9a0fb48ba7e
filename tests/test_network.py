"""A model as structure and dicts of arrays: what goes in comes out, and nothing else changes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from swat_jax import network
from swat_jax.layers import SwatConv, SwatLinear

COLLECTIONS = {"params", "batch_stats", "weight_thresholds", "activation_thresholds", "budgets"}


class Small(nnx.Module):
    """Everything that a network may hold: lists, batch norm, two dropouts, thresholds, a budget."""

    def __init__(self, rngs: nnx.Rngs):
        sparse: Any = {"weight_sparsity": 0.5, "threshold_every_steps": 3, "rngs": rngs}
        self.blocks = nnx.List([SwatConv(2, 4, (3, 3), **sparse), SwatConv(4, 4, (1, 1), **sparse)])
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.drop1 = nnx.Dropout(0.5, rngs=rngs)
        self.drop2 = nnx.Dropout(0.5, rngs=rngs)
        self.head = SwatLinear(4, 3, rngs=rngs)
        self.head.set_sparsity(weight_sparsity=0.5, activation_sparsity=0.5, dynamic_budget=True)

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        x = self.drop2(self.drop1(nnx.relu(self.norm(x))))
        return self.head(x.mean((1, 2)))


@pytest.fixture(scope="module")
def model():
    return Small(nnx.Rngs(0))


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).normal(size=(4, 5, 5, 2)).astype("float32")


@pytest.fixture(scope="module")
def parts(model):
    return network.split(model)


def train_once(parts, images, collections=None, **options):
    structure, own = parts
    copy: Any = structure.model({**own, **(collections or {})}, **options)
    copy.train()
    return np.asarray(copy(images)), network.values(copy)


def test_arrays_lie_where_the_attributes_are(model, parts):
    _, collections = parts
    assert set(collections) == COLLECTIONS
    kernel = collections["params"]["blocks"]["1"]["kernel"]
    assert np.array_equal(kernel, model.blocks[1].kernel[...])
    assert set(collections["params"]) == {"blocks", "norm", "head"}
    assert set(collections["batch_stats"]) == {"norm"}
    assert set(collections["weight_thresholds"]["blocks"]) == {"0", "1"}
    # Half of 4 * 3 weights; a linear layer is always exact and has no threshold.
    assert collections["budgets"]["head"]["weight_budget"] == 6
    assert "head" not in collections["weight_thresholds"]


def test_a_model_comes_back_the_same(model, parts, images):
    structure, collections = parts
    copy: Any = structure.model(collections)
    copy.eval()
    model.eval()
    assert np.array_equal(copy(images), model(images))


def test_values_have_the_same_structure_and_types_after_a_call(parts, images):
    _, after = train_once(parts, images)
    _, before = parts
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), before
    )


def test_a_call_in_training_changes_state_of_its_own_copy_only(parts, images):
    _, collections = parts
    before = jax.device_get(collections)
    first, after = train_once(parts, images)
    again, _ = train_once(parts, images)
    assert np.array_equal(first, again)
    assert jax.tree.all(jax.tree.map(np.array_equal, before, jax.device_get(collections)))
    assert not np.array_equal(
        after["batch_stats"]["norm"]["mean"], before["batch_stats"]["norm"]["mean"]
    )
    assert np.array_equal(after["params"]["head"]["kernel"], before["params"]["head"]["kernel"])


def test_the_key_decides_about_dropout_and_each_layer_draws_its_own(parts):
    structure, collections = parts
    ones = jnp.ones(200)

    def drawn(seed):
        copy: Any = structure.model(collections, key=jax.random.key(seed))
        copy.train()
        return np.asarray(copy.drop1(ones)), np.asarray(copy.drop2(ones))

    (first, second), (again, _), (other, _) = drawn(0), drawn(0), drawn(1)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, other)


def test_age_zero_recomputes_thresholds_and_another_age_uses_the_stored(parts, images):
    _, collections = parts
    # Above every weight: with it, no weight is left and each image gives the same.
    above = {"weight_thresholds": jax.tree.map(lambda _: 9.0, collections["weight_thresholds"])}
    above["weight_thresholds"] = jax.tree.map(jnp.float32, above["weight_thresholds"])
    fresh, found = train_once(parts, images, above, age=0)
    kernel = np.abs(collections["params"]["blocks"]["0"]["kernel"]).ravel()
    assert found["weight_thresholds"]["blocks"]["0"]["weight_threshold"] == np.sort(kernel)[36]
    stored, found = train_once(parts, images, above, age=1)
    assert found["weight_thresholds"]["blocks"]["0"]["weight_threshold"] == 9
    assert not np.array_equal(fresh, stored)


def test_the_budget_that_is_given_is_the_one_that_counts(parts, images):
    structure, collections = parts
    outputs = []
    for keep in (1, 12):
        budget = {"head": {"weight_budget": jnp.int32(keep)}}
        copy: Any = structure.model({**collections, "budgets": budget})
        copy.eval()
        copy.head.bias[...] = jnp.zeros(3)
        outputs.append(np.asarray(copy.head(jnp.ones((1, 4)))))
    assert np.count_nonzero(outputs[0]) == 1
    assert np.count_nonzero(outputs[1]) == 3


def test_a_collection_that_the_model_has_not_may_be_missing():
    structure, collections = network.split(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    copy: Any = structure.model({"params": collections["params"]})
    assert copy(jnp.ones((1, 3))).shape == (1, 2)
    assert not collections["batch_stats"]


def test_lookup_and_replace():
    tree = {"a": {"b": {"kernel": 1}, "c": {"kernel": 2}}, "d": 3}
    assert network.lookup(tree, "a/b/kernel") == 1
    assert network.lookup(tree, "a/b") == {"kernel": 1}
    assert network.lookup(tree, "a/x/kernel") is None
    new = network.replace(tree, "a/b/kernel", 7)
    assert new == {"a": {"b": {"kernel": 7}, "c": {"kernel": 2}}, "d": 3}
    assert tree["a"]["b"]["kernel"] == 1
    assert new["a"]["c"] is tree["a"]["c"]
    assert network.replace(tree, "d", 4)["d"] == 4
