"""Calls of layers as single equations of a jaxpr, while a function is traced to be fused.

Inside `marking` batch norm, dropout and SWAT layers put one equation into the trace in place of all
that they compute. It carries what it stands for (`Mark`): how to compute it as the layer does, and
how to have the layer again, with its state as it is at that point of the program.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

from swat_jax.activations import Activation
from swat_jax.dropout import Dropout
from swat_jax.layers import SwatConv, SwatLinear, keep_kernel_dtype

# Where a layer's variable sits in it.
Path = tuple[Any, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Mark:
    """What one equation stands for.

    Its operands are the layer's input, its state, and constants; its results are the output, and
    what changed of the state.

    Attributes:
      kind: the class whose call it is: `flax.nnx.BatchNorm`, `SwatConv`, `SwatLinear`, or a dropout.
      name: of the layer.
      call: the call as the layer computes it.
      options: what else the call was given, or the layer knows.
      graph: the structure of the layer, as `flax.nnx.split` has it; None for dropout, which has no
        state.
      variables: the paths of its state, each with its variable.
      changed: the paths of what the call changes.
      is_plain: whether it may be computed in another way; for a SWAT layer, whether it packs its
        input and multiplies it as it came.
      why: why it is not plain; empty if it is.
    """

    kind: type
    name: str
    call: Any
    options: Mapping[str, Any]
    graph: Any = None
    variables: tuple[tuple[Path, Any], ...] = ()
    changed: tuple[Path, ...] = ()
    is_plain: bool = True
    why: str = ""

    def layer(self, state: Sequence[Any]) -> Any:
        """The layer with this state, one value for each of `variables`."""
        flat = {
            path: variable.replace(value)
            for (path, variable), value in zip(self.variables, state, strict=True)
        }
        return nnx.merge(self.graph, nnx.from_flat_state(flat), copy=True)

    def changes(self, layer: Any) -> list[jax.Array]:
        """The results of the equation after the first, from the layer after its call."""
        values = dict(_flat_state(layer))
        return [values[path].get_value() for path in self.changed]

    def run(self, *operands: Any) -> list[jax.Array]:
        """The results as the layer computes them."""
        count = len(operands) - len(self.call.consts)
        call = ClosedJaxpr(self.call.jaxpr, operands[count:])
        return jaxpr_as_fun(call)(*operands[:count])


@dataclasses.dataclass
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


_active: contextvars.ContextVar[Marking | None] = contextvars.ContextVar("marking", default=None)
_lock = threading.Lock()
_depth = 0


@contextlib.contextmanager
def marking() -> Iterator[Marking]:
    """Layers that are called inside, by this thread, become single equations."""
    found = Marking()
    with _replaced_calls():
        token = _active.set(found)
        try:
            yield found
        finally:
            _active.reset(token)


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
    found = _active.get()
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
    active = _active.get()
    assert active is not None
    token = _active.set(None)  # a call inside is part of this one
    try:
        jaxpr = jax.make_jaxpr(call)(*operands)
    finally:
        _active.reset(token)
    # `facts` that are found while the call is traced come as functions.
    known = {name: fact() if callable(fact) else fact for name, fact in facts.items()}
    mark = Mark(kind, active.name(layer), jaxpr, **known)
    return layer_call_p.bind(*operands, *jaxpr.consts, mark=mark)


def _mark_layer(
    kind: type,
    layer: Any,
    stock: Callable[..., jax.Array],
    x: jax.Array,
    *,
    options: Mapping[str, Any],
    why: str,
) -> jax.Array:
    """Calls a layer that has state, as one equation."""
    graph, state = nnx.split(layer)
    variables = tuple(nnx.to_flat_state(state))
    partial = Mark(kind, "", None, {}, graph, variables)
    changes: dict[Path, Any] = {}

    def run(x: jax.Array, *values: jax.Array) -> list[jax.Array]:
        clone = partial.layer(values)
        before = {path: value for (path, _), value in zip(variables, values, strict=True)}
        output = stock(clone, x, **options)
        changes.clear()
        changes.update({
            path: variable
            for path, variable in _flat_state(clone)
            if variable.get_value() is not before.get(path)
        })
        return [output, *(variable.get_value() for variable in changes.values())]

    values = [variable.get_value() for _, variable in variables]
    output, *results = _bind(
        kind, layer, run, [jnp.asarray(x), *values], options=options, graph=graph,
        variables=variables, changed=lambda: tuple(changes), is_plain=not why, why=why,
    )  # fmt: skip
    if changes:
        pairs = zip(changes.items(), results, strict=True)
        flat = {path: old.replace(value) for (path, old), value in pairs}
        nnx.update(layer, nnx.from_flat_state(flat))
    if getattr(layer, "next_weight_threshold", None) is not None:
        layer.next_weight_threshold = nnx.data(None)  # the call has used it up
    return output


def _flat_state(layer: Any) -> tuple[tuple[Path, Any], ...]:
    return tuple(nnx.to_flat_state(nnx.state(layer)))


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
    return _mark_layer(
        nnx.BatchNorm, layer, stock, x, options=options, why=_norm_is_left(layer, x, mask)
    )


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
    why = _packs_nothing(layer, jnp.asarray(inputs))
    return _mark_layer(kind, layer, stock, inputs, options=options, why=why)


def _packs_nothing(layer: Any, x: jax.Array) -> str:
    """Why a SWAT layer cannot take its input in packed form, or nothing."""
    if not layer.packs:
        return "it does not pack its input"
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
    return _bind(kind, layer, run, [jnp.asarray(inputs), key], **facts)[0]


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
    """Layers ask, when they are called, whether they are to be marked; of all threads one puts it
    there and one takes it away.
    """
    global _depth
    with _lock:
        if not _depth:
            for kind, marker in _MARKERS.items():
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
        if _active.get() is None:
            return stock(layer, *args, **kwargs)
        return marker(stock, layer, *args, **kwargs)

    return call

