"""Convolutions with weights kept as vectors of output channels, against cuDNN on masked weights.

    python benchmarks/sparse_conv_vector.py --tiles --output vectors.json    # WRN-16-8, 80 %
    python benchmarks/sparse_conv_vector.py --networks vgg16 resnet18 imagenet_resnet50
    python benchmarks/sparse_conv_vector.py --sparsity 0.7 0.8 0.9 --first 3

For each distinct shape, at the batch that the step table has, in bfloat16: `dense`, cuDNN with the
masked weights; `sparse`, the kernels that skip vectors of zeros, cut as they choose; `lists`, the
part of that which finds what is kept; `rate`, the TFLOP/s of what is kept. With `--tiles` every cut
is timed, and smaller chunks of input channels. The `floor` is what the bytes (input, output, what
is kept of the weights) take at the rate of a device-to-device copy, or the operations with what is
kept at that of a large matrix product, whichever is more, both measured first. `error` is what the
result differs from the dense one, of the largest value: a rounding to bfloat16 (0.008) at most, or
there is a fault.

The mark, 1.4 times as fast as cuDNN at 80 %, is on WRN-16-8's three 3x3 shapes, which come first.
The file is written after each shape, and with `--seconds` nothing is begun when that time is over.
"""

import argparse
import dataclasses
import datetime
import functools
import json
import math
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from convs import NETWORKS, Problem, lines_of_cuts, problems
from rates import device_rates

from swat_jax import kernels, native, vector_convolution
from swat_jax.kernels.vector import shared_room, vector_lists, vector_options
from swat_jax.timing import Timer, milliseconds
from swat_jax.trial import relative_error
from swat_jax.vector_convolution import VECTORS, Cut

HEADER = (
    f"{'network':18} {'conv':24} {'V':>2} {'s_W':>4} {'dense':>8} {'sparse':>8} {'lists':>8} "
    f"{'floor':>8} {'rate':>5} {'gain':>5} {'cut':>15} {'error':>8}"
)


def is_mark(problem: Problem) -> bool:
    """Whether it has to be 1.4 times as fast as with dense weights."""
    inputs, outputs = problem.channels
    is_plain = problem.window == (3, 3) and problem.stride == 1 and inputs == outputs
    return problem.network == "wrn16_8" and is_plain


def takes(problem: Problem, vector: int) -> bool:
    """Whether there is a kernel for it on this device."""
    x, kernel, _ = problem.shapes
    room = shared_room()
    return not vector_convolution.refusal(problem.conv, x, jnp.bfloat16, kernel, vector, room)


def name_of(cut: Cut) -> str:
    """Lines, their pixels and channels of a block; lines of an image; channels that are staged."""
    return f"{'x'.join(map(str, cut.tile))}/{cut.height}/{cut.chunk}"


