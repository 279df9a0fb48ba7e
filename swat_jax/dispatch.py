"""From tables to layers: which algorithms a network trains with, and what is said of it.

It depends on the table and on nothing that is measured while training, so a run and its repetition
compute with the same algorithms.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from swat_jax import algorithm_table, algorithms, build, kernels
from swat_jax.abstract_call import abstract_call
from swat_jax.algorithm_table import Table, Times
from swat_jax.algorithms import PLAIN, Algorithms
from swat_jax.candidates import OPS, Problem
from swat_jax.convolution import Convolution
from swat_jax.errors import UsageError

TUNED, PLAIN_WAY = "tuned", "plain"
SETTING = "config.sparsity.algorithms"


@dataclasses.dataclass(frozen=True)
class Choice:
    """What computes the layers of a network.

    Attributes:
      algorithms: of every sparse layer, by path.
      notes: lines for people: every op that is not plain, and why others are.
    """

    algorithms: Mapping[str, Algorithms]
    notes: tuple[str, ...]


def check(setting: Any) -> None:
    """Refuses a `config.sparsity.algorithms` that is neither a word nor a table.

    Raises:
      UsageError: says what it may be.
    """
    if setting in (TUNED, PLAIN_WAY):
        return
    if not isinstance(setting, str) or not setting:
        raise UsageError(
            f"{SETTING} must be {TUNED}, {PLAIN_WAY} or the path of a table, got {setting!r}"
        )
    if not Path(setting).is_file():
        raise UsageError(
            f"{SETTING} must be {TUNED}, {PLAIN_WAY} or the path of a table; "
            f"there is no file {setting!r}"
        )
    algorithm_table.read(Path(setting))


def choose(model: nnx.Module, x: jax.ShapeDtypeStruct, setting: str, device: str) -> Choice:
    """The algorithms for the SWAT layers of a model.

    Args:
      model: any NNX model, abstract or not; `apply` gives the layers what is chosen here.
      x: a batch of its input on one device, in training.
      setting: "tuned", the table that holds for the device; "plain"; or the path of a table, which
        is obeyed on whatever device.
      device: the kind.

    Raises:
      UsageError: see `check` and `algorithm_table.find`.
    """
    check(setting)
    layers = {path: layer for path, layer in build.sparse_layers(model) if is_sparse(layer)}
    chosen = dict.fromkeys(layers, PLAIN)
    if setting == PLAIN_WAY or not layers:
        return Choice(chosen, ())
    backend = kernels.backend()
    if setting == TUNED and backend == "xla":
        told = f"all {len(layers)} sparse layers use masked weights and plain JAX"
        return Choice(chosen, (f"{told}: the backend is xla",))
    if setting == TUNED:
        table, notes = algorithm_table.find(device, backend)
    else:
        table = algorithm_table.read(Path(setting))
        notes = [f"algorithms are those of {setting}, of {table.device}, swat_jax {table.version}"]
    # Without a table the network need not be traced.
    found = problems(model, x) if table.layers else {}
    refused: list[str] = []
    products = untimed = len(layers) * len(OPS)
    for path, problem in found.items():
        timed = _times(table, layers[path], problem) if path in layers else None
        if timed is not None:
            untimed -= len(timed)
            chosen[path] = _accepted(path, timed, problem, notes, refused)
    if refused:
        notes.append(f"{len(refused)} ops are plain against the table, the first: {refused[0]}")
    if untimed:
        notes.append(
            f"{untimed} of the {products} products of sparse layers were not timed on {device}: "
            "masked weights and cuDNN; python -m swat_jax.tune times them"
        )
    return Choice(chosen, tuple(notes))


def apply(model: nnx.Module, choice: Choice) -> None:
    """Gives the layers of a model their algorithms."""
    for path, layer in build.sparse_layers(model):
        layer.algorithms = choice.algorithms.get(path, PLAIN)


def is_sparse(layer: Any) -> bool:
    """Whether there is anything to choose for a SWAT layer."""
    sparse = layer.weight_sparsity > 0 or layer.activation_sparsity > 0
    return sparse or layer.weight_budget is not None


def _times(table: Table, layer: Any, problem: Problem) -> Mapping[str, Times] | None:
    """What a table knows of a layer; of one whose budget moves no time would hold."""
    if layer.weight_budget is not None:
        return None
    return table.layers.get(table_name(layer, problem))


def _accepted(
    path: str,
    timed: Mapping[str, Times],
    problem: Problem,
    notes: list[str],
    refused: list[str],
) -> Algorithms:
    """What a layer gets of what was chosen for it; notes it where it is not plain, or refused."""
    accepted = {}
    for op, times in timed.items():
        name, spent = times.chosen, times.milliseconds
        why = _refusal(op, name, problem)
        accepted[op] = PLAIN[op] if why else name
        if why:
            refused.append(f"{path} {op}, not {name}: {why}")
        elif name != PLAIN[op]:
            ms, plain = (f"{spent.get(one, math.nan):.4f}" for one in (name, PLAIN[op]))
            notes.append(f"{path} {op}: {name} ({ms} ms, {PLAIN[op]} {plain})")
    return Algorithms(**accepted)


def _refusal(op: str, name: str, problem: Problem) -> str:
    try:
        algorithms.check(op, name)
    except UsageError as error:
        return str(error)
    return algorithms.refusal(op, name, problem)


def table_name(layer: Any, problem: Problem) -> str:
    """`algorithm_table.name_of` a layer."""
    return algorithm_table.name_of(problem, layer.weight_sparsity, layer.activation_sparsity)


def problems(model: nnx.Module, x: jax.ShapeDtypeStruct) -> dict[str, Problem]:
    """What the SWAT layers of a model compute in training, by path; of several uses the first.

    Args:
      model: any NNX model, abstract or not; it stays as it is.
      x: a batch of its input.
    """
    packs = {path: layer.packs_in_training for path, layer in build.sparse_layers(model)}
    found: dict[str, Problem] = {}

    def record(traced: Any, inputs: Sequence[jax.Array]) -> None:
        del inputs
        traced.eval()
        for path, layer in build.sparse_layers(traced):
            recorder = _record_conv if isinstance(layer, nnx.Conv) else _record_linear
            product = "conv_general_dilated" if isinstance(layer, nnx.Conv) else "dot_general"
            put = functools.partial(found.setdefault, path)
            setattr(layer, product, recorder(put, layer.granularity, packs[path]))

    abstract_call(model, record, (x,), {})
    return found


def _record_conv(
    put: Callable[[Problem], Any], granularity: str, packs: bool
) -> Callable[..., jax.Array]:
    def conv(
        x: jax.Array,
        kernel: jax.Array,
        window_strides: Sequence[int],
        padding: Any,
        *,
        given: Any = None,
        **options: Any,
    ) -> jax.Array:
        del given
        pairs = padding if isinstance(padding, str) else tuple(map(tuple, padding))
        conv = Convolution(
            tuple(window_strides),
            pairs,
            tuple(options["lhs_dilation"]),
            tuple(options["rhs_dilation"]),
            options["feature_group_count"],
            **_types(options),
            folds=kernels.folds(x.dtype),
        )
        put(Problem(conv, x.shape, kernel.shape, x.dtype, granularity, packs))
        return conv(x, kernel.astype(x.dtype))

    return conv


def _record_linear(
    put: Callable[[Problem], Any], granularity: str, packs: bool
) -> Callable[..., jax.Array]:
    del granularity  # single weights

    def dot(
        x: jax.Array,
        kernel: jax.Array,
        dimension_numbers: Any,
        *,
        given: Any = None,
        **options: Any,
    ) -> jax.Array:
        del given
        types = _types(options)
        put(Problem.linear(x.shape, kernel.shape, x.dtype, is_packed=packs, **types))
        return jax.lax.dot_general(x, kernel.astype(x.dtype), dimension_numbers, **types)

    return dot


def _types(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: options.get(name) for name in ("precision", "preferred_element_type")}
