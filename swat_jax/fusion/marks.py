"""Calls of layers as single equations of a jaxpr, while a function is traced to be fused.

Inside `marking` batch norm, dropout and SWAT layers put one equation into the trace in place of all
that they compute. It carries what it stands for (`Mark`): how to compute it as the layer does, and
how to have the layer again, with its state as it is at that point of the program.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

from swat_jax.activations import Activation
from swat_jax.dropout import Dropout
from swat_jax.fusion.state import Changes, Path, Structure, split
from swat_jax.layer_base import keep_kernel_dtype
from swat_jax.layers import SwatConv, SwatLinear


@dataclasses.dataclass(frozen=True, eq=False)
class Mark:
    """What one equation stands for.

    Its operands are the layer's input, its state, and constants; its results are the output, and
    what changed of the state.

    Attributes:
      kind: whose call it is: `flax.nnx.BatchNorm`, `SwatConv`, `SwatLinear`, or a dropout.
      name: of the layer.
      call: the call as the layer computes it.
      options: what else the call was given, or the layer knows.
      structure: of the layer; None for dropout, which has no state.
      changed: the paths of what the call changes.
      is_plain: whether it may be computed in another way; for a SWAT layer, whether it packs its
        input and multiplies it as it came.
      why: why it is not plain, if there is more to say than that nothing is packed.
      precision: of matrix products, as `jax.default_matmul_precision` had it around the call.
    """

    kind: type
    name: str
    call: Any
    options: Mapping[str, Any]
    structure: Structure | None = None
    changed: tuple[Path, ...] = ()
    is_plain: bool = True
    why: str = ""
    precision: Any = None

    def layer(self, operands: Sequence[Any]) -> Any:
        """The layer with the state that is among the operands of the equation."""
        assert self.structure is not None
        return self.structure.merge(operands[1 : 1 + len(self.structure.variables)])

    def run(self, *operands: Any) -> list[jax.Array]:
        """The results as the layer computes them."""
        count = len(operands) - len(self.call.consts)
        call = self.call.replace(consts=list(operands[count:]))
        return jaxpr_as_fun(call)(*operands[:count])


@dataclasses.dataclass(eq=False)
class Marking:
    """One trace that marks layers.

    Attributes:
      names: of layers, by their `id`.
      notes: what is said of layers that were marked and cannot be found again.
      counts: how many layers of a class had to be given a number for a name.
    """

    names: dict[int, str] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    counts: dict[str, int] = dataclasses.field(default_factory=dict)

    def name(self, layer: Any) -> str:
        """The path of a layer, or its class and a number that counts calls."""
        if id(layer) in self.names:
            return self.names[id(layer)]
        kind = type(layer).__name__
        self.counts[kind] = self.counts.get(kind, 0) + 1
        return f"{kind} {self.counts[kind]}"


# A function under `jax.jit` that was traced before must be traced again inside, and what is traced
# inside must not be found outside: this context is part of JAX's cache keys. Each thread has its
# own.
_active: Any = jax.make_user_context(None)
_lock = threading.Lock()
_depth = 0


@contextlib.contextmanager
def marking() -> Iterator[Marking]:
    """Layers that are called inside, by this thread, become single equations."""
    found = Marking()
    with _replaced_calls(), _active(found):
        yield found


# ---------- The equation ----------

layer_call_p = Primitive("swat_jax_layer_call")
layer_call_p.multiple_results = True


# Rules for whoever transforms or compiles an equation before anyone has replaced it: from then on
# it is what the layer computes.
@layer_call_p.def_impl
def _run(*operands: Any, mark: Mark) -> list[jax.Array]:
    return mark.run(*operands)


@layer_call_p.def_abstract_eval
def _types(*operands: Any, mark: Mark) -> list[Any]:
    del operands
    return list(mark.call.out_avals)


def _differentiated(
    primals: Sequence[Any], tangents: Sequence[Any], *, mark: Mark
) -> tuple[list[Any], list[Any]]:
    _note_lost(mark, "differentiated")
    moving = [index for index, tangent in enumerate(tangents) if type(tangent) is not ad.Zero]

    def run(*values: Any) -> list[jax.Array]:
        operands = list(primals)
        for index, value in zip(moving, values, strict=True):
            operands[index] = value
        return mark.run(*operands)

    outputs, changes = jax.jvp(
        run, [primals[index] for index in moving], [tangents[index] for index in moving]
    )
    zeros = [
        ad.Zero(change.aval if hasattr(change, "aval") else jax.typeof(change))
        if change.dtype == jax.dtypes.float0
        else change
        for change in changes
    ]
    return outputs, zeros


def _batched(
    axis: Any, operands: Sequence[Any], axes: Sequence[int | None], *, mark: Mark
) -> tuple[list[Any], list[int]]:
    _note_lost(mark, "mapped by jax.vmap")
    # An axis without a name has an object for one.
    name = axis.name if isinstance(axis.name, str) else None
    run = jax.vmap(mark.run, in_axes=tuple(axes), axis_name=name, axis_size=axis.size)
    outputs = run(*operands)
    return outputs, [0] * len(outputs)


ad.primitive_jvps[layer_call_p] = _differentiated
batching.fancy_primitive_batchers[layer_call_p] = _batched
mlir.register_lowering(layer_call_p, mlir.lower_fun(_run, multiple_results=True))


def _note_lost(mark: Mark, how: str) -> None:
    found = _active.value
    if found is not None:
        found.notes.append(f"{mark.name}: left as it is, since it is {how} within the function")


def _bind(
    kind: type,
    layer: Any,
    call: Callable[..., Any],
    operands: Sequence[Any],
    **facts: Any,
) -> list[jax.Array]:
    """Puts the equation into the trace; ``call`` takes the operands."""
    active = _active.value
    assert active is not None
    with _active(None):  # a call inside is part of this one
        jaxpr = jax.make_jaxpr(call)(*operands)
    # `facts` that are found while the call is traced come as functions.
    known: dict[str, Any] = {
        name: fact() if callable(fact) else fact for name, fact in facts.items()
    }
    precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    mark = Mark(kind, active.name(layer), jaxpr, precision=precision, **known)
    return layer_call_p.bind(*operands, *jaxpr.consts, mark=mark)


def _mark_layer(
    kind: type,
    layer: Any,
    stock: Callable[..., jax.Array],
    x: jax.Array,
    *,
    options: Mapping[str, Any],
    is_plain: bool,
    why: str,
) -> jax.Array:
    """Calls a layer that has state, as one equation."""
    structure, state = split(layer)
    found: list[Changes] = []

    def run(x: jax.Array, *values: jax.Array) -> list[jax.Array]:
        clone = structure.merge(values)
        output = stock(clone, x, **options)
        found.append(structure.changes(clone, values))
        return [output, *found[-1].values]

    output, *results = _bind(
        kind, layer, run, [x, *state], options=options, structure=structure,
        changed=lambda: tuple(found[-1].new), is_plain=is_plain, why=why,
    )  # fmt: skip
    found[-1].apply(layer, results)
    return output


# ---------- What is marked ----------


def _mark_norm(
    stock: Callable[..., jax.Array],
    layer: Any,
    x: jax.Array,
    use_running_average: bool | None = None,
    *,
    mask: jax.Array | None = None,
) -> jax.Array:
    constant = layer.use_running_average if use_running_average is None else use_running_average
    if constant is None:
        return stock(layer, x, use_running_average, mask=mask)  # which says what lacks
    options = {"use_running_average": constant, "mask": mask}
    why = _norm_is_left(layer, x, mask)
    return _mark_layer(nnx.BatchNorm, layer, stock, x, options=options, is_plain=not why, why=why)


def _norm_is_left(layer: Any, x: jax.Array, mask: Any) -> str:
    """Why a batch norm cannot be part of another pass, or nothing."""
    if mask is not None:
        return "it has a mask"
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return f"its input is {x.dtype}"
    if x.ndim < 2 or layer.axis not in (-1, x.ndim - 1):
        return f"its features are on axis {layer.axis} of {x.ndim}, not on the last of several"
    if layer.axis_index_groups is not None or not isinstance(layer.axis_name, str | None):
        return "it averages over groups of devices or over several axes"
    if layer.promote_dtype is not dtypes.promote_dtype:
        return "it promotes types in a way of its own"
    return ""


def _mark_conv(
    stock: Callable[..., jax.Array],
    layer: Any,
    inputs: jax.Array | Activation,
    out_sharding: Any = None,
    *,
    constant_bias: bool = False,
) -> jax.Array:
    options = {"out_sharding": out_sharding, "constant_bias": constant_bias}
    return _mark_swat(SwatConv, stock, layer, inputs, options)


def _mark_linear(
    stock: Callable[..., jax.Array],
    layer: Any,
    inputs: jax.Array | Activation,
    out_sharding: Any = None,
) -> jax.Array:
    return _mark_swat(SwatLinear, stock, layer, inputs, {"out_sharding": out_sharding})


def _mark_swat(
    kind: type,
    stock: Callable[..., jax.Array],
    layer: Any,
    inputs: jax.Array | Activation,
    options: Mapping[str, Any],
) -> jax.Array:
    if isinstance(inputs, Activation):
        if inputs.packed is not None:
            return stock(layer, inputs, **options)  # who packed it knows its readers
        inputs = inputs.x
    why = _takes_nothing_packed(layer, inputs) if layer.packs else ""
    is_plain = layer.packs and not why
    return _mark_layer(kind, layer, stock, inputs, options=options, is_plain=is_plain, why=why)


def _takes_nothing_packed(layer: Any, x: jax.Array) -> str:
    """Why a SWAT layer cannot take its input in packed form, or nothing."""
    if layer.promote_dtype is not keep_kernel_dtype:
        return "it promotes types in a way of its own"
    bias = None if layer.bias is None else layer.bias[...]
    dtype = dtypes.canonicalize_dtype(x, layer.kernel[...], bias, dtype=layer.dtype)
    if dtype != x.dtype:
        return f"it computes in {jnp.dtype(dtype)} and reads {x.dtype}"
    if isinstance(layer, SwatConv):
        padding = layer.padding
        if isinstance(padding, str) and padding in ("CIRCULAR", "REFLECT", "CAUSAL"):
            return f"it pads its input itself ({padding})"
        if x.ndim != len(layer.kernel_size) + 2:
            return f"its input has {x.ndim} axes"
    return ""


def _mark_dropout(
    kind: type,
    stock: Callable[..., jax.Array],
    layer: Any,
    inputs: jax.Array,
    *,
    deterministic: bool | None = None,
    rngs: Any = None,
) -> jax.Array:
    rests = layer.deterministic if deterministic is None else deterministic
    source = layer.rngs if rngs is None else rngs
    if rests or source is None or layer.broadcast_dims or not 0 < layer.rate < 1:
        return stock(layer, inputs, deterministic=deterministic, rngs=rngs)
    if isinstance(source, nnx.Rngs):
        source = source[layer.rng_collection]
    key = source if isinstance(source, jax.Array) else source()

    def run(x: jax.Array, key: jax.Array) -> list[jax.Array]:
        return [stock(layer, x, deterministic=False, rngs=key)]

    why = "" if jnp.issubdtype(inputs.dtype, jnp.floating) else f"its input is {inputs.dtype}"
    if kind is Dropout and not 0 < layer.drawn_rate < 1:
        why = f"it drops {layer.rate}, which is rounded to {layer.drawn_rate}"
    facts = {"options": {"rate": layer.rate}, "is_plain": not why, "why": why}
    return _bind(kind, layer, run, [inputs, key], **facts)[0]


_MARKERS: dict[type, Callable[..., jax.Array]] = {
    nnx.BatchNorm: _mark_norm,
    SwatConv: _mark_conv,
    SwatLinear: _mark_linear,
    nnx.Dropout: functools.partial(_mark_dropout, nnx.Dropout),
    Dropout: functools.partial(_mark_dropout, Dropout),
}
STOCK: dict[type, Callable[..., jax.Array]] = {kind: kind.__call__ for kind in _MARKERS}


@contextlib.contextmanager
def _replaced_calls() -> Iterator[None]:
    """Layers ask whether they are to be marked when they are called; threads share that."""
    global _depth
    with _lock:
        if not _depth:
            for kind, marker in _MARKERS.items():
                STOCK[kind] = kind.__call__  # which somebody may have replaced
                kind.__call__ = _asking(STOCK[kind], marker)
        _depth += 1
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if not _depth:
                for kind, stock in STOCK.items():
                    kind.__call__ = stock


def _asking(stock: Callable[..., Any], marker: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        if _active.value is None:
            return stock(layer, *args, **kwargs)
        return marker(stock, layer, *args, **kwargs)

    return call
