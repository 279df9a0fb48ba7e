"""The weight gradient of every conv of the six networks: from dense and from packed activations.

    python benchmarks/sparse_conv.py --output sparse_conv.json    # ResNet-50's 1x1 convs, 90 %
    python benchmarks/sparse_conv.py --all --tiles --sparsity 0.7 0.8 0.9 0.95 0.98 --output ...
    python benchmarks/sparse_conv.py --op forward --dtype float32 --sparsity 0.7 0.9 0.97

For each distinct shape, at the batch that the step table has: `dense`, XLA's product of dense
operands; `unpack`, the packed input unpacked and the same product; `sparse`, the kernel that reads
the packed input, cut as it chooses, and with `--tiles` with other tiles and blocks;
`nothing`, the same kernel on an input that keeps no value, so what it takes without scattering. The
`floor` is what the bytes (packed input, gradient, result) take at the rate of a device-to-device
copy, or the operations at that of a large matrix product, whichever is more, both measured first.
`error` is what the sparse result differs from the dense one, of the largest value: a rounding to
bfloat16 (0.004) at most, or there is a fault.

With `--op forward` or `input_gradient` it is about sparse weights instead (`sparse_weights.py`),
with all windows of ResNet-50 and WRN-16-8 where nothing else is asked for.

The most important shapes come first. The file is written after each of them, and with `--seconds`
it ends after the row during which that time is over.
"""

import argparse
import dataclasses
import datetime
import functools
import json
import math
import pathlib
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import sparse_weights

from swat_jax import kernels, native, sparse_convolution
from swat_jax.convolution import Convolution
from swat_jax.layer_table import network_table
from swat_jax.sparse_convolution import Cut
from swat_jax.sparsity import packing, top_k
from swat_jax.timing import COUNT, REPEATS, milliseconds, timer
from swat_jax.trial import relative_error

# Images of a step, and what they are: those of docs/performance.md.
NETWORKS: dict[str, tuple[int, int, int]] = {
    "imagenet_resnet50": (256, 224, 1000),
    "imagenet_wrn50_2": (256, 224, 1000),
    "wrn16_8": (512, 32, 10),
    "resnet18": (512, 32, 10),
    "densenet121": (512, 32, 10),
    "vgg16": (512, 32, 10),
}
HEADER = (
    f"{'network':18} {'conv':24} {'s_A':>5} {'dense':>8} {'unpack':>8} {'sparse':>8} "
    f"{'nothing':>8} {'floor':>8} {'gain':>6} {'saves':>6} {'cut':>12} {'error':>8}"
)


