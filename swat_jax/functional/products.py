"""Convolution and linear product with masked weights and masked saved activations."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from swat_jax import kernels
from swat_jax.algorithms import PLAIN, Algorithms, run
from swat_jax.candidates import Problem
from swat_jax.convolution import Convolution
from swat_jax.errors import UsageError
from swat_jax.functional.arguments import Padding, Precision, as_padding, check_floats, per_axis
from swat_jax.sparsity import granularity as granularities
from swat_jax.sparsity import packing, top_k
from swat_jax.sparsity.packing import Packed
from swat_jax.sparsity.top_k import Count
from swat_jax.sparsity.varying import varying_like


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
        strides=per_axis(strides, spatial, "strides"),
        padding=as_padding(padding, spatial),
        input_dilation=per_axis(input_dilation, spatial, "input_dilation"),
        kernel_dilation=per_axis(kernel_dilation, spatial, "kernel_dilation"),
        feature_group_count=groups,
        precision=precision,
        preferred_element_type=preferred_element_type,
        folds=kernels.folds(x.dtype),
    )
    check_floats("kernel", kernel)
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
    check_floats("kernel", kernel)
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
    check_floats("x", x)
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
