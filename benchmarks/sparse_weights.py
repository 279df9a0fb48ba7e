"""Output and input gradient of convs with sparse weights: what `sparse_conv.py --op` measures.

`dense` is XLA's product of dense operands with the masked kernel, in float32 without
TensorFloat-32; `tf32` is the same with it. `compact` is how long the compact form of the kernel
takes alone, and `sparse` all that the sparse convolution takes, that included. `floor` is what the
bytes (operands and result) take at the rate of a device-to-device copy, or the loads from shared
memory at that of a large GPU, four bytes for every product of a kept weight (two, where windows are
taken as a whole), whichever is more.
`error` is what the sparse result differs from the dense one, of the largest value.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from convs import Problem, lines_of_cuts
from jax import lax
from programs import Program
from turn import Turn

from swat_jax import kernels, sparse_conv_direct
from swat_jax.sparse_conv_direct import Cut
from swat_jax.sparsity import compact, top_k
from swat_jax.sparsity.granularity import masked_weights, units, weight_threshold
from swat_jax.timing import Timer
from swat_jax.trial import relative_error

OPS = ("forward", "input_gradient")
# Bytes per millisecond that 132 multiprocessors load from shared memory at 1.755 GHz.
SHARED_RATE = 132 * 128 * 1.755e6
# Shared memory of a block, two of which fit into a multiprocessor of that GPU; cuts of a tile.
SHARED, CUTS_OF_TILE = 113 * 2**10, 4
HEADER = (
    f"{'network':18} {'conv':24} {'s_W':>5} {'dense':>8} {'tf32':>8} {'compact':>8} {'sparse':>8} "
    f"{'floor':>8} {'gain':>6} {'cut':>14} {'error':>8}"
)


def is_mark(problem: Problem) -> bool:
    """Whether it has to be twice as fast as the dense product in float32, at 90 % and forward."""
    return problem.window == (3, 3) and problem.stride == 1 and min(problem.channels) >= 128


def refusal(problem: Problem, op: str, dtype: Any) -> str:
    """Why there is no kernel for it; empty if there is one."""
    refused = {
        "forward": sparse_conv_direct.refusal,
        "input_gradient": sparse_conv_direct.gradient_refusal,
    }[op]
    shape, kernel, _ = problem.shapes
    return refused(problem.conv, shape, dtype, kernel)


def name_of(cut: Cut) -> str:
    """Pixels and output channels of a block, input channels of a chunk, columns; w: windows."""
    return f"{cut.tile[0]}x{cut.tile[1]}/{cut.chunk}/{cut.columns}{'w' if cut.windows else ''}"


def measure(
    problem: Problem,
    op: str,
    dtype: Any,
    sparsities: Sequence[float],
    every_tile: bool,
    copy_rate: float,
    idle: Callable[[], float],
    granularity: str = "unstructured",
    turn: Turn | None = None,
) -> Iterator[dict[str, Any]]:
    """Compiles all programs of a conv. What it returns times them: a row for each sparsity.

    Args:
      problem: the conv.
      op: one of `OPS`.
      dtype: of all operands.
      sparsities: of the kernel, by magnitude.
      every_tile: whether several cuts of every tile are timed.
      copy_rate: bytes per millisecond.
      idle: measures the milliseconds of a turn of a loop without work.
      granularity: of the mask, `unstructured` or `channel`.
      turn: of compiling, where other processes do so too.
    """
    conv, (shape, weights, result) = problem.conv, problem.shapes
    is_forward = op == "forward"

    def operands(keep: jax.Array) -> Any:
        keys = jax.random.split(jax.random.key(0), 2)
        kernel = jax.random.normal(keys[0], weights, dtype) / math.sqrt(math.prod(weights[:-1]))
        limit = weight_threshold(kernel, granularity, keep)
        kernel = masked_weights(kernel, granularity, limit)
        values = jax.random.normal(keys[1], shape if is_forward else result, dtype)
        return values, kernel

    def product(precision: Any, values: Any, kernel: Any) -> Any:
        plain = dataclasses.replace(conv, precision=precision)
        if is_forward:
            return plain(values, kernel)
        like = jax.ShapeDtypeStruct(shape, dtype)
        return jax.linear_transpose(lambda x: plain(x, kernel), like)(values)[0]

    dense = functools.partial(product, lax.Precision.HIGHEST)
    turned, operand, of = conv, shape if is_forward else result, weights
    if not is_forward:
        turned = sparse_conv_direct.transposed(conv, shape[1:-1], weights[:2])
        of = (*weights[:2], weights[3], weights[2])
    windows = granularity == "channel"
    chosen = sparse_conv_direct.cut(turned, operand, of, windows)

    def sparse(cut: Cut, values: Any, kernel: Any) -> Any:
        if is_forward:
            return kernels.sparse_conv_forward(values, kernel, conv, cut)
        return kernels.sparse_conv_input_gradient(values, kernel, conv, problem.size, cut)

    def compacted(kernel: Any) -> Any:
        own = kernel if is_forward else compact.transposed(kernel)
        if chosen.windows:
            own = sparse_conv_direct.by_windows(own)
            found = kernels.compact(own, sparse_conv_direct.WINDOW, chosen.chunk, 1)
        else:
            found = kernels.compact(own, 1, chosen.chunk, sparse_conv_direct.MULTIPLE)
        # Nothing of it is left out, and reading one value of each costs next to nothing.
        return sum(part.ravel()[:1].astype(jnp.float32) for part in lax.optimization_barrier(found))

    cuts = {name_of(chosen): chosen}
    single = sparse_conv_direct.cut(turned, operand, of)
    cuts[name_of(single)] = single  # to compare windows with
    found = sparse_conv_direct.cuts(turned, operand, of, windows, SHARED)
    for tile in {cut.tile for cut in found} if every_tile else ():
        own = [cut for cut in found if cut.tile == tile]
        cuts |= {name_of(cut): cut for cut in own[:CUTS_OF_TILE]}
    count = jax.ShapeDtypeStruct((), jnp.int32)
    values, kernel = jax.eval_shape(operands, count)
    expected = jax.eval_shape(dense, values, kernel)
    make = Program(operands, count)
    compare = Program(
        lambda a, b: relative_error(a, b.astype(jnp.float32)),
        jax.eval_shape(functools.partial(sparse, chosen), values, kernel), expected,
    )  # fmt: skip
    of_cuts = {name: Timer(functools.partial(sparse, cut)) for name, cut in cuts.items()}
    of_dense, of_compact = Timer(dense), Timer(compacted)
    # Without TensorFloat-32 the other types have one product only.
    has_tf32 = jnp.dtype(dtype) == jnp.float32
    of_tf32 = [Timer(functools.partial(product, None))] if has_tf32 else []
    for of_product in (of_dense, *of_tf32, *of_cuts.values()):
        of_product.lower(values, kernel)
    of_compact.lower(kernel)
    (turn or Turn()).compile((of_dense, *of_tf32), (make, compare, of_compact, *of_cuts.values()))
    loads = 2 if chosen.windows else 4

    def rows() -> Iterator[dict[str, Any]]:
        idle_ms = idle()
        for sparsity in sparsities:
            keep = top_k.keep_count(sparsity, units(weights, granularity))
            values, kernel = make(jnp.int32(keep))
            dense_ms, expected = of_dense(values, kernel)
            times, error = {}, jnp.nan
            for name, of_cut in of_cuts.items():
                ms, found = of_cut(values, kernel)
                times[name] = ms - idle_ms
                if name == name_of(chosen):
                    error = compare(found, expected)
                del found  # large, and there may be many cuts
            products = problem.operations / 2 * keep / units(weights, granularity)
            moved = values.dtype.itemsize * sum(map(math.prod, problem.shapes))
            floors = (moved / copy_rate, loads * products / SHARED_RATE)
            yield {
                **dataclasses.asdict(problem),
                "name": problem.name,
                "op": op,
                "granularity": granularity,
                "sparsity": sparsity,
                "dense_ms": dense_ms - idle_ms,
                "tf32_ms": of_tf32[0](values, kernel)[0] - idle_ms if has_tf32 else None,
                "compact_ms": of_compact(kernel)[0] - idle_ms,
                "sparse_ms": times[name_of(chosen)],
                "idle_ms": idle_ms,
                "cut": name_of(chosen),
                "cuts_ms": times,
                "bytes": moved,
                "products": products,
                "error": float(error),
                "floor_ms": max(floors),
                "floor_is": "bytes" if floors[0] > floors[1] else "loads",
            }
            del values, kernel, expected  # before the next ones are made

    return rows()


def lines(row: dict[str, Any]) -> Iterator[str]:
    """A line of the table, and one of all cuts where there are several."""
    tf32 = "" if row["tf32_ms"] is None else f"{row['tf32_ms']:.4f}"
    yield (
        f"{row['network']:18} {row['name']:24} {row['sparsity']:5} {row['dense_ms']:8.4f} "
        f"{tf32:>8} {row['compact_ms']:8.4f} {row['sparse_ms']:8.4f} {row['floor_ms']:8.4f} "
        f"{row['dense_ms'] / row['sparse_ms']:6.2f} {row['cut']:>14} {row['error']:8.1e}"
    )
    yield from lines_of_cuts(row)