def cuts(problem: Problem, every: bool) -> list[Cut]:
    """What is timed, the choice first."""
    x, kernel, _ = problem.shapes
    room = shared_room()
    found = [vector_convolution.cut(problem.conv, x, kernel, room)]
    for cut in vector_convolution.cuts(problem.conv, x, kernel, room) if every else ():
        found += [cut] if cut.chunk == 32 else [cut, dataclasses.replace(cut, chunk=cut.chunk // 2)]
    return list(dict.fromkeys(found))


def measure(
    problem: Problem,
    vectors: list[int],
    sparsities: list[float],
    every_cut: bool,
    rates: tuple[float, float],
    idle: float,
) -> Iterator[dict[str, Any]]:
    """A line of the table for every vector and sparsity.

    Args:
      problem: the conv.
      vectors: output channels that are kept or dropped together.
      sparsities: of the kernel; what is kept is drawn.
      every_cut: whether all cuts are timed.
      rates: bytes and operations per millisecond.
      idle: milliseconds of a turn of a loop without work.
    """
    conv, (shape, kernel_shape, _) = problem.conv, problem.shapes
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.jit(lambda: jax.nn.relu(jax.random.normal(keys[0], shape, jnp.bfloat16)))()
    full = jax.random.normal(keys[1], kernel_shape).astype(jnp.bfloat16)
    of_dense = Timer(conv)
    dense_ms = of_dense(x, full)[0] - idle
    chosen = name_of(cuts(problem, every=False)[0])
    for vector in vectors:
        if not takes(problem, vector):
            continue
        op = functools.partial(kernels.sparse_conv_vector_forward, conv=conv, vector=vector)
        timers = {
            name_of(cut): (
                Timer(functools.partial(op, cut=cut)), lists_timer(problem, vector, cut)
            )
            for cut in cuts(problem, every_cut)
        }  # fmt: skip
        for sparsity in sparsities:
            groups = (*kernel_shape[:-1], kernel_shape[-1] // vector)
            kept = jax.random.bernoulli(keys[2], 1 - sparsity, groups)
            kernel = full * jnp.repeat(kept, vector, -1).astype(full.dtype)
            count = int(jnp.sum(kept)) * vector
            timed = {name: of_cut(x, kernel) for name, (of_cut, _) in timers.items()}
            times = {name: ms - idle for name, (ms, _) in timed.items()}
            lists = {name: of_lists(kernel) - idle for name, (_, of_lists) in timers.items()}
            y = timed[chosen][1]
            operations = problem.operations * count / kernel.size
            moved = 2 * (x.size + y.size + count) + 4 * count / vector
            floors = (moved / rates[0], operations / rates[1])
            yield {
                **dataclasses.asdict(problem),
                "name": problem.name,
                "vector": vector,
                "sparsity": sparsity,
                "dense_ms": dense_ms,
                "sparse_ms": times[chosen],
                "lists_ms": lists[chosen],
                "cut": chosen,
                "cuts_ms": times,
                "cuts_lists_ms": lists,
                "bytes": moved,
                "operations": operations,
                "floor_ms": max(floors),
                "floor_is": "bytes" if floors[0] > floors[1] else "operations",
                "error": float(relative_error(y, of_dense(x, kernel)[1].astype(jnp.float32))),
            }


def lists_timer(problem: Problem, vector: int, cut: Cut) -> Callable[[jax.Array], float]:
    """Milliseconds of the first of the two kernels alone; nothing where there are none."""
    if kernels.backend() != "cuda":
        return lambda _: 0.0
    options = vector_options(problem.conv, *problem.shapes[:2], vector, cut)
    of_lists = Timer(lambda one: vector_lists(one, vector, cut, options)[0])
    return lambda kernel: of_lists(kernel)[0]


def lines(row: dict[str, Any]) -> Iterator[str]:
    """A line of the table, and one of all cuts where there are several."""
    yield (
        f"{row['network']:18} {row['name']:24} {row['vector']:2} {row['sparsity']:4} "
        f"{row['dense_ms']:8.4f} {row['sparse_ms']:8.4f} {row['lists_ms']:8.4f} "
        f"{row['floor_ms']:8.4f} {row['operations'] / row['sparse_ms'] / 1e9:5.0f} "
        f"{row['dense_ms'] / row['sparse_ms']:5.2f} {row['cut']:>15} {row['error']:8.1e}"
    )
    yield from lines_of_cuts(row)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Convolutions with vectors of weights.")
    parser.add_argument("--networks", nargs="+", default=["wrn16_8"], choices=NETWORKS)
    parser.add_argument("--vectors", type=int, nargs="+", default=[16, 32, 8], choices=VECTORS)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.8])
    parser.add_argument("--tiles", action="store_true", help="every cut, not the chosen one only")
    parser.add_argument("--batch", type=int, help="images; default: those of the step table")
    parser.add_argument("--first", type=int, help="only so many shapes")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin nothing afterwards")
    parser.add_argument("--output", help="JSON file to write")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    rates = device_rates()
    idle = milliseconds(None)
    found: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "backend": kernels.backend(),
        "library": dict(native.load().build_info),
        "versions": {"jax": jax.__version__},
        "dtype": "bfloat16",
        "copy_gb_per_s": rates[0] / 1e6,
        "product_tflop_per_s": rates[1] / 1e9,
        "idle_ms": idle,
        "convs": [],
    }
    print(
        f"{found['device']}, {found['backend']}: copy {rates[0] / 1e6:.0f} GB/s, product "
        f"{rates[1] / 1e9:.0f} TFLOP/s, idle {idle:.4f} ms"
    )
    print(HEADER)
    every = problems(options.networks, True, options.batch)
    chosen = [one for one in every if any(takes(one, vector) for vector in options.vectors)]
    chosen.sort(key=lambda one: (not is_mark(one), one.window != (3, 3)))
    for problem in chosen[: options.first]:
        if time.perf_counter() - start > options.seconds:
            print(f"{options.seconds} s are over", file=sys.stderr)
            return
        for row in measure(problem, options.vectors, options.sparsity, options.tiles, rates, idle):
            found["convs"].append(row)
            print(*lines(row), sep="\n", flush=True)
        if options.output:
            pathlib.Path(options.output).write_text(json.dumps(found, indent=2) + "\n")
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
