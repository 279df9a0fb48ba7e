"""swat_conv and swat_linear under JAX's transformations; what they keep for the backward pass."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from swat_jax.functional import swat_conv, swat_linear
from swat_jax.sparsity import packing, top_k
from tests import oracle
from tests.strategies import Grid

KEEPS: dict[str, Any] = {"weight_keep": 20, "activation_keep": 50}


def integers(shape, salt=0, levels=3):
    """Small whole numbers with ties: sums of products through three layers stay exact."""
    return jnp.asarray(8 * Grid(7, levels, 0.2).array(shape, salt=salt))


def assert_trees_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


# --- Residuals ----------


def distinct(shape, seed):
    """Values that are all different in magnitude, so that any one can be recognised."""
    size = int(np.prod(shape))
    rng = np.random.default_rng(seed)
    values = (rng.permutation(size) + 1 + 1000 * seed) * rng.choice([-1, 1], size)
    return jnp.asarray(values.reshape(shape), jnp.float32)


def conv(x, kernel, **how):
    return swat_conv(x, kernel, strides=(2, 1), **how)


PRODUCTS = {
    "conv": (conv, (2, 6, 5, 3), (3, 3, 3, 4)),
    "linear": (swat_linear, (10, 18), (18, 6)),
}


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("how", ["count", "threshold", "packed"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_what_is_saved_is_zero_exactly_off_the_mask_and_nothing_else(name, how, jitted):
    product, x_shape, kernel_shape = PRODUCTS[name]
    x, kernel = distinct(x_shape, 1), distinct(kernel_shape, 2)
    weight_keep, activation_keep = 30, 41
    limits = oracle.threshold(np.asarray(kernel), 30), oracle.threshold(np.asarray(x), 41)
    options: dict[str, Any] = {
        "count": {"weight_keep": weight_keep, "activation_keep": activation_keep},
        "threshold": {"weight_threshold": limits[0], "activation_threshold": limits[1]},
        "packed": {"weight_keep": weight_keep},
    }[how]
    if how == "packed":
        options["packed"] = packing.pack(x, jnp.asarray(limits[1]), 45)

    def forward(x, kernel):
        return jax.vjp(functools.partial(product, **options), x, kernel)

    _, back = (jax.jit(forward) if jitted else forward)(x, kernel)
    saved = [np.asarray(leaf) for leaf in jax.tree.leaves(back)]
    floats = [leaf for leaf in saved if leaf.dtype == np.float32]
    seen = np.unique(np.abs(np.concatenate([leaf.ravel() for leaf in floats])))
    x_kept = oracle.sparsify(np.asarray(x), oracle.top_mask(np.asarray(x), activation_keep))
    kernel_kept = oracle.sparsify(
        np.asarray(kernel), oracle.top_mask(np.asarray(kernel), weight_keep)
    )
    # Every kept value is there, and no other: the dense tensors are not, in whatever form.
    kept = np.concatenate([x_kept.ravel(), kernel_kept.ravel()])
    np.testing.assert_array_equal(seen[seen > 0], np.unique(np.abs(kept[kept != 0])))
    assert any(leaf.shape == kernel_shape and (leaf == kernel_kept).all() for leaf in floats)
    in_full = [leaf for leaf in floats if leaf.shape == x_shape]
    if how == "packed":
        assert in_full == []
        assert sum(leaf.size for leaf in floats) == 45 + kernel.size
    else:
        assert any((leaf == x_kept).all() for leaf in in_full)
        assert sum(leaf.size for leaf in floats if leaf.size > 1) == x.size + kernel.size


def test_the_residuals_of_half_float_inputs_have_their_type():
    x, kernel = distinct((4, 8), 1).astype(jnp.bfloat16), distinct((8, 3), 2)
    _, back = jax.vjp(
        lambda x, k: swat_linear(x, k, weight_sparsity=0.5, activation_sparsity=0.5), x, kernel
    )
    large = [leaf for leaf in jax.tree.leaves(back) if leaf.size > 1]
    assert {leaf.dtype for leaf in large} == {jnp.dtype(jnp.bfloat16)}


# --- jit, grad, vmap, scan, remat ----------


def loss(x, kernel, dy, **how):
    return jnp.vdot(conv(x, kernel, **how), dy)


gradients = jax.value_and_grad(loss, (0, 1))
compiled_gradients = jax.jit(gradients)
SHAPES = {"x": (2, 6, 5, 3), "kernel": (3, 3, 3, 4), "dy": (2, 3, 5, 4)}


def values(*lead: int):
    return [integers((*lead, *shape), salt=i) for i, shape in enumerate(SHAPES.values())]


def test_jit_changes_nothing():
    x, kernel, dy = values()
    f = functools.partial(gradients, **KEEPS)
    assert_trees_equal(jax.jit(f)(x, kernel, dy), f(x, kernel, dy))


@pytest.mark.parametrize("mapped", ["x", "kernel", "x kernel keeps", "limits"])
def test_vmap_is_the_loop(mapped):
    """Each element has its own top-K, also where only one of the operands is mapped."""
    x, kernel, dy = values(3)
    over_x, over_kernel = "x" in mapped.split(), "kernel" in mapped.split()
    how: dict[str, Any] = {n: jnp.full(3, k) for n, k in KEEPS.items()}
    if "keeps" in mapped:
        how = {"weight_keep": jnp.array([3, 50, 108]), "activation_keep": jnp.array([180, 7, 90])}
    elif mapped == "limits":
        limits = jnp.array([0.0, 2.0, 3.0])
        how = {"weight_threshold": limits, "activation_threshold": limits[::-1]}
    axes = (0 if over_x else None, 0 if over_kernel else None, 0, 0)
    f = jax.vmap(lambda x, kernel, dy, how: gradients(x, kernel, dy, **how), axes)
    actual = jax.jit(f)(x if over_x else x[0], kernel if over_kernel else kernel[0], dy, how)
    for i in range(3):
        expected = compiled_gradients(
            x[i if over_x else 0],
            kernel[i if over_kernel else 0],
            dy[i],
            **{name: value[i] for name, value in how.items()},
        )
        assert_trees_equal(jax.tree.map(lambda leaf, i=i: leaf[i], actual), expected)


def test_vmap_of_linear_is_the_loop():
    x, kernel = integers((3, 5, 6)), integers((6, 4), salt=1)

    f = jax.value_and_grad(
        lambda x, k: jnp.sum(swat_linear(x, k, weight_keep=9, activation_keep=11) ** 2), (0, 1)
    )
    actual = jax.jit(jax.vmap(f, (0, None)))(x, kernel)
    one = jax.jit(f)
    for i in range(3):
        assert_trees_equal(jax.tree.map(lambda leaf, i=i: leaf[i], actual), one(x[i], kernel))


def layer(x, kernel):
    return swat_conv(x, kernel, weight_keep=9, activation_keep=40)


def stack_inputs():
    return integers((1, 5, 5, 2), levels=1), integers((3, 3, 3, 2, 2), salt=1, levels=2)


def test_scan_over_layers_is_the_loop():
    x, kernels = stack_inputs()

    def scanned(x, kernels):
        y, _ = jax.lax.scan(lambda x, kernel: (layer(x, kernel), None), x, kernels)
        return jnp.sum(y)

    def looped(x, kernels):
        for kernel in kernels:
            x = layer(x, kernel)
        return jnp.sum(x)

    actual = jax.jit(jax.value_and_grad(scanned, (0, 1)))(x, kernels)
    expected = jax.jit(jax.value_and_grad(looped, (0, 1)))(x, kernels)
    assert_trees_equal(actual, expected)
    assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(expected))


@pytest.mark.parametrize("jitted", [False, True])
def test_remat_changes_nothing(jitted):
    x, kernels = stack_inputs()

    def run(layer, x, kernels):
        for kernel in (kernels[0], kernels[1]):
            x = layer(x, kernel)
        return jnp.sum(x)

    plain = jax.value_and_grad(functools.partial(run, layer), (0, 1))
    again = jax.value_and_grad(functools.partial(run, jax.checkpoint(layer)), (0, 1))
    actual = (jax.jit(again) if jitted else again)(x, kernels)
    assert_trees_equal(actual, jax.jit(plain)(x, kernels))


def test_a_bias_outside_has_a_dense_gradient():
    x, kernel, dy = values()
    bias = jnp.zeros(4)

    def biased(bias):
        return jnp.vdot(conv(x, kernel, weight_keep=1, activation_keep=1) + bias, dy)

    np.testing.assert_array_equal(jax.grad(biased)(bias), np.asarray(dy).sum((0, 1, 2)))


def test_what_is_kept_waits_for_the_incoming_gradient():
    """Without the tie XLA may keep the dense tensors and make the sparse ones from them later."""
    x, kernel, dy = values()
    text = str(jax.make_jaxpr(lambda x, k, dy: gradients(x, k, dy, **KEEPS))(x, kernel, dy))
    assert "optimization_barrier" in text


# --- shard_map ----------


def mesh_of(devices):
    return jax.make_mesh((len(devices),), ("data",), (AxisType.Auto,), devices=devices)


SPLIT, WHOLE = PartitionSpec("data"), PartitionSpec()
SELECTIONS: dict[str, dict[str, Any]] = {
    "count": KEEPS,
    "threshold": {"weight_threshold": 2.0, "activation_threshold": 3.0},
}


@functools.cache
def one_device(selection: str):
    """Loss, input gradient and kernel gradient, shard by shard: top-K is per device."""
    x, kernel, dy = values(4)
    one = jax.jit(functools.partial(gradients, **SELECTIONS[selection]))
    parts = [one(x[i], kernel[0], dy[i]) for i in range(4)]
    return (
        sum(np.asarray(part[0]) for part in parts),
        np.concatenate([part[1][0] for part in parts]),
        sum(np.asarray(part[1][1]) for part in parts),
    )


def sharded_values():
    x, kernel, dy = values(4)
    return x.reshape(8, *x.shape[2:]), kernel[0], dy.reshape(8, *dy.shape[2:])


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("check_vma", [True, False])
def test_gradients_taken_inside_shard_map(fake_devices, check_vma, selection):
    """With check_vma JAX sums the replicated kernel's gradient over devices; else psum does."""

    def step(x, kernel, dy):
        value, (dx, dkernel) = gradients(x, kernel, dy, **SELECTIONS[selection])
        if not check_vma:
            dkernel = jax.lax.psum(dkernel, "data")
        return jax.lax.psum(value, "data"), dx, dkernel

    sharded = jax.shard_map(
        step,
        mesh=mesh_of(fake_devices),
        in_specs=(SPLIT, WHOLE, SPLIT),
        out_specs=(WHOLE, SPLIT, WHOLE),
        check_vma=check_vma,
    )
    assert_trees_equal(jax.jit(sharded)(*sharded_values()), one_device(selection))


