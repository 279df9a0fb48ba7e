"""SWAT in models that know nothing of it: Conv and Linear layers of any Flax NNX model, replaced.

::

    model = swat_jax.sparsify(MyModel(rngs=nnx.Rngs(0)), sparsity=0.9, dense="stem")
    optimizer = nnx.Optimizer(model, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer, x, labels):
        loss, grads = nnx.value_and_grad(lambda model: loss_of(model(x), labels))(model)
        optimizer.update(model, grads)
        return loss

    model.eval()                                         # exact masks, dense activations
    export.save("net.safetensors", model)                # the hard-pruned weights
    export.load_into("net.safetensors", MyModel(rngs=nnx.Rngs(0)))    # into stock layers
    plain = swat_jax.densify(model, prune=True)          # the same without a file

`export` is `swat_jax.export`. On a GPU, ``with swat_jax.layers.find_weight_thresholds(model):``
around the model's call in training finds the thresholds of all layers in one kernel.

A layer becomes a SWAT layer in its place: its class changes, and the settings of
`swat_jax.layer_base` are added. What refers to it, and what it holds, stays.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from jax import lax

from swat_jax import kernels
from swat_jax.errors import UsageError
from swat_jax.layer_base import SPARSE_ATTRIBUTES, keep_kernel_dtype
from swat_jax.layers import SwatConv, SwatLinear
from swat_jax.sparsity import granularity as granularities
from swat_jax.sparsity import top_k
from swat_jax.sparsity.per_layer import Filter, LayerSparsity, Override, Request, told

Model = TypeVar("Model", bound=nnx.Module)

# The product that a stock layer calls: what a SWAT layer has in its place.
_PRODUCTS: dict[type[nnx.Module], tuple[str, Any]] = {
    nnx.Conv: ("conv_general_dilated", lax.conv_general_dilated),
    nnx.Linear: ("dot_general", lax.dot_general),
}
_CHANGE_KERNELS = (nnx.WeightNorm, nnx.SpectralNorm)
NO_SWAT_FORM = (nnx.ConvTranspose, nnx.LinearGeneral, nnx.Einsum, nnx.bridge.ToNNX)


def sparsify(
    model: Model,
    *,
    sparsity: float,
    activation_sparsity: float | None = None,
    distribution: str = "uniform",
    granularity: str = "unstructured",
    threshold_every_steps: int = 1,
    dense: str | Sequence[str] = (),
    filter: Filter = None,  # noqa: A002 - what it is, and what nnx calls it
    overrides: Mapping[str, Override] | None = None,
    pack: bool | None = None,
) -> Model:
    """A copy of a model whose `nnx.Conv` and `nnx.Linear` layers are SWAT layers.

    Parameters and all else stay as they are, bit for bit and with their metadata; arrays are shared
    with ``model``, not copied, so neither may be donated while the other is in use. Modules that
    are shared stay shared. Subclasses of `nnx.Conv` and `nnx.Linear` become subclasses of
    themselves as long as they leave the call to Flax. SWAT layers that are there already get new
    settings.

    What cannot be a SWAT layer is left as it is, and named with the reason in one warning: layers
    with a call, a product or a mask of their own or that share a kernel, stacks of layers that
    would need state, `nnx.ConvTranspose`, `nnx.LinearGeneral`, `nnx.Einsum`. What ``filter`` leaves
    out is not mentioned.

    Where the model computes with a layer's kernel itself, besides calling the layer or instead, it
    uses the master weights: that is not seen, it trains dense, and is pruned all the same.
    `swat_jax.summary` names layers that are never called; leave such layers out by ``filter``.

    The new layers are in training mode: call ``model.eval()`` for exact masks and dense
    activations, and ``model.train()``. A ``deterministic=`` that is an argument of the model's call
    does not reach them.

    Paths are those of `nnx.iter_modules`, such as ``stage1/0/conv1`` (`swat_jax.summary` prints
    them in the order of execution), or any other of a shared module; patterns are those of
    `swat_jax.patterns`.

    Args:
      model: any NNX model; it stays as it is.
      sparsity: fraction of zeros in the weights, in ``[0, 1)``; under "erk" that of all
        layers together.
      activation_sparsity: fraction of zeros in the saved inputs; None: that of the weights.
      distribution: ``uniform`` (SWAT-U), ``erk`` (SWAT-ERK), or ``momentum`` (SWAT-M), whose
        budgets `swat_jax.update_with_budgets` moves at every step.
      granularity: ``unstructured``, ``channel`` or ``filter``, for convolutions; linear layers
        are unstructured.
      threshold_every_steps: steps between recomputed thresholds; 1 is exact SWAT.
      dense: patterns of layers that stay dense. By default nobody is: the paper keeps the first
        convolution dense under "uniform", so name it here.
      filter: patterns of the layers that become sparse, or a function ``(path, layer) -> bool``;
        None: all that can.
      overrides: pattern -> a sparsity, or a mapping with some of ``weight_sparsity``,
        ``activation_sparsity``, ``granularity``, ``threshold_every_steps``. Of several patterns
        that fit a layer the last one counts, and what it says comes before ``dense``. Layers whose
        sparsity it says are in no distribution: the others alone meet ``sparsity``.
      pack: whether saved inputs are packed; None: where `kernels.packs()` says so, but not under
        "momentum".

    Raises:
      UsageError: a value out of range, a pattern that fits no layer, no layer that can be sparse.

    Example:
      >>> import swat_jax
      >>> model = nnx.Sequential(
      ...     nnx.Conv(3, 16, (3, 3), rngs=nnx.Rngs(0)), nnx.relu,
      ...     nnx.Conv(16, 32, (3, 3), rngs=nnx.Rngs(1)))
      >>> sparse = swat_jax.sparsify(model, sparsity=0.9, dense="layers/0")
      >>> sparse.layers[2].weight_sparsity, type(sparse.layers[0]).__name__
      (0.9, 'Conv')
      >>> sparse(jnp.ones((1, 8, 8, 3))).shape
      (1, 8, 8, 32)

    Source: SWAT (Raihan & Aamodt, NeurIPS 2020), section 3.
    """
    request = Request(
        sparsity=sparsity,
        activation_sparsity=activation_sparsity,
        distribution=distribution,
        granularity=granularity,
        threshold_every_steps=threshold_every_steps,
        dense=dense,
        filter=filter,
        overrides=overrides,
    )
    if pack is None:
        # A budget that moves may come to keep all of an input: with room for that, none is saved.
        pack = kernels.packs() and distribution != "momentum"
    model = nnx.clone(model)
    layers = {_text(path): module for path, module in nnx.iter_modules(model)}
    users = _users(layers.values())
    layers = {path: layer for path, layer in layers.items() if _is_candidate(layer)}
    if not layers:
        raise UsageError("model has no layer that could be sparse: no nnx.Conv and no nnx.Linear")
    also = _other_paths(model)
    layers = {path: layers[path] for path in request.chosen(layers, also)}
    wanted, left = _plan(request, layers, users, also)
    if left:
        warnings.warn(f"left as they are: {told(left)}", UserWarning, stacklevel=2)
    for path, settings in wanted.items():
        _make_sparse(layers[path], settings, pack)
    return model


def densify(model: Model, *, prune: bool = False) -> Model:
    """A copy of a model whose SWAT layers are stock layers: what `sparsify` was given.

    Args:
      model: with SWAT layers anywhere in it, made by `sparsify` or by hand; it stays as it is.
      prune: False: kernels are the master weights, all of them. True: they have exact zeros off
        their masks, so that the stock model computes what ``model`` does after ``model.eval()``
        (but where it reads kernels itself: see `sparsify`).

    Returns:
      The copy, which shares its arrays with ``model``.

    Raises:
      UsageError: a SWAT layer of a class of its own; kernels to be pruned in a stack whose axis is
        not the first.

    Example:
      >>> import swat_jax
      >>> sparse = swat_jax.sparsify(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), sparsity=0.75)
      >>> plain = swat_jax.densify(sparse, prune=True)
      >>> type(plain).__name__, int((plain.kernel[...] != 0).sum())
      ('Linear', 8)
    """
    model = nnx.clone(model)
    for path, layer in nnx.iter_modules(model):
        if isinstance(layer, SwatConv | SwatLinear):
            if _is_own_class(layer):
                raise UsageError(
                    f"model: the class {type(layer).__name__} of {_text(path) or 'the model'} is "
                    "not made by sparsify; there is no stock layer for it"
                )
            if prune:
                _prune(layer)
            _make_dense(layer)
    return model


def _plan(
    request: Request,
    layers: Mapping[str, Any],
    users: Mapping[int, Sequence[nnx.Module]],
    also: Mapping[str, str],
) -> tuple[dict[str, LayerSparsity], dict[str, str]]:
    """The settings of all layers that can be sparse, and why the others cannot."""
    reasons = {path: _why_not(layer, users) for path, layer in layers.items()}
    while True:
        left = {path: why for path, why in reasons.items() if why}
        shapes = {path: kernel_shape(layers[path]) for path in layers if path not in left}
        if not shapes:
            why = told(left) if left else "filter takes none"
            raise UsageError(f"model has no layer that can be sparse: {why}")
        wanted = request.per_layer(shapes, left, also)
        # Those that lack room for state are in no distribution either.
        late = {path: _why_no_state(layers[path], one) for path, one in wanted.items()}
        if not any(late.values()):
            return wanted, left
        reasons |= late


def _text(path: Sequence[Any]) -> str:
    return "/".join(map(str, path))


def _other_paths(model: nnx.Module) -> dict[str, str]:
    """The further paths of shared modules, and of what is in them -> the one that NNX gives."""
    names = {path: path for path, _ in nnx.iter_modules(model)}
    for first, *others in nnx.find_duplicates(model):
        for path, known in list(names.items()):
            if path[: len(first)] == first:
                names |= {(*other, *path[len(first) :]): known for other in others}
    return {_text(path): _text(known) for path, known in names.items() if path != known}


def _is_candidate(layer: nnx.Module) -> bool:
    return isinstance(layer, (nnx.Conv, nnx.Linear, *NO_SWAT_FORM))


def _is_sparse(layer: Any) -> bool:
    return isinstance(layer, SwatConv | SwatLinear)


def _stock_of(layer: nnx.Module | type[nnx.Module]) -> type[nnx.Module]:
    kind = layer if isinstance(layer, type) else type(layer)
    return nnx.Conv if issubclass(kind, nnx.Conv) else nnx.Linear


def _users(modules: Iterable[nnx.Module]) -> Mapping[int, list[nnx.Module]]:
    """Who has a variable, and who changes all that a layer has, by id of the variable or layer."""
    users: dict[int, list[nnx.Module]] = defaultdict(list)
    for module in modules:
        for held in vars(module).values():
            if isinstance(held, nnx.Variable):
                users[id(held)].append(module)
        if isinstance(module, _CHANGE_KERNELS):
            users[id(module.layer_instance)].append(module)
    return users


def _why_not(layer: Any, users: Mapping[int, Sequence[nnx.Module]]) -> str:
    """Why a layer cannot be a SWAT layer; empty if it can.

    Args:
      layer: one that `_is_candidate`.
      users: from `_users`.
    """
    name = type(layer).__name__
    if isinstance(layer, NO_SWAT_FORM):
        if isinstance(layer, nnx.bridge.ToNNX):
            return "it is a Linen module: see swat_jax.linen"
        return f"{name} has no SWAT form"
    if not isinstance(layer.kernel, nnx.Variable) or not hasattr(layer.kernel, "get_value"):
        return "its kernel is no variable"
    kernel = layer.kernel.get_value()
    shape = kernel_shape(layer)
    if not hasattr(kernel, "dtype") or not jnp.issubdtype(kernel.dtype, jnp.floating):
        return "its kernel is no array of floats"
    if kernel.size == 0 or not 2 <= len(shape) <= 5:
        return f"its kernel has the shape {kernel.shape}"
    if getattr(layer, "mask", None) is not None:
        return "it has a mask of its own"
    if len(users[id(layer.kernel)]) > 1:
        return "it shares its kernel with another layer"
    if users[id(layer)]:
        return f"{type(users[id(layer)][0]).__name__} changes its kernel"
    if isinstance(layer, SwatConv | SwatLinear):
        return f"its class {name} is a SWAT layer of its own make" if _is_own_class(layer) else ""
    stock = _stock_of(layer)
    own = [name for name in SPARSE_ATTRIBUTES if name in vars(layer)]
    if own:
        return f"it has an attribute {own[0]} of its own, which SWAT layers have, too"
    product, default = _PRODUCTS[stock]
    for method in ("__call__", product):
        if getattr(type(layer), method, None) is not getattr(stock, method, None):
            return f"its class {name} has a {method} of its own"
    if getattr(layer, product) is not default:
        return f"it has a {product} of its own"
    return ""


def _why_no_state(layer: Any, settings: LayerSparsity) -> str:
    """Why a layer cannot have the state that its settings need; empty if it can."""
    stateful = settings.dynamic_budget or (
        settings.threshold_every_steps > 1 and _stock_of(layer) is nnx.Conv
    )
    if stateful and layer.kernel.get_value().shape != kernel_shape(layer):
        return "it is a stack of layers, which has no budget and no thresholds to reuse"
    return ""


def _is_own_class(layer: SwatConv | SwatLinear) -> bool:
    """Whether somebody derived from a SWAT layer."""
    return type(layer) not in (SwatConv, SwatLinear) and "stock" not in vars(type(layer))


def kernel_shape(layer: Any) -> tuple[int, ...]:
    """Of one layer, where ``layer`` is a stack of them."""
    present = layer.kernel.get_value().shape
    shape = (layer.in_features, layer.out_features)
    if isinstance(layer, nnx.Conv):
        inputs = layer.in_features // layer.feature_group_count
        shape = (*layer.kernel_size, inputs, layer.out_features)
    return present if len(present) == len(shape) else shape


@functools.cache
def _sparse_class(stock: type[nnx.Module]) -> type[Any]:
    """The SWAT layer that also is a ``stock``; the same one every time, as `jax.jit` needs it."""
    base = SwatConv if issubclass(stock, nnx.Conv) else SwatLinear
    if stock in _PRODUCTS:
        return base
    name = f"Swat{stock.__name__}"
    facts = {"__module__": stock.__module__, "__qualname__": name, "stock": stock}
    return types.new_class(name, (base, stock), exec_body=lambda body: body.update(facts))


def _make_sparse(layer: Any, settings: LayerSparsity, pack: bool) -> None:
    """Turns a layer into a SWAT layer, or gives new settings to one; dense ones are stock."""
    if _is_sparse(layer):
        _make_dense(layer)
    if settings.is_dense:
        return
    product, _ = _PRODUCTS[_stock_of(layer)]
    delattr(layer, product)
    object.__setattr__(layer, "__class__", _sparse_class(type(layer)))
    # The stock function would round the kernel before its mask is taken.
    if layer.promote_dtype is dtypes.promote_dtype:
        layer.promote_dtype = keep_kernel_dtype
    layer.start(pack=pack, **dataclasses.asdict(settings))


def _make_dense(layer: Any) -> None:
    """Turns a SWAT layer into the stock layer that it replaced."""
    for name in SPARSE_ATTRIBUTES:
        delattr(layer, name)
    object.__setattr__(layer, "__class__", getattr(layer, "stock", _stock_of(layer)))
    product, default = _PRODUCTS[_stock_of(layer)]
    setattr(layer, product, default)
    if layer.promote_dtype is keep_kernel_dtype:
        layer.promote_dtype = dtypes.promote_dtype


def _prune(layer: Any) -> None:
    """Sets the weights of a SWAT layer to zero where its exact mask is off."""
    keep = None if layer.weight_budget is None else layer.weight_budget[...]
    if keep is None:
        units = granularities.units(kernel_shape(layer), layer.granularity)
        keep = top_k.keep_count(layer.weight_sparsity, units)
    kernel = layer.kernel.get_value()
    pruned = granularities.pruned(kernel, kernel_shape(layer), layer.granularity, keep)
    layer.kernel = layer.kernel.replace(pruned)
