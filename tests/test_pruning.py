"""Masks, pruned weights and SWAT-M's budgets of whole networks, against the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from swat_jax import pruning
from swat_jax.pruning import SparseLayer
from tests import oracle

SHAPES = {"stem": (3, 3, 2, 8), "stage1/0/conv1": (3, 3, 8, 8), "classifier": (8, 10)}


def layers(sparsity=0.7, granularity="unstructured", first=None):
    return tuple(
        SparseLayer(
            path,
            shape,
            granularity if path != "classifier" else "unstructured",
            first if first is not None and path == "stem" else sparsity,
        )
        for path, shape in SHAPES.items()
    )


def nested(leaves, name):
    """{"a/b": value} as {"a": {"b": {name: value}}}."""
    tree = {}
    for path, value in leaves.items():
        node = tree
        for part in path.split("/"):
            node = node.setdefault(part, {})
        node[name] = value
    return tree


@pytest.fixture
def kernels():
    rng = np.random.default_rng(3)
    return {path: rng.normal(size=shape).astype("float32") for path, shape in SHAPES.items()}


@pytest.fixture
def params(kernels):
    tree = nested(kernels, "kernel")
    tree["stem"]["bias"] = np.arange(8, dtype="float32")
    tree["norm"] = {"scale": np.ones(8, "float32")}
    return jax.tree.map(jnp.asarray, tree)


@pytest.mark.parametrize("granularity", ["unstructured", "channel", "filter", "vector8"])
def test_masks_are_those_of_the_oracle(granularity, kernels, params):
    found = pruning.masks(layers(granularity=granularity), params, {})
    for layer in layers(granularity=granularity):
        keep = oracle.keep_count(0.7, oracle.units(layer.shape, layer.granularity))
        expected = oracle.weight_mask(kernels[layer.path], keep=keep, granularity=layer.granularity)
        assert np.array_equal(found[layer.path], expected), layer.path


def test_pruning_leaves_exactly_k_weights_and_touches_nothing_else(kernels, params):
    pruned = jax.device_get(pruning.prune(layers(first=0.0), params, {}))
    for path, shape in SHAPES.items():
        size = int(np.prod(shape))
        node = pruned
        for part in path.split("/"):
            node = node[part]
        kernel = node["kernel"]
        kept = kernel != 0
        assert kept.sum() == (size if path == "stem" else oracle.keep_count(0.7, size))
        assert np.array_equal(kernel[kept], kernels[path][kept])
        if path != "stem":
            assert np.abs(kernels[path][~kept]).max() < np.abs(kernel[kept]).min()
    assert np.array_equal(pruned["stem"]["bias"], params["stem"]["bias"])
    assert np.array_equal(pruned["norm"]["scale"], params["norm"]["scale"])
    assert jax.tree.structure(pruned) == jax.tree.structure(params)


def test_a_budget_comes_before_the_sparsity(params):
    keeps = {"stem": 5, "stage1/0/conv1": 100, "classifier": 1}
    budgets = nested({path: jnp.int32(keep) for path, keep in keeps.items()}, "weight_budget")
    found = pruning.masks(layers(), params, budgets)
    assert {path: int(mask.sum()) for path, mask in found.items()} == keeps


def test_a_stored_threshold_is_used_as_it_is(kernels, params):
    stored = nested({"stem": jnp.float32(1.25)}, "weight_threshold")
    found = pruning.masks(layers(), params, {}, stored)
    assert np.array_equal(found["stem"], np.abs(kernels["stem"]) >= 1.25)
    # A layer without one stays exact.
    assert int(found["classifier"].sum()) == oracle.keep_count(0.7, 80)


def test_zeros_are_counted(params):
    pruned = pruning.prune(layers(), params, {})
    sizes = [int(np.prod(shape)) for shape in SHAPES.values()]
    zeros = sum(size - oracle.keep_count(0.7, size) for size in sizes)
    assert pruning.count_zeros(layers(), pruned) == (zeros, sum(sizes))
    assert pruning.count_zeros(layers(), params) == (0, sum(sizes))


class Redistribution:
    """SWAT-M's inputs: uniform budgets, exact masks, and momentum of another size in each layer."""

    def __init__(self, params, scales, sparsity=0.7):
        self.layers = layers(sparsity)
        keeps = {layer.path: oracle.keep_count(sparsity, layer.size) for layer in self.layers}
        self.total = sum(keeps.values())
        self.budgets = nested({p: jnp.int32(k) for p, k in keeps.items()}, "weight_budget")
        self.masks = pruning.masks(self.layers, params, self.budgets)
        rng = np.random.default_rng(5)
        self.buffers = {
            layer.path: (scale * rng.normal(size=layer.shape)).astype("float32")
            for layer, scale in zip(self.layers, scales, strict=True)
        }

    def new(self):
        momentum = nested(self.buffers, "kernel")
        tree = pruning.redistribute(self.layers, self.masks, momentum, self.budgets)
        found = jax.tree.leaves_with_path(tree)
        by_path = {jax.tree_util.keystr(p, simple=True, separator="/"): int(v) for p, v in found}
        return [by_path[f"{layer.path}/weight_budget"] for layer in self.layers]

    def expected(self):
        means = [
            np.abs(self.buffers[layer.path].astype(np.float64))[
                np.asarray(self.masks[layer.path])
            ].mean()
            for layer in self.layers
        ]
        return oracle.momentum_budgets(means, [layer.size for layer in self.layers], self.total)


# Equal momentum; a large layer that gains; one small enough to become dense, whose rest is spread.
@pytest.mark.parametrize("scales", [(1, 1, 1), (0.2, 5.0, 0.5), (0.5, 0.5, 9.0)])
def test_budgets_follow_the_momentum_of_the_kept_weights(scales, params):
    case = Redistribution(params, scales)
    found, expected = case.new(), case.expected()
    assert sum(found) == case.total
    # Rounding down, and one weight more or less each time that what is left over is spread.
    assert np.abs(np.array(found) - expected).max() <= 2, (found, expected)


def test_momentum_of_masked_weights_does_not_count(params):
    case = Redistribution(params, (0.2, 3.0, 0.5))
    before = case.new()
    mask = np.asarray(case.masks["stem"])
    case.buffers["stem"] = np.where(mask, case.buffers["stem"], 1e6).astype("float32")
    assert case.new() == before


def test_without_budgets_nothing_is_redistributed():
    assert pruning.redistribute(layers(), {}, {}, {}) == {}
