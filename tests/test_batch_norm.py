"""`batch_norm_relu` against autodiff of the same thing written out, and `BatchNormRelu`."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from swat_jax.dropout import Dropout
from swat_jax.errors import UsageError
from swat_jax.functional import batch_norm_relu
from swat_jax.layers import SwatConv
from swat_jax.norm_relu import BatchNormRelu, NormRelu
from swat_jax.sparsity import packing

EPSILON = 1e-5
SHAPE = (4, 5, 5, 6)


def written_out(x, scale, bias, residual, relu, statistics):
    axes = (0, 1, 2)
    mean, variance = statistics or (jnp.mean(x, axes), jnp.var(x, axes))
    y = (x - mean) / jnp.sqrt(variance + EPSILON) * scale + bias
    if residual is not None:
        y = y + residual
    return jnp.maximum(y, 0) if relu else y


def operands() -> tuple[Any, ...]:
    keys = jax.random.split(jax.random.key(0), 7)
    x, residual, *dys = (jax.random.normal(key, SHAPE) for key in keys[:5])
    scale, bias = (jax.random.normal(key, SHAPE[-1:]) for key in keys[5:])
    return x, residual, dys, scale, bias


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("constant", [True, False])
def test_values_and_gradients(relu, adds, constant):
    """Two readers and the input passed on; float32, bound 2e-5 of the largest value."""
    x, residual, dys, scale, bias = operands()
    statistics = (jnp.full(6, 0.1), jnp.full(6, 1.3)) if constant else None
    given = (x, scale, bias, *((residual,) if adds else ()))

    def fused(x, scale, bias, residual=None):
        options: dict[str, Any] = {"relu": relu, "statistics": statistics, "epsilon": EPSILON}
        out = batch_norm_relu(
            x, scale, bias, residual=residual, readers=2, returns_input=True, **options
        )
        return *out.y, out.x

    def plain(x, scale, bias, residual=None):
        y = written_out(x, scale, bias, residual, relu, statistics)
        return y, y, x

    @jax.jit
    def both(given):
        results = []
        for function in (fused, plain):
            values, pullback = jax.vjp(function, *given)
            results.append((values, pullback(tuple(dys))))
        return results

    found, wanted = both(given)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * float(jnp.max(jnp.abs(b))))


def test_bfloat16_is_rounded_once():
    x, residual, _, scale, bias = operands()
    x, residual = x.astype(jnp.bfloat16), residual.astype(jnp.bfloat16)
    found = jax.jit(lambda: batch_norm_relu(x, scale, bias, residual=residual).y[0])()
    wide = written_out(x.astype(jnp.float32), scale, bias, residual.astype(jnp.float32), True, None)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), wide, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_layer_equals_stock(training):
    x = 3 + 2 * jax.random.normal(jax.random.key(0), SHAPE)

    def run(kind):
        layer = kind(6, momentum=0.9, rngs=nnx.Rngs(0))
        layer.train() if training else layer.eval()
        y = layer(x, dense=True).dense
        return y, nnx.state(layer)

    found, wanted = jax.jit(lambda: (run(BatchNormRelu), run(NormRelu)))()
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("readers", [1, 2])
def test_dropout_after_the_relu(readers):
    x, _, dys, scale, bias = operands()
    flags = jax.random.bernoulli(jax.random.key(9), 0.6, SHAPE)

    def fused(x, scale, bias):
        out = batch_norm_relu(
            x, scale, bias, epsilon=EPSILON, readers=readers, returns_input=True,
            kept=packing.to_bitmap(flags), dropout_rate=0.4,
        )  # fmt: skip
        return *out.y, out.x

    def plain(x, scale, bias):
        y = jnp.where(flags, written_out(x, scale, bias, None, True, None) / 0.6, 0)
        return *(y,) * readers, x

    results = []
    for function in (fused, plain):
        values, pullback = jax.vjp(function, x, scale, bias)
        results.append(jax.tree.leaves((values, pullback(tuple(dys[: readers + 1])))))
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * float(jnp.max(jnp.abs(b))))
    # Beside its input and vectors one bit per value, which says what passes.
    residuals = jax.tree.leaves(jax.vjp(fused, x, scale, bias)[1])
    bits = [leaf for leaf in residuals if leaf.dtype == jnp.uint32]
    assert [leaf.size for leaf in bits] == [packing.bitmap_words(x.size)]
    assert sum(leaf.size == x.size for leaf in residuals) == 1


def test_dropout_is_refused_beside_a_residual_and_without_relu():
    x, residual, _, scale, bias = operands()
    kept = packing.to_bitmap(jnp.ones(SHAPE, bool))
    with pytest.raises(UsageError, match="kept must be None where there is a residual, or no ReLU"):
        batch_norm_relu(x, scale, bias, residual=residual, kept=kept, dropout_rate=0.5)
    with pytest.raises(UsageError, match="kept must be None where there is a residual, or no ReLU"):
        batch_norm_relu(x, scale, bias, relu=False, kept=kept, dropout_rate=0.5)
    with pytest.raises(UsageError, match=r"dropout_rate must be at least 0 and below 1, got 1\.0"):
        batch_norm_relu(x, scale, bias, kept=kept, dropout_rate=1.0)
    with pytest.raises(UsageError, match=r"dropout_rate must be 0 where kept is None, got 0\.5"):
        batch_norm_relu(x, scale, bias, dropout_rate=0.5)
    flags = jnp.ones(x.size, bool)
    for wrong in (flags, kept[1:], kept.astype(jnp.uint8), jnp.ones(SHAPE, bool)):
        with pytest.raises(UsageError, match=r"kept must be a bitmap of x, uint32\[19\]; got"):
            batch_norm_relu(x, scale, bias, kept=wrong, dropout_rate=0.5)


@pytest.mark.parametrize("rests", ["deterministic", "rate 0"])
def test_a_dropout_layer_that_rests_leaves_one_pass(rests):
    dropout = Dropout(0.0 if rests == "rate 0" else 0.5, rngs=nnx.Rngs(0))
    dropout.deterministic = rests == "deterministic"
    reader = SwatConv(6, 4, (1, 1), weight_sparsity=0.5, pack=True, rngs=nnx.Rngs(1))
    layer = BatchNormRelu(6, rngs=nnx.Rngs(0))
    for one in (reader, layer):
        one.train()
    x = operands()[0]

    def branch(*_: Any, **__: Any) -> None:
        raise AssertionError("packed in a pass of its own")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("swat_jax.norm_relu.branch", branch)
        out = layer(x, readers=[reader], dropout=dropout)
    assert out.readers[0].packed is not None


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dropout", [Dropout, nnx.Dropout])
@pytest.mark.parametrize("adds", [True, False])
def test_layer_with_dropout_equals_stock(training, dropout, adds, monkeypatch):
    """Whether the pass drops, what the layer draws for it, or the dropout layer afterwards."""
    x, residual, *_ = operands()
    reader = SwatConv(6, 4, (1, 1), weight_sparsity=0.5, pack=True, rngs=nnx.Rngs(1))

    def run(kind, dropout):
        layer, drop = kind(6, rngs=nnx.Rngs(0)), dropout(0.3, rngs=nnx.Rngs(2))
        for one in (layer, drop, reader):
            one.train() if training else one.eval()
        out = layer(
            x, residual if adds else None, readers=[reader], dense=True, before=True, dropout=drop
        )
        return out.readers[0].x, out.dense, out.before, nnx.state(drop), out.readers[0].packed

    if training and dropout is Dropout and not adds:
        # The stock side drops what the pass draws.
        kept = packing.from_bitmap(Dropout(0.3, rngs=nnx.Rngs(2)).draw(x.size), x.size)
        monkeypatch.setattr(jax.random, "bernoulli", lambda *_, **__: kept.reshape(x.shape))
    *found, packed = run(BatchNormRelu, dropout)
    *wanted, _ = run(NormRelu, nnx.Dropout)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        if jnp.issubdtype(b.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert (packed is not None) == training
    if training:
        assert 0.2 < float(jnp.mean(wanted[1] == 0)) < 0.8
        largest = jnp.sort(jnp.abs(found[1]).ravel())[-found[1].size // 2]
        np.testing.assert_array_equal(
            packing.unpack(packed), jnp.where(jnp.abs(found[1]) >= largest, found[1], 0)
        )


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("adds", [True, False])
def test_statistics_over_four_devices_are_those_of_the_whole_batch(fake_devices, adds, check_vma):
    x, residual, dys, scale, bias = operands()
    mesh = jax.make_mesh((4,), ("data",), (AxisType.Auto,), devices=fake_devices[:4])

    def results(x, residual, dy, scale, bias, axis_name=None):
        def run(x, residual, scale, bias):
            out = batch_norm_relu(
                x, scale, bias, residual=residual if adds else None, axis_name=axis_name
            )
            return out.y[0], (out.mean, out.variance)

        y, pullback, statistics = jax.vjp(run, x, residual, scale, bias, has_aux=True)
        dx, dresidual, dscale, dbias = pullback(dy)
        if axis_name and not check_vma:  # else JAX sums the gradients of what all devices have
            dscale, dbias = jax.lax.psum((dscale, dbias), axis_name)
        return y, dx, dresidual, dscale, dbias, statistics

    split, whole = PartitionSpec("data"), PartitionSpec()
    sharded = jax.shard_map(
        functools.partial(results, axis_name="data"),
        mesh=mesh,
        in_specs=(split, split, split, whole, whole),
        out_specs=(split, split, split, whole, whole, whole),
        check_vma=check_vma,
    )
    found = jax.jit(sharded)(x, residual, dys[0], scale, bias)
    wanted = jax.jit(results)(x, residual, dys[0], scale, bias)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5 * np.abs(other).max() + 1e-6)
