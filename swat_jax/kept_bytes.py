"""What each layer of a network keeps for its backward pass, in bytes, by tracing a forward pass.

An array that two layers keep exists once: it counts for the first of them in execution order, and
the other one shares it.

**Dense**, stock Flax, is what XLA cannot do without, and not the longer list that differentiation
alone would save. In the backward pass XLA makes values again that follow from kept ones without a
product. It makes no product again, and no input of one, which has to lie in memory whole:

* a conv or linear layer keeps its input, and its weights in the type that it computes in (not the
  first layer: nobody needs the gradient of images);
* batch norm keeps its input, which conv, addition or concatenation made, and a mean and a variance
  for every channel;
* ReLU and max pooling keep nothing: what they need is the input of the next layer, or is made again
  from what batch norm keeps;
* dropout keeps which values it dropped, one byte each.

**SWAT** is what the gradient rules of `swat_jax.functional` keep, where activations are packed:

* a conv or linear layer keeps its packed input: room for the values, bitmap, offsets and one number
  for the overflow; and its threshold. Layers that read one value share its packed form. What is not
  sparse (the input of the first layer in uniform methods) or not sparse enough to be packed takes
  its full size;
* its weights after masking, in the type that it computes in;
* batch norm keeps the same as in a dense network and, after an addition, one bit per value;
* max pooling keeps which value won, one byte per result;
* dropout keeps which values it dropped, or which pass in the backward pass, one bit each.

Weights that are neither masked nor converted are the parameter itself and cost nothing. Not counted
are parameters, their gradients and the state of the optimizer; what the loss keeps, a few values
per image and class; the signs of ReLUs that follow no batch norm, one byte per value (VGG's two
hidden linear layers); and what a step needs for a moment only.

With parameters, momentum and the batch added, both counts are less than 2 % below the peaks that
were measured for ResNet-50 on an NVIDIA H200 (batch 256, bfloat16).
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from swat_jax import build, functional, method
from swat_jax.abstract_call import abstract_call
from swat_jax.activations import Activation
from swat_jax.dropout import Dropout
from swat_jax.errors import UsageError
from swat_jax.layers import SwatConv, SwatLinear
from swat_jax.norm_relu import BatchNormRelu
from swat_jax.sparsity import packing

_LONGEST_WHAT = "packed input, shared"


@dataclasses.dataclass(frozen=True)
class Kept:
    """What one use of a layer keeps for its backward pass.

    Attributes:
      path: where the layer sits in the network, such as `stage2/0/conv1`.
      kind: "conv", "linear", "norm", "max_pool" or "dropout".
      what: is kept of its activations, in words.
      activations: bytes of that.
      weights: bytes of its weights.
    """

    path: str
    kind: str
    what: str
    activations: int
    weights: int = 0


def dense(
    config: Any, *, num_classes: int, image_shape: tuple[int, int, int], batch_size: int
) -> list[Kept]:
    """What the network of a config keeps if its layers are stock Flax, in execution order.

    Args:
      config: with the keys of `swat_jax.recipe.base`.
      num_classes: width of the output.
      image_shape: (H, W, C) of one image.
      batch_size: how many images one device takes in a step.

    Raises:
      UsageError: no such network or precision, or images that are too small.
    """
    build.check(config)
    return _trace_config(build.build_dense, config, num_classes, image_shape, batch_size)


def swat(
    config: Any, *, num_classes: int, image_shape: tuple[int, int, int], batch_size: int
) -> list[Kept]:
    """What the network of a config keeps with the kernels, whether there are any here or not.

    Activations are packed as `swat_jax.build.packs` has it.

    Args:
      config: see `dense`; its method is a sparse one.
      num_classes: see `dense`.
      image_shape: see `dense`.
      batch_size: see `dense`.

    Raises:
      UsageError: see `dense`; or the config forbids packing.
    """
    for key in ("sparsity.pack", "model.fused_batch_norm"):
        section, name = key.split(".")
        if config[section][name] is False:
            raise UsageError(
                f"config.{key} must not be False for a count of bytes: without packing XLA decides "
                "what is kept"
            )
    packed = copy.deepcopy(config)
    packed.model.fused_batch_norm = True
    packed.sparsity.pack = build.packs(packed.sparsity, by_default=True)
    return _trace_config(build.build, packed, num_classes, image_shape, batch_size)


def _trace_config(
    make: Callable[..., nnx.Module],
    config: Any,
    num_classes: int,
    image_shape: tuple[int, int, int],
    batch_size: int,
) -> list[Kept]:
    # Averages over devices need devices, and change nothing of what is kept.
    alone = copy.deepcopy(config)
    alone.sync_batch_norm = False
    facts = {"num_classes": num_classes, "image_shape": image_shape}
    model = nnx.eval_shape(lambda: make(alone, **facts, rngs=nnx.Rngs(0)))
    return trace(model, (batch_size, *image_shape), build.PRECISIONS[config.precision])


def report(
    config: Any, *, num_classes: int, image_shape: tuple[int, int, int], batch_size: int
) -> dict[str, Any]:
    """`dense` and `swat` of a config side by side, ready for JSON.

    Args:
      config: see `dense`. For the method "dense" there is no part called "swat".
      num_classes: see `dense`.
      image_shape: see `dense`.
      batch_size: see `dense`.
    """
    facts = {"num_classes": num_classes, "image_shape": image_shape, "batch_size": batch_size}
    networks = {"dense": dense(config, **facts)}
    if config.sparsity.distribution != "dense":
        networks["swat"] = swat(config, **facts)
    layers = []
    for uses in zip(*networks.values(), strict=True):
        layer: dict[str, Any] = {"path": uses[0].path, "kind": uses[0].kind}
        for name, kept in zip(networks, uses, strict=True):
            assert kept.path == layer["path"]
            sizes = {"activations": kept.activations, "weights": kept.weights}
            layer[name] = {"what": kept.what, **sizes}
        layers.append(layer)
    return {
        "network": config.model.name,
        "method": method.label(config.sparsity),
        "precision": config.precision,
        "batch_size": batch_size,
        **{name: _totals(uses) for name, uses in networks.items()},
        "layers": layers,
    }


def _totals(uses: Sequence[Kept]) -> dict[str, int]:
    activations, weights = sum(x.activations for x in uses), sum(x.weights for x in uses)
    return {"activations": activations, "weights": weights, "bytes": activations + weights}


def render(result: Mapping[str, Any]) -> str:
    """`report` as text: what it is about, one line a layer, then the totals."""
    labels = {"dense": "dense", "swat": result["method"]}
    labels = {name: label for name, label in labels.items() if name in result}
    packed = f", and of {labels['swat']} as it is with the kernels" if "swat" in labels else ""
    about = (
        f"kept for the backward pass of {result['network']}, dense{packed}, in bytes:"
        f" {result['batch_size']} images on one device, {result['precision']}"
    )
    width = max(len(layer["path"]) for layer in result["layers"])
    head = f"{'layer':{width}}"
    columns = {name: max(len(label), len(_LONGEST_WHAT)) for name, label in labels.items()}
    for name, label in labels.items():
        head += f"  {label:{columns[name]}}  {'activations':>14}  {'weights':>11}"
    lines = [about, "", head]
    for layer in result["layers"]:
        line = f"{layer['path']:{width}}"
        for name in labels:
            kept = layer[name]
            line += f"  {kept['what']:{columns[name]}}"
            line += f"  {kept['activations']:>14,}  {kept['weights']:>11,}"
        lines.append(line)
    lines.append("")
    width = max(map(len, labels.values()))
    for name, label in labels.items():
        mib = {key: f"{size / 2**20:,.1f}" for key, size in result[name].items()}
        share = result[name]["bytes"] / result["dense"]["bytes"]
        lines.append(
            f"{label:{width}}  {mib['bytes']:>8} MiB: {mib['activations']} of activations,"
            f" {mib['weights']} of weights" + ("" if name == "dense" else f"; {share:.2f} of dense")
        )
    return "\n".join(lines)


def trace(model: nnx.Module, shape: Sequence[int], dtype: Any = jnp.float32) -> list[Kept]:
    """What the layers of a model keep in a step of training, in execution order.

    Nothing is computed: the model is traced abstractly. It may be abstract itself
    (`nnx.eval_shape`); it is not changed.

    Args:
      model: any NNX model of SWAT layers or stock ones, called with one batch. Batch norm has to
        be followed by an addition and ReLU as `swat_jax.norm_relu` has them, if by any.
      shape: (N, ..., channels) of the batch.
      dtype: of the batch.

    Example:
      >>> from swat_jax import models
      >>> model = models.create("resnet8", num_classes=10, in_channels=1, rngs=nnx.Rngs(0))
      >>> trace(model, (2, 8, 8, 1))[0]
      Kept(path='stem', kind='conv', what='input', activations=512, weights=0)
    """
    return trace_call(model, jax.ShapeDtypeStruct(tuple(shape), dtype))


def trace_call(model: nnx.Module, *args: Any, **kwargs: Any) -> list[Kept]:
    """`trace` of a model that is called with other things than one batch of images.

    Args:
      model: see there.
      args: of the call, see `swat_jax.abstract_call`.
      kwargs: of the call.
    """
    records: list[Kept] = []

    def observe(traced: Any, inputs: Sequence[jax.Array]) -> None:
        traced.train()
        _Observer(records, inputs).observe(traced)

    abstract_call(model, observe, args, kwargs)
    return records


class _Observer:
    """Notes what layers keep while their model is called.

    Inside one trace the same array is the same object, which tells what is shared.
    """

    def __init__(self, records: list[Kept], inputs: Sequence[jax.Array]) -> None:
        self._records = records
        self._inputs = inputs
        self._paths: dict[int, str] = {}  # of dropout layers, by id
        self._seen: dict[int, jax.Array] = {}  # by id, which is taken as long as they are here

    def observe(self, model: nnx.Module) -> None:
        """Changes the model, so that its layers report what they are called with."""
        for parts, module in nnx.iter_modules(model):
            path = "/".join(map(str, parts))
            if isinstance(module, nnx.Conv | nnx.Linear):
                _before_calls(module, path, self._product)
            elif isinstance(module, nnx.BatchNorm):
                _before_calls(module, path, self._norm)
            elif isinstance(module, nnx.Dropout):
                self._paths[id(module)] = path
                _before_calls(module, path, self._dropout)
            elif hasattr(module, "max_pool"):
                any_module: Any = module
                pool_path = f"{path}/max_pool" if path else "max_pool"
                any_module.max_pool = self._observed_pool(any_module.max_pool, pool_path)

    def _product(
        self, path: str, layer: Any, inputs: jax.Array | Activation, *_: Any, **__: Any
    ) -> None:
        given = inputs if isinstance(inputs, Activation) else Activation(inputs)
        kernel = layer.kernel[...]
        x = given.x.astype(layer.dtype or jnp.result_type(given.x, kernel))
        weights = kernel.size * x.dtype.itemsize
        if isinstance(layer, SwatConv | SwatLinear):
            what, activations = self._swat_input(layer, given, x)
            masks = layer.weight_budget is not None or layer.weight_sparsity > 0
            needs_weights = True
        else:
            what, activations = self._once("input", x)
            masks, needs_weights = False, all(given.x is not one for one in self._inputs)
        if not needs_weights or (not masks and kernel.dtype == x.dtype):
            weights = 0
        kind = "conv" if isinstance(layer, nnx.Conv) else "linear"
        self._records.append(Kept(path, kind, what, activations, weights))

    def _swat_input(self, layer: Any, given: Activation, x: jax.Array) -> tuple[str, int]:
        """As `swat_jax.functional` decides it, and `swat_jax.layer_base` asks for it."""
        if given.packed is not None:
            what, activations = self._once("packed input", given.packed)
            return what, activations + _bytes(given.threshold)
        if layer.packs:
            room = layer.activation_capacity(x.size)
            limit = jnp.zeros((), jnp.promote_types(x.dtype, jnp.float32))
            packed = jax.eval_shape(lambda: packing.pack(x, limit, room))
            return "packed input", _bytes(packed) + _bytes(limit)
        if layer.weight_budget is not None or layer.activation_sparsity > 0:
            return "input with zeros", _bytes(x)
        return self._once("input", x)

    def _norm(
        self,
        path: str,
        layer: Any,
        x: jax.Array,
        residual: jax.Array | None = None,
        *_: Any,
        relu: bool = True,
        dropout: Any = None,
        **__: Any,
    ) -> None:
        x = x.astype(layer.dtype or x.dtype)
        what, activations = self._once("input", x)
        if isinstance(layer, BatchNormRelu) and relu and residual is not None:
            what += ", signs"
            activations += 4 * packing.bitmap_words(x.size)
        statistics = 2 * x.shape[-1] * jnp.promote_types(x.dtype, jnp.float32).itemsize
        self._records.append(Kept(path, "norm", what, activations + statistics))
        if isinstance(layer, BatchNormRelu) and layer.fuses(dropout, residual, relu):
            # The dropout layer is not called.
            self._dropout(self._paths.get(id(dropout), path), dropout, x)

    def _dropout(self, path: str, layer: Any, inputs: jax.Array, *_: Any, **__: Any) -> None:
        if 0 < layer.rate < 1:
            is_bitmap = isinstance(layer, Dropout)
            size = 4 * packing.bitmap_words(inputs.size) if is_bitmap else inputs.size
            self._records.append(Kept(path, "dropout", "what was dropped", size))

    def _observed_pool(self, pool: Callable[..., jax.Array], path: str) -> Callable[..., jax.Array]:
        def max_pool(x: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
            y = pool(x, *args, **kwargs)
            swat = pool is functional.max_pool
            what, activations = ("winners", y.size) if swat else ("nothing", 0)
            self._records.append(Kept(path, "max_pool", what, activations))
            return y

        return max_pool

    def _once(self, what: str, tree: Any) -> tuple[str, int]:
        """What it is called, and the bytes of those arrays that are not kept already."""
        new = {id(leaf): leaf for leaf in jax.tree.leaves(tree) if id(leaf) not in self._seen}
        self._seen |= new
        return (what, _bytes(new)) if new else (f"{what}, shared", 0)


def _before_calls(module: nnx.Module, path: str, note: Callable[..., None]) -> None:
    """Makes ``note`` see every call of a layer, with the layer's path, itself and the arguments."""
    stock: Any = type(module)

    # A call is looked up in the type, so the layer gets a type of its own.
    class Observed(stock):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            note(path, self, *args, **kwargs)
            return stock.__call__(self, *args, **kwargs)

    object.__setattr__(module, "__class__", Observed)


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