@dataclasses.dataclass(frozen=True)
class Problem:
    """The conv of a layer, and how often the network has it."""

    network: str
    batch: int
    window: tuple[int, int]
    channels: tuple[int, int]
    size: tuple[int, int]  # of the input
    result: tuple[int, int]
    stride: int
    layers: int = 1

    @property
    def name(self) -> str:
        height, width = self.window
        inputs, outputs = self.channels
        step = f"/{self.stride}" if self.stride > 1 else ""
        return f"{height}x{width}{step} {inputs}->{outputs} @{self.size[0]}"

    @property
    def conv(self) -> Convolution:
        padding = tuple((extent // 2, extent // 2) for extent in self.window)
        return Convolution((self.stride,) * 2, padding, (1, 1), (1, 1))

    @property
    def operations(self) -> int:
        return 2 * self.batch * math.prod(self.window + self.channels + self.result)

    @property
    def is_mark(self) -> bool:
        """Whether it has to be 1.3 times as fast as from dense operands."""
        narrow, wide = sorted(self.channels)
        where = (narrow, self.size[0]) in ((64, 56), (128, 28))
        return where and wide == 4 * narrow and self.window == (1, 1)


def problems(networks: list[str], every: bool, batch: int | None = None) -> list[Problem]:
    """The distinct convs of networks that the kernel takes, the most important first.

    Args:
      networks: names from `NETWORKS`.
      every: all windows, or 1x1 only.
      batch: of images; None: that of `NETWORKS`.
    """
    counts: dict[Problem, int] = {}
    for network in networks:
        images, size, classes = NETWORKS[network]
        for layer in network_table(network, num_classes=classes, image_shape=(size, size, 3)):
            if layer.kind != "conv" or layer.kernel_shape[-2] % 8:
                continue
            height, width, inputs, outputs = layer.kernel_shape
            # Padded by half the window: the stride is what makes the size of the result.
            stride = -(-layer.input_hw[0] // layer.output_hw[0])
            problem = Problem(
                network, batch or images, (height, width), (inputs, outputs),
                (layer.input_hw[0], layer.input_hw[1]), (layer.output_hw[0], layer.output_hw[1]),
                stride,
            )  # fmt: skip
            if every or problem.window == (1, 1):
                counts[problem] = counts.get(problem, 0) + 1
    found = [dataclasses.replace(one, layers=layers) for one, layers in counts.items()]
    return sorted(found, key=lambda one: (not one.is_mark, math.prod(one.window)))


def copy_rate(values: int) -> float:
    """Bytes per millisecond that a device-to-device copy reads and writes."""
    x = jnp.zeros(values, jnp.bfloat16)
    found = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        jax.block_until_ready([jnp.array(x, copy=True) for _ in range(COUNT)])
        found.append((time.perf_counter() - start) * 1e3 / COUNT)
    return 4 * values / statistics.median(found[1:])


def product_rate(size: int) -> float:
    """Operations per millisecond of a product of bfloat16 matrices."""
    a = jnp.ones((size, size), jnp.bfloat16)
    return 2 * size**3 / milliseconds(jnp.matmul, a, a)


def measure(
    problem: Problem,
    sparsities: Sequence[float],
    every_tile: bool,
    rates: tuple[float, float],
    idle: float,
) -> Iterator[dict[str, Any]]:
    """Lines of the table, one for each sparsity; all run the same compiled programs.

    Args:
      problem: the conv.
      sparsities: of the packed input, for which there is room at the least of them.
      every_tile: whether all tiles are timed.
      rates: bytes and operations per millisecond.
      idle: milliseconds of a turn of a loop without work.
    """
    conv, window = problem.conv, problem.window
    shape = (problem.batch, *problem.size, problem.channels[0])
    size = math.prod(shape)
    kernel = jax.ShapeDtypeStruct((*window, *problem.channels), jnp.bfloat16)
    room = packing.capacity(top_k.keep_count(min(sparsities), size), size)

    @jax.jit
    def make(keep: jax.Array) -> Any:
        keys = jax.random.split(jax.random.key(0), 2)
        x = jax.nn.relu(jax.random.normal(keys[0], shape, jnp.bfloat16))
        dy = jax.random.normal(keys[1], (problem.batch, *problem.result, problem.channels[1]))
        limit = kernels.threshold(x, keep).astype(jnp.float32)
        packed = kernels.pack(x, limit, room)
        return kernels.sparsify(x, limit), packed, limit, dy.astype(jnp.bfloat16)

    def dense(x: Any, dy: Any) -> Any:
        return jax.linear_transpose(lambda value: conv(x, value), kernel)(dy)[0]

    def unpacked(packed: Any, limit: Any, dy: Any) -> Any:
        return dense(kernels.unpack(packed, limit), dy)

    def sparse(cut: Cut, packed: Any, limit: Any, dy: Any) -> Any:
        return kernels.sparse_conv_weight_gradient(packed, limit, dy, conv, window, cut)

    result = (problem.batch, *problem.result, problem.channels[1])
    chosen, *others = sparse_convolution.cuts(conv, shape, result, window)

    of_dense, of_unpacked = timer(dense), timer(unpacked)
    of_cuts = {
        cut.name: timer(functools.partial(sparse, cut))
        for cut in ((chosen, *others) if every_tile else (chosen,))
    }
    none = packing.pack(jnp.zeros(shape, jnp.bfloat16), 1.0, 8)
    for sparsity in sparsities:
        keep = top_k.keep_count(sparsity, size)
        x, packed, limit, dy = make(jnp.int32(keep))
        dense_ms, expected = of_dense(x, dy)
        times = {
            "dense": dense_ms - idle,
            "nothing": of_cuts[chosen.name](none, limit, dy)[0] - idle,
            "unpack": of_unpacked(packed, limit, dy)[0] - idle,
        }
        timed = {name: of_cut(packed, limit, dy) for name, of_cut in of_cuts.items()}
        cuts = {name: ms - idle for name, (ms, _) in timed.items()}
        error = relative_error(timed[chosen.name][1], expected.astype(jnp.float32))
        compact = 2 * keep + size / 8 + 4 * size / packing.TILE
        moved = compact + 2 * dy.size + 4 * math.prod(kernel.shape)
        floors = (moved / rates[0], problem.operations / rates[1])
        yield {
            **dataclasses.asdict(problem),
            "name": problem.name,
            "sparsity": sparsity,
            **{f"{name}_ms": ms for name, ms in times.items()},
            "sparse_ms": cuts[chosen.name],
            "cut": chosen.name,
            "cuts_ms": cuts,
            "bytes": moved,
            "operations": problem.operations,
            "floor_ms": max(floors),
            "floor_is": "bytes" if floors[0] > floors[1] else "operations",
            "error": float(error),
        }
        del x, packed, limit, dy, expected, timed  # before the next ones are made


def lines(row: dict[str, Any]) -> Iterator[str]:
    """A line of the table, and one of all cuts where there are several."""
    yield (
        f"{row['network']:18} {row['name']:24} {row['sparsity']:5} {row['dense_ms']:8.4f} "
        f"{row['unpack_ms']:8.4f} {row['sparse_ms']:8.4f} {row['nothing_ms']:8.4f} "
        f"{row['floor_ms']:8.4f} {row['dense_ms'] / row['sparse_ms']:6.2f} "
        f"{row['unpack_ms'] / row['sparse_ms']:6.2f} {row['cut']:>12} {row['error']:8.1e}"
    )
    if len(row["cuts_ms"]) > 1:
        best = sorted(row["cuts_ms"].items(), key=lambda one: one[1])
        yield "    " + "  ".join(f"{name} {ms:.4f}" for name, ms in best)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Convolutions with a sparse operand.")
    ops = ("weight_gradient", *sparse_weights.OPS)
    parser.add_argument("--op", default=ops[0], choices=ops, help="default: %(default)s")
    dtypes = ("bfloat16", "float16", "float32")
    parser.add_argument("--dtype", default=dtypes[0], choices=dtypes, help="default: %(default)s")
    masks = ("unstructured", "channel")
    parser.add_argument("--granularity", default=masks[0], choices=masks, help="of sparse weights")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS)
    parser.add_argument(
        "--all", action="store_true", help="all windows, and by default all networks"
    )
    parser.add_argument("--tiles", action="store_true", help="other tiles too")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.9])
    parser.add_argument("--batch", type=int, help="images; default: those of the step table")
    parser.add_argument("--first", type=int, help="only so many shapes")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="end after the row that passes it"
    )
    parser.add_argument("--output", help="JSON file to write")
    options = parser.parse_args(arguments)
    if options.op == "weight_gradient" and options.dtype != "bfloat16":
        parser.error("weight_gradient is measured in bfloat16")
    start = time.perf_counter()
    large = jax.default_backend() == "gpu"
    rates = (copy_rate(2**27 if large else 2**16), product_rate(8192 if large else 64))
    idle = milliseconds(None)
    found: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "backend": kernels.backend(),
        "library": dict(native.load().build_info),
        "versions": {"jax": jax.__version__},
        "op": options.op,
        "dtype": options.dtype,
        "copy_gb_per_s": rates[0] / 1e6,
        "product_tflop_per_s": rates[1] / 1e9,
        "idle_ms": idle,
        "convs": [],
    }
    print(
        f"{found['device']}, {found['backend']}: copy {rates[0] / 1e6:.0f} GB/s, product "
        f"{rates[1] / 1e9:.0f} TFLOP/s, idle {idle:.4f} ms"
    )
    is_weights = options.op in sparse_weights.OPS
    print(sparse_weights.HEADER if is_weights else HEADER)
    networks = ["imagenet_resnet50", "wrn16_8"] if is_weights else ["imagenet_resnet50"]
    networks = options.networks or (list(NETWORKS) if options.all else networks)
    chosen = problems(networks, options.all or is_weights, options.batch)
    dtype = jnp.dtype(options.dtype)
    if is_weights:
        chosen = [one for one in chosen if sparse_weights.takes(one, options.op, dtype)]
        chosen.sort(key=lambda one: not sparse_weights.is_mark(one))
    for problem in chosen[: options.first]:
        if is_weights:
            rows = sparse_weights.measure(
                problem, options.op, dtype, options.sparsity, options.tiles, rates[0], idle,
                options.granularity,
            )  # fmt: skip
        else:
            rows = measure(problem, options.sparsity, options.tiles, rates, idle)
        for row in rows:
            found["convs"].append(row)
            print(*(sparse_weights.lines if is_weights else lines)(row), sep="\n", flush=True)
            if options.output:
                pathlib.Path(options.output).write_text(json.dumps(found, indent=2) + "\n")
            if time.perf_counter() - start > options.seconds:
                print(f"{options.seconds} s are over", file=sys.stderr)
                return
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
