"""SWAT convolution, linear product and batch norm: the only place with gradient rules.

For weights ``W``, input ``x`` and output gradient ``dY``, with masks by top-K magnitude:

* forward: ``Y = conv(x, W * mask(W))``; the input is dense;
* kept for the backward pass: ``x * mask(x)`` and ``W * mask(W)``, nothing dense;
* input gradient: ``conv_transpose(dY, W * mask(W))``;
* weight gradient: ``corr(x * mask(x), dY)``, dense: masked weights get gradients too, so that
  they can come back.

A bias is added outside, so its gradient is dense.

Between two products, `batch_norm_relu` makes the dense input of the next product together with its
packed form. It keeps its own input and, after an addition, one bit per value; the product keeps the
packed form. So nobody keeps the dense activation.

XLA would bring it back: it fuses packing into the backward pass, or unpacks early. Every backward
rule therefore first ties what it kept to the gradient that comes in, as `jax.checkpoint` does.

Source: SWAT (Raihan & Aamodt, NeurIPS 2020), section 3 and algorithm 1.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from swat_jax import kernels
from swat_jax.algorithms import PLAIN, Algorithms, run
from swat_jax.batch_norm import Vectors
from swat_jax.candidates import Problem
from swat_jax.convolution import Convolution
from swat_jax.errors import UsageError
from swat_jax.max_pool import Pool
from swat_jax.sparsity import granularity as granularities
from swat_jax.sparsity import packing, top_k
from swat_jax.sparsity.packing import Packed
from swat_jax.sparsity.top_k import Count
from swat_jax.sparsity.varying import varying_like

Padding = str | Sequence[tuple[int, int]]
Precision = Any  # what `jax.lax` takes; it has no public name for it


def swat_conv(
    x: jax.Array,
    kernel: jax.Array,
    *,
    weight_sparsity: float | None = None,
    activation_sparsity: float | None = None,
    weight_keep: Count | None = None,
    activation_keep: Count | None = None,
    strides: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    input_dilation: int | Sequence[int] = 1,
    kernel_dilation: int | Sequence[int] = 1,
    feature_group_count: int = 1,
    granularity: str = "unstructured",
    weight_threshold: jax.Array | float | None = None,
    activation_threshold: jax.Array | float | None = None,
    packed: Packed | None = None,
    capacity: int | None = None,
    precision: Precision = None,
    preferred_element_type: Any = None,
    algorithms: Algorithms = PLAIN,
) -> jax.Array:
    """Convolution with sparse weights, whose backward pass has sparse weights and activations.

    How many values are kept is given as a sparsity, as a count (possibly traced), or, for a
    threshold that is reused, as the threshold. A given threshold is used as it is; without one
    the exact threshold is computed now.

    Args:
      x: (N, *spatial, in) floats, one to three spatial axes (NHWC for two).
      kernel: (*window, in / groups, out) floats (HWIO for two spatial axes). May be of a wider
        type than ``x``: the mask is taken from it as it is, the product is computed in the type
        of ``x``, and its gradient has the type of ``kernel``.
      weight_sparsity: fraction of the weights that is zero, in ``[0, 1)``.
      activation_sparsity: fraction of ``x`` that is zero in the weight gradient, in ``[0, 1)``.
      weight_keep: in place of the sparsity: how many units (see ``granularity``) are kept.
      activation_keep: in place of the sparsity: how many values of ``x`` are kept.
      strides: of the window, one number or one per spatial axis.
      padding: as `jax.lax.conv_general_dilated` takes it.
      input_dilation: as ``lhs_dilation`` there.
      kernel_dilation: as ``rhs_dilation`` there.
      feature_group_count: as there.
      granularity: what the weight mask selects, see `swat_jax.sparsity.granularity`.
      weight_threshold: smallest score that is kept.
      activation_threshold: smallest magnitude that is kept.
      packed: the sparse form of ``x``, if it was made before; the backward pass then uses of
        it what reaches ``activation_threshold``. Give both as `batch_norm_relu` or `kernels.select`
        returned them: what they pack may be a little more than is kept. Without a threshold all
        that was packed is used.
      capacity: how many values of ``x`` are kept in packed form, at least 1: the backward pass
        then has them from a `Packed` that is made here. None: they are kept as a dense array with
        zeros.
      precision: as in `jax.lax.conv_general_dilated`.
      preferred_element_type: as there.
      algorithms: what computes the three products, see `swat_jax.algorithms`. What one of them does
        not take is computed in the plain way; a warning says so once.

    Returns:
      (N, *spatial, out) of the type of ``x``, or of ``preferred_element_type``.

    Raises:
      UsageError: if shapes do not fit, a sparsity or count is out of range, or one is missing.

    Example:
      >>> x, kernel = jnp.ones((1, 8, 8, 3)), jnp.ones((3, 3, 3, 16))
      >>> swat_conv(x, kernel, weight_sparsity=0.9, activation_sparsity=0.9).shape
      (1, 8, 8, 16)
    """
    spatial = x.ndim - 2
    if not 1 <= spatial <= 3 or kernel.ndim != x.ndim:
        raise UsageError(
            "x and kernel must both have rank 3, 4 or 5: (N, *spatial, in) and "
            f"(*window, in, out); got shapes {x.shape} and {kernel.shape}"
        )
    groups = feature_group_count
    if groups < 1 or x.shape[-1] != kernel.shape[-2] * groups or kernel.shape[-1] % groups:
        raise UsageError(
            f"kernel {kernel.shape} does not fit x {x.shape} with feature_group_count {groups}: "
            "needs kernel.shape[-2] * groups == x.shape[-1] and whole groups of outputs"
        )
    conv = Convolution(
        strides=_per_axis(strides, spatial, "strides"),
        padding=_padding(padding, spatial),
        input_dilation=_per_axis(input_dilation, spatial, "input_dilation"),
        kernel_dilation=_per_axis(kernel_dilation, spatial, "kernel_dilation"),
        feature_group_count=groups,
        precision=precision,
        preferred_element_type=preferred_element_type,
        folds=kernels.folds(x.dtype),
    )
    _check_floats("kernel", kernel)
    units = granularities.units(kernel.shape, granularity)
    weights = _selection("weight", weight_sparsity, weight_keep, weight_threshold, units)
    activations = _activation_selection(
        x, packed, activation_sparsity, activation_keep, activation_threshold
    )
    is_packed = packed is not None or capacity is not None
    problem = Problem(conv, x.shape, kernel.shape, x.dtype, granularity, is_packed)
    rule = _Rule(conv, granularity, kernel.dtype, capacity, problem, algorithms)
    return _swat_product(rule, x, kernel, packed, weights, activations)


def swat_linear(
    x: jax.Array,
    kernel: jax.Array,
    *,
    weight_sparsity: float | None = None,
    activation_sparsity: float | None = None,
    weight_keep: Count | None = None,
    activation_keep: Count | None = None,
    weight_threshold: jax.Array | float | None = None,
    activation_threshold: jax.Array | float | None = None,
    packed: Packed | None = None,
    capacity: int | None = None,
    precision: Precision = None,
    preferred_element_type: Any = None,
    algorithms: Algorithms = PLAIN,
) -> jax.Array:
    """Matrix product with sparse weights, by the rules of `swat_conv`.

    Args:
      x: (..., in) floats.
      kernel: (in, out) floats, possibly of a wider type; masks are unstructured.
      weight_sparsity: fraction of the weights that is zero, in ``[0, 1)``.
      activation_sparsity: fraction of ``x`` that is zero in the weight gradient, in ``[0, 1)``.
      weight_keep: in place of the sparsity: how many weights are kept.
      activation_keep: in place of the sparsity: how many values of ``x`` are kept.
      weight_threshold: smallest magnitude of a weight that is kept.
      activation_threshold: smallest magnitude of ``x`` that is kept.
      packed: the sparse form of ``x``, if it was made before; the backward pass then uses of
        it what reaches ``activation_threshold``. Give both as `batch_norm_relu` or `kernels.select`
        returned them: what they pack may be a little more than is kept. Without a threshold all
        that was packed is used.
      capacity: how many values of ``x`` are kept in packed form, at least 1: the backward pass
        then has them from a `Packed` that is made here. None: they are kept as a dense array with
        zeros.
      precision: as in `jax.lax.dot_general`.
      preferred_element_type: as there.
      algorithms: what computes the three products, as in `swat_conv`: that of a 1x1 convolution.

    Returns:
      (..., out).

    Raises:
      UsageError: if shapes do not fit, a sparsity or count is out of range, or one is missing.

    Example:
      >>> swat_linear(jnp.ones((4, 8)), jnp.ones((8, 2)), weight_sparsity=0.5,
      ...             activation_sparsity=0.5).shape
      (4, 2)
    """
    if kernel.ndim != 2 or x.ndim < 1 or x.shape[-1] != kernel.shape[0]:
        raise UsageError(
            "x must be (..., in) and kernel (in, out) with the same in; "
            f"got shapes {x.shape} and {kernel.shape}"
        )
    _check_floats("kernel", kernel)
    product = _MatrixProduct(precision, preferred_element_type)
    weights = _selection("weight", weight_sparsity, weight_keep, weight_threshold, kernel.size)
    activations = _activation_selection(
        x, packed, activation_sparsity, activation_keep, activation_threshold
    )
    problem = Problem.linear(
        x.shape,
        kernel.shape,
        x.dtype,
        is_packed=packed is not None or capacity is not None,
        precision=precision,
        preferred_element_type=preferred_element_type,
    )
    rule = _Rule(product, "unstructured", kernel.dtype, capacity, problem, algorithms)
    return _swat_product(rule, x, kernel, packed, weights, activations)


@dataclasses.dataclass(frozen=True)
class _MatrixProduct:
    """``x @ kernel`` over the last axis of ``x``, linear in both, and hashable."""

    precision: Precision
    preferred_element_type: Any

    def __call__(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.dot_general(
            x,
            kernel,
            (((x.ndim - 1,), (0,)), ((), ())),
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
        )


class _Selection(NamedTuple):
    """What to keep of a tensor: everything (both None), a number of values, or by threshold."""

    keep: jax.Array | None
    threshold: jax.Array | None


def _selection(
    name: str,
    sparsity: float | None,
    keep: Count | None,
    threshold: jax.Array | float | None,
    size: int,
) -> _Selection:
    """Checks what was asked for and brings it into one form."""
    if sparsity is not None and keep is not None:
        raise UsageError(f"give {name}_sparsity or {name}_keep, not both: {sparsity}, {keep}")
    if isinstance(keep, np.integer):
        keep = int(keep)
    if sparsity is not None:
        keep = top_k.keep_count(sparsity, size, argument=f"{name}_sparsity")
    elif isinstance(keep, int) and not 1 <= keep <= size:
        raise UsageError(f"{name}_keep must be in [1, {size}], got {keep}")
    if threshold is not None:
        return _Selection(None, jnp.asarray(threshold))
    if keep is None:
        raise UsageError(f"give {name}_sparsity, {name}_keep or {name}_threshold")
    if isinstance(keep, int):
        if keep == size:
            return _Selection(None, None)
        keep = jnp.uint32(keep) if size < 2**31 else jnp.asarray(top_k.split_count(keep))
    return _Selection(keep, None)


def _activation_selection(
    x: jax.Array,
    packed: Packed | None,
    sparsity: float | None,
    keep: Count | None,
    threshold: jax.Array | float | None,
) -> _Selection:
    _check_floats("x", x)
    if packed is None:
        return _selection("activation", sparsity, keep, threshold, x.size)
    if packed.shape != x.shape or packed.dtype != x.dtype:
        raise UsageError(
            f"packed must hold x, {x.dtype}{list(x.shape)}; "
            f"it holds {packed.dtype}{list(packed.shape)}"
        )
    return _Selection(None, None if threshold is None else jnp.asarray(threshold))


def _swat_product(
    rule: _Rule,
    x: jax.Array,
    kernel: jax.Array,
    packed: Packed | None,
    weights: _Selection,
    activations: _Selection,
) -> jax.Array:
    capacity = rule.capacity
    if capacity is not None and (isinstance(capacity, bool) or capacity < 1):
        raise UsageError(f"capacity must be a whole number of values >= 1, got {capacity!r}")
    rule = dataclasses.replace(rule, algorithms=rule.algorithms.accepted(rule.problem))
    # In `shard_map` every operand must vary as the others do; the cast's transpose sums a
    # replicated kernel's gradient over the devices.
    everything = (x, kernel, packed, weights, activations)
    x, kernel, packed, weights, activations = jax.tree.map(
        lambda leaf: varying_like(leaf, everything), everything
    )
    return _product(rule, x, kernel, packed, weights, activations)


@dataclasses.dataclass(frozen=True)
class _Rule:
    product: Convolution | _MatrixProduct
    granularity: str
    kernel_dtype: Any
    capacity: int | None
    problem: Problem
    algorithms: Algorithms  # that take the problem

    def masked_weights(self, kernel: jax.Array, keep: _Selection, dtype: Any) -> jax.Array:
        if keep == (None, None):
            return kernel.astype(dtype)
        limit = keep.threshold
        if limit is None:
            assert keep.keep is not None
            limit = kernels.threshold(granularities.score(kernel, self.granularity), keep.keep)
        return granularities.masked_weights(kernel, self.granularity, limit).astype(dtype)

    def forward(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        if self.algorithms.is_plain("forward"):
            return self.product(x, kernel)
        y = jax.eval_shape(self.product, x, kernel)
        return self._run("forward", self._pixels(x), self._window(kernel)).reshape(y.shape)

    def input_gradient(self, x: Any, kernel: jax.Array, dy: jax.Array) -> jax.Array:
        """Of ``x`` only shape and type matter: the product is linear in it."""
        if self.algorithms.is_plain("input_gradient"):
            (dx,) = jax.linear_transpose(lambda value: self.product(value, kernel), x)(dy)
            return dx
        dx = self._run("input_gradient", self._pixels(dy), self._window(kernel))
        return dx.reshape(x.shape)

    def weight_gradient(
        self, x: jax.Array | Packed, least: jax.Array | None, kernel: jax.Array, dy: jax.Array
    ) -> jax.Array:
        if isinstance(x, Packed):
            packed = dataclasses.replace(x, shape=self.problem.x)
            dw = self._run("weight_gradient", packed, least, self._pixels(dy))
            return dw.reshape(kernel.shape)
        (dw,) = jax.linear_transpose(lambda value: self.product(x, value), kernel)(dy)
        return kernels.settled_gradient(dw)

    def _run(self, op: str, *operands: Any) -> jax.Array:
        return run(op, self.algorithms[op], self.problem, *operands)

    def _pixels(self, x: jax.Array) -> jax.Array:
        """An input or output, of a linear layer as the problem has it."""
        return x.reshape(-1, 1, 1, x.shape[-1]) if self.problem.is_linear else x

    def _window(self, kernel: jax.Array) -> jax.Array:
        return kernel.reshape(self.problem.kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(
    rule: _Rule,
    x: jax.Array,
    kernel: jax.Array,
    packed: Packed | None,
    weights: _Selection,
    activations: _Selection,
) -> jax.Array:
    del packed, activations  # only the backward pass needs them
    return rule.forward(x, rule.masked_weights(kernel, weights, x.dtype))


class _Residuals(NamedTuple):
    x: jax.Array | Packed  # zero off the mask
    least: jax.Array | None  # of a packed x: what is smaller is off the mask too
    kernel: jax.Array  # zero off the mask, in the type of x


def _product_forward(
    rule: _Rule,
    x: jax.Array,
    kernel: jax.Array,
    packed: Packed | None,
    weights: _Selection,
    activations: _Selection,
) -> tuple[jax.Array, _Residuals]:
    masked = rule.masked_weights(kernel, weights, x.dtype)
    y = rule.forward(x, masked)
    if packed is not None:
        return y, _Residuals(packed, activations.threshold, masked)
    if activations == (None, None):
        return y, _Residuals(x, None, masked)
    limit = activations.threshold
    if limit is None:
        assert activations.keep is not None
        limit = kernels.threshold(x, activations.keep)
    if rule.capacity is None:
        return y, _Residuals(kernels.sparsify(x, limit), None, masked)
    return y, _Residuals(kernels.pack(x, limit, rule.capacity), None, masked)


def _product_backward(
    rule: _Rule, residuals: _Residuals, dy: jax.Array
) -> tuple[jax.Array, jax.Array, None, None, None]:
    # The barrier keeps XLA from making the sparse residual early and keeping a dense copy.
    residuals, dy = lax.optimization_barrier((residuals, dy))
    x, least, kernel = residuals
    if isinstance(x, Packed) and rule.algorithms.is_plain("weight_gradient"):
        x = kernels.unpack(x, least)
    dense = jax.eval_shape(packing.unpack, x) if isinstance(x, Packed) else x
    dx = rule.input_gradient(dense, kernel, dy)
    dw = rule.weight_gradient(x, least, kernel, dy)
    return dx, dw.astype(rule.kernel_dtype), None, None, None


_product.defvjp(_product_forward, _product_backward)


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
    _check_floats("x", x)
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
    _check_rate("dropout_rate", dropout_rate)
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


def _check_floats(name: str, value: jax.Array) -> None:
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise UsageError(f"{name} must be an array of floats, got {value.dtype}")


def _padding(padding: Padding, axes: int) -> str | tuple[tuple[int, int], ...]:
    if isinstance(padding, str):
        if padding.upper() in ("SAME", "SAME_LOWER", "VALID"):
            return padding.upper()
    elif isinstance(padding, Sequence) and len(padding) == axes:
        pairs = [tuple(pair) for pair in padding if isinstance(pair, Sequence)]
        if len(pairs) == axes and all(len(pair) == 2 for pair in pairs):
            return tuple((int(low), int(high)) for low, high in pairs)
    raise UsageError(
        f"padding must be 'SAME', 'SAME_LOWER', 'VALID' or {axes} pairs (low, high), one per "
        f"spatial axis; got {padding!r}"
    )


def _per_axis(value: int | Sequence[int], count: int, name: str) -> tuple[int, ...]:
    axes = value if isinstance(value, Sequence | np.ndarray) else (value,) * count
    try:
        whole = tuple(operator.index(axis) for axis in axes)
    except TypeError:
        whole = ()
    if len(whole) != count or min(whole, default=1) < 1:
        raise UsageError(
            f"{name} must be one whole number >= 1 or {count} of them (one per spatial axis), "
            f"got {value!r}"
        )
    return whole


def max_pool(
    x: jax.Array,
    window_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    padding: Padding = "VALID",
) -> jax.Array:
    """Max pooling that keeps for its backward pass which value won, not the values.

    Args:
      x: (N, *spatial, channels) floats.
      window_shape: one number per spatial axis, at most 255 positions in all.
      strides: likewise; None: 1.
      padding: as `jax.lax.reduce_window` takes it, without batch and channels. It never wins.

    Returns:
      (N, *spatial, channels). Of equal values the first gets the gradient.

    Example:
      >>> max_pool(jnp.arange(4.0).reshape(1, 2, 2, 1), (2, 2)).item()
      3.0
    """
    _check_floats("x", x)
    window = tuple(window_shape)
    if len(window) != x.ndim - 2 or not 1 <= math.prod(window) <= 255:
        raise UsageError(
            f"window_shape must have one number per spatial axis of x {x.shape}, and at most 255 "
            f"positions; got {window}"
        )
    steps = _per_axis(1 if strides is None else strides, len(window), "strides")
    pairs = _padding(padding, len(window))
    if isinstance(pairs, str):
        pairs = lax.padtype_to_pads(x.shape[1:-1], window, steps, pairs)
    return _max_pool(Pool(window, steps, tuple((int(a), int(b)) for a, b in pairs), x.shape), x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _max_pool(pool: Pool, x: jax.Array) -> jax.Array:
    return pool.pool(x)


def _max_pool_forward(pool: Pool, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return pool.pool(x), pool.winner(x)


def _max_pool_backward(pool: Pool, winner: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
    return (kernels.max_pool_gradient(pool, *lax.optimization_barrier((winner, dy))),)


_max_pool.defvjp(_max_pool_forward, _max_pool_backward)


def dropout(x: jax.Array, key: jax.Array, rate: float) -> jax.Array:
    """Dropout that keeps one bit per value for its backward pass.

    The key alone would be less to keep, but to draw again costs more than to read a bit.

    Args:
      x: floats of any shape.
      key: what the mask is drawn from; of the same key `flax.nnx.Dropout` draws the same mask.
      rate: the fraction that becomes 0, at least 0 and below 1; what is left is divided by
        ``1 - rate``.

    Example:
      >>> round(float(jnp.mean(dropout(jnp.ones(10_000), jax.random.key(0), 0.5) == 0)), 1)
      0.5

    Source: Srivastava et al., "Dropout", 2014.
    """
    _check_floats("x", x)
    _check_rate("rate", rate)
    return _dropout(1 - rate, x, jax.random.bernoulli(key, 1 - rate, x.shape))


def draw_kept(key: jax.Array, rate: float, size: int) -> jax.Array:
    """Which of ``size`` values dropout keeps, as the bitmap that `batch_norm_relu` takes.

    Other values than `dropout` keeps with this key: these take less time to draw (`dropout_bits`).

    Args:
      key: what it is drawn from.
      rate: the fraction that becomes 0, at least 0 and below 1, rounded to a multiple of 2**-16.
      size: how many values there are.
    """
    _check_rate("rate", rate)
    return kernels.draw_kept(key, rate, size)


def _check_rate(name: str, rate: float) -> None:
    if not 0 <= rate < 1:
        raise UsageError(f"{name} must be at least 0 and below 1, got {rate}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dropout(share: float, x: jax.Array, kept: jax.Array) -> jax.Array:
    return jnp.where(kept, x / share, jnp.zeros_like(x))


def _dropout_forward(share: float, x: jax.Array, kept: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _dropout(share, x, kept), packing.to_bitmap(kept)


def _dropout_backward(share: float, bitmap: jax.Array, dy: jax.Array) -> tuple[jax.Array, None]:
    bitmap, dy = lax.optimization_barrier((bitmap, dy))
    kept = packing.from_bitmap(bitmap, dy.size).reshape(dy.shape)
    return _dropout(share, dy, kept), None


_dropout.defvjp(_dropout_forward, _dropout_backward)
