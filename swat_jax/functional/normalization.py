"""Batch norm with ReLU, that keeps its input and hands on what it made in packed form."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from swat_jax import kernels
from swat_jax.batch_norm import Vectors
from swat_jax.errors import UsageError
from swat_jax.functional.arguments import check_floats, check_rate
from swat_jax.sparsity import packing
from swat_jax.sparsity.packing import Packed
from swat_jax.sparsity.varying import varying_like


class BatchNormOutput(NamedTuple):
    """What `batch_norm_relu` returns.

    Attributes:
      y: the result, once for every reader that was asked for.
      x: the input again, if that was asked for, else None.
      mean: (channels,) of the batch; no gradient flows through it.
      variance: (channels,), biased; likewise.
      packed: the packed form of the result, or None. It may hold a little more than was selected:
        whoever reads it leaves out what is below its threshold.
      thresholds: float32, one per selection, or None.
    """

    y: tuple[jax.Array, ...]
    x: jax.Array | None
    mean: jax.Array
    variance: jax.Array
    packed: Packed | None
    thresholds: jax.Array | None


def batch_norm_relu(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    *,
    residual: jax.Array | None = None,
    relu: bool = True,
    epsilon: float = 1e-5,
    statistics: tuple[jax.Array, jax.Array] | None = None,
    axis_name: str | None = None,
    readers: int = 1,
    returns_input: bool = False,
    kept: jax.Array | None = None,
    dropout_rate: float = 0.0,
    selection: kernels.Selection | None = None,
) -> BatchNormOutput:
    """Batch norm, addition and ReLU, with the packed form that the next products keep.

    After the ReLU there may be dropout, in the same pass.

    Args:
      x: (..., channels) floats.
      scale: (channels,).
      bias: (channels,).
      residual: added before the ReLU, of the shape and type of ``x``; or None.
      relu: whether negative values become 0.
      epsilon: added to the variance.
      statistics: mean and variance to use as constants (for evaluation); None: those of ``x``.
      axis_name: mapped axis over which statistics are averaged.
      readers: how often the result is returned. Whoever reads it takes one of its own: their
        gradients then meet inside the backward passes and need no addition of their own.
      returns_input: whether ``x`` is returned too, for a shortcut that branches off before the
        norm; its gradient then joins in the same way.
      kept: which values dropout keeps, a bitmap (`swat_jax.sparsity.packing.to_bitmap`); not
        beside a residual, and only after a ReLU. None: no dropout.
      dropout_rate: the fraction that it drops on average; what is left is divided by
        ``1 - dropout_rate``.
      selection: what is packed, if anything.

    Returns:
      See `BatchNormOutput`.

    Raises:
      UsageError: if shapes or types do not fit.

    Example:
      >>> out = batch_norm_relu(jnp.ones((2, 4, 4, 8)), jnp.ones(8), jnp.zeros(8))
      >>> out.y[0].shape
      (2, 4, 4, 8)

    Source: Ioffe and Szegedy, "Batch normalization", 2015.
    """
    check_floats("x", x)
    channels = x.shape[-1:]
    vectors = {"scale": scale, "bias": bias}
    if statistics is not None:
        vectors |= {"statistics[0]": statistics[0], "statistics[1]": statistics[1]}
    for name, vector in vectors.items():
        if x.ndim < 2 or vector.shape != channels:
            raise UsageError(
                f"{name} must have the shape (channels,) for x (..., channels); "
                f"got {vector.shape} for {x.shape}"
            )
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise UsageError(
            f"residual must be like x, {x.dtype}{list(x.shape)}; "
            f"got {residual.dtype}{list(residual.shape)}"
        )
    if readers < 1:
        raise UsageError(f"readers must be at least 1, got {readers}")
    if kept is not None and (residual is not None or not relu):
        raise UsageError("kept must be None where there is a residual, or no ReLU")
    words = (packing.bitmap_words(x.size),)
    if kept is not None and (kept.shape != words or kept.dtype != jnp.uint32):
        raise UsageError(
            f"kept must be a bitmap of x, uint32{list(words)}; got {kept.dtype}{list(kept.shape)}"
        )
    check_rate("dropout_rate", dropout_rate)
    if kept is None and dropout_rate:
        raise UsageError(f"dropout_rate must be 0 where kept is None, got {dropout_rate}")
    rule = _NormRule(
        relu=relu,
        epsilon=epsilon,
        axis_name=axis_name,
        readers=readers,
        returns_input=returns_input,
        adds=residual is not None,
        constant=statistics is not None,
        drops=kept is not None,
        dropout_rate=dropout_rate,
    )
    operands = (x, scale, bias, residual, statistics, kept, selection)
    return _batch_norm_relu(
        rule, *jax.tree.map(lambda leaf: varying_like(leaf, operands), operands)
    )


@dataclasses.dataclass(frozen=True)
class _NormRule:
    relu: bool
    epsilon: float
    axis_name: str | None
    readers: int
    returns_input: bool
    adds: bool  # whether there is a residual
    constant: bool  # whether mean and variance were given
    drops: bool  # whether there is dropout
    dropout_rate: float

    @property
    def kept_factor(self) -> float:
        return 1 / (1 - self.dropout_rate) if self.drops else 1.0


class _NormResiduals(NamedTuple):
    x: jax.Array
    positive: jax.Array | None  # bitmap, where the sign cannot be found again from x
    vectors: Vectors


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _batch_norm_relu(
    rule: _NormRule,
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    residual: jax.Array | None,
    statistics: tuple[jax.Array, jax.Array] | None,
    kept: jax.Array | None,
    selection: kernels.Selection | None,
) -> BatchNormOutput:
    return _norm_forward(rule, x, scale, bias, residual, statistics, kept, selection)[0]


def _norm_forward(
    rule: _NormRule,
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    residual: jax.Array | None,
    statistics: tuple[jax.Array, jax.Array] | None,
    kept: jax.Array | None,
    selection: kernels.Selection | None,
) -> tuple[BatchNormOutput, _NormResiduals]:
    if statistics is None:
        mean, variance = kernels.batch_norm_statistics(x)
        if rule.axis_name is not None:
            # Of all devices: the mean of the means, and what the means add to the variances.
            everywhere = lax.pmean(mean, rule.axis_name)
            variance = lax.pmean(variance + jnp.square(mean - everywhere), rule.axis_name)
            mean = everywhere
    else:
        mean, variance = statistics
    vectors = Vectors(mean, variance, scale, bias)
    result = kernels.batch_norm_relu(
        x,
        vectors,
        residual,
        epsilon=rule.epsilon,
        relu=rule.relu,
        # Of what was dropped they say that nothing passes.
        keeps_signs=rule.relu and (rule.adds or rule.drops),
        kept=kept,
        kept_factor=rule.kept_factor,
        selection=selection,
    )
    output = BatchNormOutput(
        y=(result.y,) * rule.readers,
        x=x if rule.returns_input else None,
        mean=mean,
        variance=variance,
        packed=result.packed,
        thresholds=result.thresholds,
    )
    return output, _NormResiduals(x, result.positive, vectors)


def _norm_backward(
    rule: _NormRule, residuals: _NormResiduals, output: BatchNormOutput
) -> tuple[Any, ...]:
    residuals, dys, through = lax.optimization_barrier((residuals, output.y, output.x))
    x, positive, vectors = residuals
    # Of several gradients one is made, once, which is that of the residual too; and what dropout
    # passes is found once.
    merges = rule.adds or rule.drops or len(dys) > 1
    total, moment, dz = kernels.batch_norm_gradient_sums(
        x,
        dys,
        positive,
        vectors,
        epsilon=rule.epsilon,
        relu=rule.relu,
        keeps_dz=merges,
        factor=rule.kept_factor,
    )
    count, sums = x.size // x.shape[-1], (total, moment)
    if rule.constant:
        sums = (jnp.zeros_like(total), jnp.zeros_like(moment))
    elif rule.axis_name is not None:
        sums = lax.psum(sums, rule.axis_name)
        count *= lax.axis_size(rule.axis_name)
    dx = kernels.batch_norm_gradient(
        x,
        dys[0] if dz is None else dz,
        vectors,
        sums,
        through,
        epsilon=rule.epsilon,
        relu=rule.relu and not merges,
        count=count,
    )
    dscale = moment.astype(vectors.scale.dtype)
    dbias = total.astype(vectors.bias.dtype)
    return dx, dscale, dbias, dz if rule.adds else None, None, None, None


_batch_norm_relu.defvjp(_norm_forward, _norm_backward)