@pytest.mark.parametrize("check_vma", [True, False])
def test_gradients_taken_through_shard_map(fake_devices, check_vma):
    def total(x, kernel, dy):
        return jax.lax.psum(loss(x, kernel, dy, **KEEPS), "data")

    sharded = jax.shard_map(
        total,
        mesh=mesh_of(fake_devices),
        in_specs=(SPLIT, WHOLE, SPLIT),
        out_specs=WHOLE,
        check_vma=check_vma,
    )
    value, (dx, dkernel) = jax.jit(jax.value_and_grad(sharded, (0, 1)))(*sharded_values())
    assert_trees_equal((value, dx, dkernel), one_device("count"))


@pytest.mark.parametrize("check_vma", [True, False])
def test_counts_and_thresholds_of_each_device(fake_devices, check_vma):
    """A traced count may differ by device, and so may a threshold that was found on its shard."""
    x, kernel, dy = sharded_values()
    keeps = jnp.array([1, 20, 100, 180])

    def step(x, kernel, dy, keep):
        limit = top_k.threshold(x, keep[0])
        one = gradients(x, kernel, dy, weight_keep=20, activation_keep=keep[0])
        two = gradients(x, kernel, dy, weight_keep=20, activation_threshold=limit)
        packed = packing.pack(x, limit, x.size)
        three = gradients(x, kernel, dy, weight_keep=20, packed=packed)
        kernels = [result[1][1] for result in (one, two, three)]
        if not check_vma:
            kernels = jax.lax.psum(kernels, "data")
        return kernels

    sharded = jax.shard_map(
        step,
        mesh=mesh_of(fake_devices),
        in_specs=(SPLIT, WHOLE, SPLIT, SPLIT),
        out_specs=WHOLE,
        check_vma=check_vma,
    )
    expected = sum(
        np.asarray(
            compiled_gradients(
                x[2 * i : 2 * i + 2],
                kernel,
                dy[2 * i : 2 * i + 2],
                weight_keep=20,
                activation_keep=int(keeps[i]),
            )[1][1]
        )
        for i in range(4)
    )
    for actual in jax.jit(sharded)(x, kernel, dy, keeps):
        np.testing.assert_array_equal(actual, expected)


def test_linear_inside_shard_map(fake_devices):
    x, kernel = integers((8, 6)), integers((6, 3), salt=1)

    def f(x, kernel):
        return jax.grad(
            lambda x, k: jnp.sum(swat_linear(x, k, weight_keep=9, activation_keep=5) ** 2), (0, 1)
        )(x, kernel)

    sharded = jax.shard_map(
        f, mesh=mesh_of(fake_devices), in_specs=(SPLIT, WHOLE), out_specs=(SPLIT, WHOLE)
    )
    dx, dkernel = jax.jit(sharded)(x, kernel)
    one = jax.jit(f)
    parts = [one(x[2 * i : 2 * i + 2], kernel) for i in range(4)]
    np.testing.assert_array_equal(dx, np.concatenate([p[0] for p in parts]))
    np.testing.assert_array_equal(dkernel, sum(np.asarray(p[1]) for p in parts))
