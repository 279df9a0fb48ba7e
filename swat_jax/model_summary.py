"""What SWAT makes of a model, layer by layer: shapes, sparsity, MACs and bytes kept, by one trace.

MACs are those of `swat_jax.flops`, per example; bytes are those of `swat_jax.kept_bytes`, for the
whole batch.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from swat_jax import kept_bytes, layer_table
from swat_jax.errors import UsageError
from swat_jax.layers import SwatConv, SwatLinear
from swat_jax.sparsity import granularity as granularities
from swat_jax.sparsity.per_layer import told
from swat_jax.surgery import NO_SWAT_FORM, densify, kernel_shape


@dataclasses.dataclass(frozen=True)
class Row:
    """One conv or linear layer; of a stack of layers, all together.

    Attributes:
      path: where it sits, such as ``stage1/0/conv1``.
      kind: "conv" or "linear".
      kernel_shape: (*window, Cin / groups, Cout), or (Cin, Cout) for linear layers.
      input_hw: spatial shape of its input in the first call; for linear layers the axes between
        batch and features.
      output_hw: spatial shape of its output.
      calls: how often it is called.
      weights: number of weights, without bias.
      weight_sparsity: fraction of zeros in the weights; 0 for stock layers.
      activation_sparsity: fraction of zeros in the saved input.
      macs_forward: MACs of the forward pass per example, dense.
      macs_training: MACs of a training step per example, dense.
      macs_saved: how many of `macs_training` SWAT saves.
      bytes_dense: what it keeps for its backward pass as a stock layer.
      bytes_kept: what it keeps as it is, where inputs are packed.
    """

    path: str
    kind: str
    kernel_shape: tuple[int, ...]
    input_hw: tuple[int, ...]
    output_hw: tuple[int, ...]
    calls: int
    weights: int
    weight_sparsity: float
    activation_sparsity: float
    macs_forward: int
    macs_training: int
    macs_saved: float
    bytes_dense: int
    bytes_kept: int


@dataclasses.dataclass(frozen=True)
class Summary:
    """The table of a model; as text, what `summary` prints.

    Attributes:
      name: the class of the model.
      rows: its conv and linear layers, in the order in which they are first called.
      notes: what the table does not show.
    """

    name: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    @property
    def weights(self) -> int:
        """Weights of all layers of the table."""
        return sum(row.weights for row in self.rows)

    @property
    def weight_sparsity(self) -> float:
        """Fraction of zeros among them."""
        zeros = sum(row.weights * row.weight_sparsity for row in self.rows)
        return zeros / max(1, self.weights)

    @property
    def training_reduction(self) -> float:
        """Fraction of the MACs of a training step that SWAT saves."""
        dense = sum(row.macs_training for row in self.rows)
        return sum(row.macs_saved for row in self.rows) / max(1, dense)

    @property
    def bytes_dense(self) -> int:
        """What all layers of the table keep for their backward passes as stock layers."""
        return sum(row.bytes_dense for row in self.rows)

    @property
    def bytes_kept(self) -> int:
        """What they keep as they are, where inputs are packed."""
        return sum(row.bytes_kept for row in self.rows)

    def __str__(self) -> str:
        return "\n".join([*_table(self.rows), "", *self._totals(), *self._notes()])

    def _totals(self) -> list[str]:
        sparse = sum(row.weight_sparsity > 0 or row.activation_sparsity > 0 for row in self.rows)
        forward = sum(row.macs_forward for row in self.rows)
        training = sum(row.macs_training for row in self.rows)
        layers = (
            f"{self.name}: {len(self.rows)} conv and linear layers, {sparse} of them sparse; "
            f"{self.weights:,} weights, {100 * self.weight_sparsity:.1f} % zero"
        )
        macs = (
            f"MACs per example: {forward:,} forward, {training:,} training, of which SWAT saves "
            f"{100 * self.training_reduction:.1f} %"
        )
        kept = (
            "kept by these layers for the backward pass, MiB: "
            f"{self.bytes_dense / 2**20:,.1f} dense, {self.bytes_kept / 2**20:,.1f} SWAT"
        )
        return [layers, macs, kept]

    def _notes(self) -> list[str]:
        return [f"note: {note}" for note in self.notes]


def _table(rows: Sequence[Row]) -> list[str]:
    width = max([5, *(len(_named(row)) for row in rows)])
    head = (
        f"{'layer':{width}}  {'kernel':>14}  {'input':>9}  {'output':>9}  {'s_W %':>5}"
        f"  {'s_A %':>5}  {'forward MACs':>14}  {'saved %':>7}  {'dense bytes':>13}"
        f"  {'SWAT bytes':>13}"
    )
    lines = [
        f"{_named(row):{width}}  {_times(row.kernel_shape):>14}  {_times(row.input_hw):>9}"
        f"  {_times(row.output_hw):>9}  {100 * row.weight_sparsity:>5.1f}"
        f"  {100 * row.activation_sparsity:>5.1f}  {row.macs_forward:>14,}"
        f"  {100 * row.macs_saved / max(1, row.macs_training):>7.1f}"
        f"  {row.bytes_dense:>13,}  {row.bytes_kept:>13,}"
        for row in rows
    ]
    return [head, *lines]


def summary(
    model: nnx.Module,
    input_shape: Sequence[int] | Any,
    *args: Any,
    dtype: Any = jnp.float32,
    **kwargs: Any,
) -> Summary:
    """Prints the conv and linear layers of a model, and what SWAT saves in each.

    The model is called once as in training and once as in evaluation, abstractly: nothing is
    computed, and it may be abstract itself (`nnx.eval_shape`). It stays as it is.

    A loop within the model (`nnx.scan` over time, `nnx.RNN`) is traced once, and its layers count
    for one turn; a loop over stacked layers counts for all of them.

    Bytes are counted as they are with the CUDA kernels, which pack saved inputs, whether there are
    any here or not. Norms and activation functions keep what they keep; they are in no row.

    Args:
      model: any NNX model, sparse or not.
      input_shape: (N, ..., channels) of what it is called with; or that itself, an array, a
        `jax.ShapeDtypeStruct` or a tree of them, such as tokens.
      args: what else the model's call takes. Arrays become abstract.
      dtype: of the input, where its shape is given.
      kwargs: likewise, such as ``train=True``.

    Returns:
      What was printed, with numbers in `Summary.rows`.

    Raises:
      UsageError: an empty shape, or the call reaches no such layer.

    Example:
      >>> import swat_jax
      >>> model = nnx.Sequential(nnx.Linear(64, 32, rngs=nnx.Rngs(0)), nnx.relu,
      ...                        nnx.Linear(32, 10, rngs=nnx.Rngs(1)))
      >>> table = summary(swat_jax.sparsify(model, sparsity=0.75), (8, 64))  # doctest: +ELLIPSIS
      layer             kernel      input     output  s_W %  s_A %    forward MACs  saved %...
      layers/0           64x32          -          -   75.0   75.0           2,048     75.0...
      layers/2           32x10          -          -   75.0   75.0             320     75.0...
      ...
      >>> table.rows[1].macs_training, table.rows[1].macs_saved
      (960, 720.0)
    """
    first = input_shape
    if isinstance(first, Sequence) and not first:
        raise UsageError(f"input_shape: {input_shape!r} is empty; give (N, ..., channels)")
    if isinstance(first, Sequence) and all(isinstance(size, numbers.Integral) for size in first):
        first = jax.ShapeDtypeStruct(tuple(first), dtype)
    call = (first, *args)
    uses = layer_table.trace(model, *call, **kwargs)
    if not uses:
        raise UsageError("model: its call reaches no nnx.Conv and no nnx.Linear")
    dense = _bytes(kept_bytes.trace_call(densify(model), *call, **kwargs))
    kept = _bytes(kept_bytes.trace_call(_packed(model), *call, **kwargs))
    modules = {"/".join(map(str, path)): module for path, module in nnx.iter_modules(model)}
    by_path: dict[str, list[layer_table.Layer]] = {}
    for use in uses:
        by_path.setdefault(use.path, []).append(use)
    rows = tuple(
        _row(modules[path], of_layer, dense[path], kept[path]) for path, of_layer in by_path.items()
    )
    found = Summary(type(model).__name__, rows, tuple(_notes(modules, by_path)))
    print(found)
    return found


def _row(layer: Any, uses: Sequence[layer_table.Layer], dense: int, kept: int) -> Row:
    weight, activation = _sparsity(layer)
    stack = layer.kernel.get_value().size // math.prod(kernel_shape(layer))
    forward = stack * sum(use.macs_forward for use in uses)
    backward = stack * sum(use.macs_input_gradient for use in uses)
    return Row(
        path=uses[0].path,
        kind=uses[0].kind,
        kernel_shape=uses[0].kernel_shape,
        input_hw=uses[0].input_hw,
        output_hw=uses[0].output_hw,
        calls=stack * len(uses),
        weights=stack * uses[0].weights,
        weight_sparsity=weight,
        activation_sparsity=activation,
        macs_forward=forward,
        macs_training=2 * forward + backward,
        macs_saved=(forward + backward) * weight + forward * activation,
        bytes_dense=stack * dense,
        bytes_kept=stack * kept,
    )


def _sparsity(layer: Any) -> tuple[float, float]:
    """Of weights and saved input; of a budget that moves, at present."""
    if not isinstance(layer, SwatConv | SwatLinear):
        return 0.0, 0.0
    if layer.weight_budget is None:
        return layer.weight_sparsity, layer.activation_sparsity
    budget: Any = layer.weight_budget.get_value()
    if isinstance(budget, jax.ShapeDtypeStruct):
        return layer.weight_sparsity, layer.weight_sparsity
    zeros = 1 - int(budget) / granularities.units(kernel_shape(layer), layer.granularity)
    return zeros, zeros


def _packed(model: nnx.Module) -> nnx.Module:
    """The model as it is with the kernels. A budget that moves has room for everything or none."""
    model = nnx.clone(model)
    for _, layer in nnx.iter_modules(model):
        if isinstance(layer, SwatConv | SwatLinear) and layer.weight_budget is None:
            layer.pack = True
    return model


def _bytes(kept: Iterable[kept_bytes.Kept]) -> dict[str, int]:
    """What conv and linear layers keep, by path."""
    total: dict[str, int] = {}
    for one in kept:
        if one.kind in ("conv", "linear"):
            total[one.path] = total.get(one.path, 0) + one.activations + one.weights
    return total


def _notes(modules: dict[str, Any], called: dict[str, Any]) -> Iterable[str]:
    other = {
        path: type(module).__name__
        for path, module in modules.items()
        if isinstance(module, NO_SWAT_FORM)
    }
    if other:
        yield f"not counted: {told(other)}"
    unused = {
        path: type(module).__name__
        for path, module in modules.items()
        if isinstance(module, nnx.Conv | nnx.Linear) and path not in called
    }
    if unused:
        yield (
            f"never called: {told(unused)}; where the model computes with their kernels itself, "
            "SWAT has no part in it: leave them out by sparsify's filter"
        )
    sparse = [one for one in modules.values() if isinstance(one, SwatConv | SwatLinear)]
    if any(not one.pack for one in sparse):
        yield (
            "some sparse layers do not pack their inputs here (no CUDA kernels, or pack=False): "
            "they keep dense arrays with zeros"
        )


def _named(row: Row) -> str:
    name = row.path or "(the model)"
    return name if row.calls == 1 else f"{name} x{row.calls}"


def _times(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "-"
