"""Batch norm, addition and ReLU as one layer that knows which layers read its result.

`NormRelu` is made of stock Flax; `BatchNormRelu` has the same variables and calls
`functional.batch_norm_relu`, which also packs what its readers keep.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from swat_jax import functional, kernels
from swat_jax.activations import Activation, Branches
from swat_jax.dropout import Dropout
from swat_jax.layer_base import selection_for
from swat_jax.layers import SwatConv, SwatLinear
from swat_jax.sparsity.packing import Packed
from swat_jax.sparsity.top_k import Count


def apply(layer: Any, activation: Activation, norm: Any = None) -> jax.Array:
    """The output of a layer, SWAT or stock, for its input.

    Args:
      layer: the layer.
      activation: its input.
      norm: the batch norm that alone reads the output, or None.
    """
    in_training = isinstance(norm, BatchNormRelu) and not norm.use_running_average
    if isinstance(layer, SwatConv) and in_training:
        return layer(activation, constant_bias=True)
    return layer(activation if isinstance(layer, SwatConv | SwatLinear) else activation.x)


class NormRelu(nnx.BatchNorm):
    """Stock batch norm, then an addition and ReLU; takes the arguments of `flax.nnx.BatchNorm`."""

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: jax.Array,
        residual: jax.Array | None = None,
        *,
        relu: bool = True,
        readers: Sequence[Any] = (),
        dense: bool = False,
        before: bool = False,
        dropout: Any = None,
    ) -> Branches:
        """``relu(norm(x) + residual)``, then dropout.

        Args:
          x: (..., channels).
          residual: added before the ReLU, of the shape of ``x``; or None.
          relu: whether negative values become 0.
          readers: the layers that will read the result.
          dense: whether something else reads it too.
          before: whether ``x`` itself is read by something else too.
          dropout: the layer of it, or None.
        """
        y = super().__call__(x)
        if residual is not None:
            y = y + residual
        if relu:
            y = nnx.relu(y)
        if dropout is not None:
            y = dropout(y)
        return Branches(
            readers=tuple(Activation(y) for _ in readers),
            dense=y if dense else None,
            before=x if before else None,
        )


class BatchNormRelu(NormRelu):
    """`NormRelu` in few passes over memory, which packs what its readers keep.

    Variables and arguments are those of `flax.nnx.BatchNorm`. Statistics and arithmetic are in
    float32 (float64 for float64) whatever the type of the input.
    """

    def __call__(
        self,
        x: jax.Array,
        residual: jax.Array | None = None,
        *,
        relu: bool = True,
        readers: Sequence[Any] = (),
        dense: bool = False,
        before: bool = False,
        dropout: Any = None,
    ) -> Branches:
        """As `NormRelu`; in evaluation mode nothing is packed.

        A `swat_jax.dropout.Dropout` is asked for its mask and not called, where `fuses` says so.
        """
        assert self.scale is not None
        assert self.bias is not None
        x = x.astype(self.dtype or jnp.result_type(x, self.scale[...], self.bias[...]))
        options: Any = {"residual": residual, "relu": relu, "returns_input": before}
        if dropout is not None and (dropout.deterministic or dropout.rate == 0):
            dropout = None
        if dropout is not None:
            if not self.fuses(dropout, residual, relu):
                out = self._normalize(x, **options)
                rest = branch(dropout(out.y[0]), readers=readers, dense=dense)
                return Branches(readers=rest.readers, dense=rest.dense, before=out.x)
            options |= {"kept": dropout.draw(x.size), "dropout_rate": dropout.drawn_rate}
        choice = _Choice(readers, x)
        copies = max(1, len(readers) + dense)
        out = self._normalize(x, readers=copies, selection=choice.selection(), **options)
        return Branches(
            readers=choice.activations(out.y, out.packed, out.thresholds),
            dense=out.y[-1] if dense else None,
            before=out.x,
        )

    @staticmethod
    def fuses(dropout: Any, residual: jax.Array | None, relu: bool) -> bool:
        """Whether a dropout layer becomes part of the pass."""
        return isinstance(dropout, Dropout) and dropout.draws and relu and residual is None

    def _normalize(self, x: jax.Array, **options: Any) -> functional.BatchNormOutput:
        """Calls `functional.batch_norm_relu` with the variables of the layer, and updates them."""
        assert self.scale is not None
        assert self.bias is not None
        wide = jnp.promote_types(x.dtype, jnp.float32)
        averages = (self.mean[...].astype(wide), self.var[...].astype(wide))
        out = functional.batch_norm_relu(
            x,
            self.scale[...].astype(wide),
            self.bias[...].astype(wide),
            epsilon=self.epsilon,
            statistics=averages if self.use_running_average else None,
            axis_name=self.axis_name,
            **options,
        )
        if not self.use_running_average:
            for average, value in ((self.mean, out.mean), (self.var, out.variance)):
                old = average[...]
                mixed = self.momentum * old + (1 - self.momentum) * lax.stop_gradient(value)
                average[...] = mixed.astype(old.dtype)
        return out


def branch(x: jax.Array, *, readers: Sequence[Any] = (), dense: bool = False) -> Branches:
    """Sends a value that no `BatchNormRelu` made to all that read it.

    Readers that pack their input share one packed form of it.

    Args:
      x: floats.
      readers: the layers that will read it.
      dense: whether something else reads it too.
    """
    choice = _Choice(readers, x)
    selection = choice.selection()
    packed, limits = (None, None) if selection is None else kernels.select(x, selection)
    return Branches(
        readers=choice.activations((x,) * len(readers), packed, limits),
        dense=x if dense else None,
    )


class _Choice:
    """What is packed of a value for its readers.

    Readers that keep equally many values share a threshold. At most two counts are served; of
    readers that are not alike in reusing thresholds, the first decides who is served. The others
    pack for themselves.
    """

    def __init__(self, readers: Sequence[Any], x: jax.Array) -> None:
        self.x = x
        self.readers = readers
        self.keeps: list[Count] = []
        self.served: list[Any] = []  # for every count the first reader that asked for it
        self.positions: list[int | None] = [self._position(reader) for reader in readers]

    def selection(self) -> kernels.Selection | None:
        """What `batch_norm_relu` is to pack, or None."""
        return selection_for(self.served, self.keeps, self.x) if self.keeps else None

    def activations(
        self, copies: Sequence[jax.Array], packed: Packed | None, thresholds: Any
    ) -> tuple[Activation, ...]:
        """The readers' inputs; thresholds that are reused become state of their readers."""
        found = []
        # There may be one copy more, for who reads the dense value.
        for reader, position, copy in zip(self.readers, self.positions, copies, strict=False):
            if position is None:
                found.append(Activation(copy))
                continue
            limit = lax.stop_gradient(thresholds[position])
            reader.keep_threshold(limit)
            found.append(Activation(copy, packed, limit))
        return tuple(found)

    def _position(self, reader: Any) -> int | None:
        if not isinstance(reader, SwatConv | SwatLinear) or not reader.packs:
            return None
        if self.served:
            first = self.served[0]
            if (reader.activation_threshold is None) != (first.activation_threshold is None):
                return None
        keep = reader.activation_keep(self.x.size)
        if isinstance(keep, int) and keep in [k for k in self.keeps if isinstance(k, int)]:
            return self.keeps.index(keep)
        if len(self.keeps) == 2:
            return None
        self.keeps.append(keep)
        self.served.append(reader)
        return len(self.keeps) - 1
