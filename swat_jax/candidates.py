"""The registry: what there is to compute the products of a SWAT layer with, from a sparse operand.

To add one: a function in `swat_jax.kernels` with its definition in plain JAX, and a `Candidate`
here. `swat_jax.tune` then times it, tables may name it, and layers call it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from swat_jax import kernels, sparse_conv_direct, sparse_convolution
from swat_jax.convolution import Convolution
from swat_jax.sparsity.packing import Packed

OPS = ("forward", "input_gradient", "weight_gradient")


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a layer computes: all that an algorithm may refuse by, and nothing traced.

    Attributes:
      conv: the convolution; for a linear layer that of 1x1.
      x: shape of its input (N, *spatial, in); for a linear layer (rows, 1, 1, in).
      kernel: (*window, in / groups, out); for a linear layer (1, 1, in, out).
      dtype: of input, masked kernel and gradients.
      granularity: what the mask of the kernel selects.
      is_packed: whether the input waits in packed form for the weight gradient.
      is_linear: whether it is a linear layer.
    """

    conv: Convolution
    x: tuple[int, ...]
    kernel: tuple[int, ...]
    dtype: np.dtype
    granularity: str = "unstructured"
    is_packed: bool = False
    is_linear: bool = False

    @classmethod
    def linear(
        cls,
        x: tuple[int, ...],
        kernel: tuple[int, ...],
        dtype: np.dtype,
        *,
        is_packed: bool = False,
        precision: Any = None,
        preferred_element_type: Any = None,
    ) -> Problem:
        """That of a linear layer: a 1x1 convolution of single pixels.

        Args:
          x: shape of its input (..., in).
          kernel: (in, out).
          dtype: see `Problem`.
          is_packed: see `Problem`.
          precision: as in `jax.lax.dot_general`.
          preferred_element_type: as there.

        Example:
          >>> Problem.linear((8, 4, 64), (64, 10), np.dtype("float32")).x
          (32, 1, 1, 64)
        """
        conv = Convolution(
            *((1, 1), ((0, 0), (0, 0)), (1, 1), (1, 1)),
            precision=precision,
            preferred_element_type=preferred_element_type,
        )
        pixels = (math.prod(x[:-1]), 1, 1, x[-1])
        return cls(conv, pixels, (1, 1, *kernel), dtype, is_packed=is_packed, is_linear=True)

    @property
    def y(self) -> tuple[int, ...]:
        """Shape of the output, (N, *spatial, out)."""
        plain = dataclasses.replace(self.conv, folds=False)
        x, kernel = (jax.ShapeDtypeStruct(shape, self.dtype) for shape in (self.x, self.kernel))
        return jax.eval_shape(plain, x, kernel).shape


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A way to compute an op from a sparse operand.

    Attributes:
      refusal: why it does not take a problem; empty if it does. It also says so of a GPU that it
        cannot run on, but not of other devices, where its twin runs. A weight gradient is not asked
        for an input that is not packed.
      variants: for a problem that it takes, how it may cut its work: the name of a variant -> what
        ``call`` gets for it. The first is what it takes if none is named. Names hold no colon; of
        one that has no variants it is empty.
      call: ``(problem, variant, *operands)`` to the result, by op:
        ``forward``: x and the masked kernel, of the problem's type, to y, as `Problem.conv` returns
        it; ``input_gradient``: dy and the masked kernel to dx, of the problem's type;
        ``weight_gradient``: x as a `Packed`, the smallest magnitude that counts in it or None, and
        dy, to dw in float32. Shapes are those of the problem. The masked kernel has zeros off its
        mask and is all that is known of that.
    """

    refusal: Callable[[Problem], str]
    variants: Callable[[Problem], Mapping[str, Any]]
    call: Callable[..., jax.Array]


def _refuses_weight_gradient(problem: Problem) -> str:
    return kernels.weight_gradient_refusal(problem.conv, problem.x, problem.dtype, problem.kernel)


def _cuts(problem: Problem) -> Mapping[str, Any]:
    window = problem.kernel[:-2]
    found = sparse_convolution.cuts(problem.conv, problem.x, problem.y, window)
    return {cut.name: cut for cut in found}


def _weight_gradient(
    problem: Problem, cut: Any, packed: Packed, least: jax.Array | None, dy: jax.Array
) -> jax.Array:
    height, width = problem.kernel[:-2]
    return kernels.sparse_conv_weight_gradient(
        packed, least, dy, problem.conv, (height, width), cut
    )


def _refuses_direct(problem: Problem) -> str:
    return sparse_conv_direct.refusal(problem.conv, problem.x, problem.dtype, problem.kernel)


def _has_windows(problem: Problem) -> bool:
    return problem.granularity == "channel"


def _direct_cuts(problem: Problem) -> Mapping[str, Any]:
    return _named(_direct(problem.conv, problem.x, problem.kernel, _has_windows(problem)))


def _forward_direct(problem: Problem, cut: Any, x: jax.Array, kernel: jax.Array) -> jax.Array:
    return kernels.sparse_conv_forward(x, kernel, problem.conv, cut)


def _refuses_direct_gradient(problem: Problem) -> str:
    return sparse_conv_direct.gradient_refusal(
        problem.conv, problem.x, problem.dtype, problem.kernel
    )


def _direct_gradient_cuts(problem: Problem) -> Mapping[str, Any]:
    *window, inputs, outputs = problem.kernel
    turned = sparse_conv_direct.transposed(problem.conv, problem.x[1:-1], tuple(window))
    kernel = (*window, outputs, inputs)
    return _named(_direct(turned, problem.y, kernel, _has_windows(problem)))


def _input_gradient_direct(
    problem: Problem, cut: Any, dy: jax.Array, kernel: jax.Array
) -> jax.Array:
    height, width = problem.x[1:-1]
    return kernels.sparse_conv_input_gradient(dy, kernel, problem.conv, (height, width), cut)


def _direct(
    conv: Convolution, x: tuple[int, ...], kernel: tuple[int, ...], windows: bool
) -> list[sparse_conv_direct.Cut]:
    """The fastest cut of every tile by the estimate, windows as a whole where they are kept so."""
    found = sparse_conv_direct.cuts(conv, x, kernel, windows)
    if windows:
        found += sparse_conv_direct.cuts(conv, x, kernel)
    best = {(cut.tile, cut.windows): cut for cut in reversed(found)}
    return [cut for cut in found if best[cut.tile, cut.windows] == cut]


def _named(cuts: list[sparse_conv_direct.Cut]) -> Mapping[str, Any]:
    names = (
        f"{cut.tile[0]}x{cut.tile[1]}/{cut.chunk}/{cut.columns}{'w' if cut.windows else ''}"
        for cut in cuts
    )
    return dict(zip(names, cuts, strict=True))


def _vector(problem: Problem) -> int:
    """Output channels that are kept or dropped together; 0 for another granularity."""
    number = problem.granularity.removeprefix("vector")
    return int(number) if number.isdecimal() else 0


def _refuses_vector(problem: Problem) -> str:
    if not (vector := _vector(problem)):
        return f"granularity is {problem.granularity}, not vector8, vector16 or vector32"
    return kernels.vector_refusal(problem.conv, problem.x, problem.dtype, problem.kernel, vector)


def _vector_cuts(problem: Problem) -> Mapping[str, Any]:
    return {
        f"{'x'.join(map(str, cut.tile))}/{cut.height}/{cut.chunk}": cut
        for cut in kernels.vector_cuts(problem.conv, problem.x, problem.kernel)
    }


def _forward_vector(problem: Problem, cut: Any, x: jax.Array, kernel: jax.Array) -> jax.Array:
    return kernels.sparse_conv_vector_forward(x, kernel, problem.conv, _vector(problem), cut)


CANDIDATES: dict[str, dict[str, Candidate]] = {
    "forward": {
        "direct": Candidate(_refuses_direct, _direct_cuts, _forward_direct),
        "vector": Candidate(_refuses_vector, _vector_cuts, _forward_vector),
    },
    "input_gradient": {
        "direct": Candidate(
            _refuses_direct_gradient, _direct_gradient_cuts, _input_gradient_direct
        ),
    },
    "weight_gradient": {
        "sparse": Candidate(_refuses_weight_gradient, _cuts, _weight_gradient),
    },
}
