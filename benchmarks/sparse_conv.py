"""Convolutions with a sparse operand, for every conv of the six networks, against cuDNN.

    python benchmarks/sparse_conv.py --output sparse_conv.json    # ResNet-50's 1x1 convs, 90 %
    python benchmarks/sparse_conv.py --tiles --first 4 --output cuts.json
    python benchmarks/sparse_conv.py --op forward --dtype float32 --sparsity 0.7 0.9 0.97

    # All convs of all networks, for docs/sparse_convolutions_sweep.md:
    python benchmarks/sparse_conv.py --all --jobs 12 --sparsity 0.7 0.8 0.9 0.95 0.98 --output ...
    python benchmarks/sparse_conv.py --op forward --dtype float32 --all --jobs 12 --sparsity ...
    python benchmarks/sparse_conv.py --op input_gradient --dtype float32 --all --jobs 12 ...

By default it is about the weight gradient from packed activations (`sparse_activations.py`), with
`--op forward` or `input_gradient` about sparse weights (`sparse_weights.py`), with all windows of
ResNet-50 and WRN-16-8 where nothing else is asked for. Each distinct shape is measured at the batch
that the step table has, the most important ones first. Those that an op does not take are told with
the reason (`refused`).

Compiling takes most of the time. With `--jobs` several processes do so at once, and when all have
compiled for a conv they time their programs one after the other, alone on the GPU. XLA tries
algorithms on the GPU while it compiles cuDNN's convs, and one process at a time does that; with
`--trying` several, which is faster, but may leave cuDNN with an algorithm that is not its best.
Operands are made when they are timed, and given back before the next process does; every process
has its share of the GPU's memory from its start.

The file is written after each round (a conv for every process). A run that finds it there goes on
with the convs that are missing or failed, if device, versions and settings are the same. With
`--seconds` it ends after the round during which that time is over.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import math
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import conv_file
import jax
import jax.numpy as jnp
import rounds
import sparse_activations
import sparse_weights
from convs import NETWORKS, Problem, problems
from turn import Turn
from worker import Worker

from swat_jax import kernels, native
from swat_jax.timing import COUNT, REPEATS, milliseconds, timer

# Of the GPU's memory, for all processes. The rest is for what is not of JAX's pool: contexts, and
# what XLA tries algorithms with.
MEMORY = 0.8


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


def facts(options: argparse.Namespace) -> dict[str, Any]:
    """On what is measured, and how."""
    large = jax.default_backend() == "gpu"
    return {
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "backend": kernels.backend(),
        "library": dict(native.load().build_info),
        "versions": {"jax": jax.__version__},
        "op": options.op,
        "dtype": options.dtype,
        "settings": {
            "sparsity": options.sparsity,
            "tiles": options.tiles,
            "granularity": options.granularity,
            "trying": options.trying,
        },
        "copy_gb_per_s": copy_rate(2**27 if large else 2**16) / 1e6,
        "product_tflop_per_s": product_rate(8192 if large else 64) / 1e9,
    }


def preparing(options: argparse.Namespace, lock: str | None = None) -> rounds.Prepare:
    """What compiles for a conv, or, where a task names none, for `facts`.

    Args:
      options: the command line.
      lock: file that processes lock by turns, if there are several.
    """
    turn, of_idle = Turn(lock), timer(None)
    of_idle.lower()
    of_idle.compile()

    def idle() -> float:
        return of_idle()[0]

    def prepare(task: Mapping[str, Any]) -> Callable[[], Any]:
        if not task:
            return lambda: facts(options)
        problem, rates = Problem.of(task), task["rates"]
        if options.op == sparse_activations.OP:
            rows = sparse_activations.measure(
                problem, options.sparsity, options.tiles, rates, idle, turn
            )
        else:
            rows = sparse_weights.measure(
                problem, options.op, jnp.dtype(options.dtype), options.sparsity, options.tiles,
                rates[0], idle, options.granularity, turn,
            )  # fmt: skip
        return lambda: list(rows)

    return prepare


def processes(options: argparse.Namespace, folder: pathlib.Path) -> rounds.Processes:
    """Processes that measure what this one tells them.

    Args:
      options: the command line.
      folder: for what they print, and what they lock.
    """
    command = [
        *(sys.executable, __file__, "--op", options.op, "--dtype", options.dtype),
        *("--granularity", options.granularity, "--trying", str(options.trying)),
        *("--sparsity", *map(str, options.sparsity), *(("--tiles",) if options.tiles else ())),
    ]
    environment = {"XLA_CLIENT_MEM_FRACTION": f"{MEMORY / options.jobs:.3f}", **os.environ}

    def start(number: int) -> Worker:
        lock = folder / f"lock{number % options.trying}"
        return Worker(
            f"process {number}", [*command, "--worker", str(lock)], environment,
            folder / f"{number}.log", options.timeout,
        )  # fmt: skip

    return rounds.Processes(start, options.jobs)


def refusal(problem: Problem, options: argparse.Namespace) -> str:
    """Why the op does not take a conv; empty if it does."""
    if options.op == sparse_activations.OP:
        return sparse_activations.refusal(problem)
    return sparse_weights.refusal(problem, options.op, jnp.dtype(options.dtype))


def row_of(problem: Problem, **more: Any) -> dict[str, Any]:
    """A conv for which there are no figures."""
    return {**dataclasses.asdict(problem), "name": problem.name, **more}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Convolutions with a sparse operand.")
    ops = (sparse_activations.OP, *sparse_weights.OPS)
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
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile at once")
    parser.add_argument(
        "--trying", type=int, default=1, help="of these, how many try algorithms on the GPU at once"
    )
    parser.add_argument("--timeout", type=float, default=600, help="seconds without an answer")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="end after the round that passes it"
    )
    parser.add_argument("--output", help="JSON file to write, or to go on with")
    parser.add_argument("--worker", metavar="LOCK", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.op == sparse_activations.OP and options.dtype != "bfloat16":
        parser.error(f"{options.op} is measured in bfloat16")
    if min(options.jobs, options.trying) < 1:
        parser.error("--jobs and --trying are 1 or more")
    return options


def run(options: argparse.Namespace, team: rounds.Team) -> None:
    """Measures what the file does not have yet, and writes it.

    Args:
      options: the command line.
      team: who measures.
    """
    start = time.perf_counter()
    (told,) = team.round([{}])
    if "error" in told:
        sys.exit(told["error"])
    found = conv_file.begin(options.output, told["found"])
    rates = (found["copy_gb_per_s"] * 1e6, found["product_tflop_per_s"] * 1e9)
    print(
        f"{found['device']}, {found['backend']}: copy {rates[0] / 1e6:.0f} GB/s, product "
        f"{rates[1] / 1e9:.0f} TFLOP/s"
    )
    is_weights = options.op in sparse_weights.OPS
    networks = ["imagenet_resnet50", "wrn16_8"] if is_weights else ["imagenet_resnet50"]
    networks = options.networks or (list(NETWORKS) if options.all else networks)
    every = problems(networks, options.all or is_weights, options.batch)
    if is_weights:
        every.sort(key=lambda one: not sparse_weights.is_mark(one))
    refused = {problem: reason for problem in every if (reason := refusal(problem, options))}
    known = {Problem.of(row) for row in found["refused"]}
    for problem in refused.keys() - known:
        found["refused"].append(row_of(problem, reason=refused[problem]))
    found["refused"] = conv_file.of_problems(found["refused"], every)
    done = {Problem.of(row) for row in found["convs"]}
    chosen = [problem for problem in every if problem not in refused][: options.first]
    left = [problem for problem in chosen if problem not in done]
    found["left"] = len(left)
    found["failed"] = [row for row in found["failed"] if Problem.of(row) not in left]
    print(f"{len(left)} convs, {len(chosen) - len(left)} are in the file, {len(refused)} refused")
    print((sparse_weights if is_weights else sparse_activations).HEADER)

    def write() -> None:
        if options.output:
            conv_file.write(options.output, found)

    write()
    for first in range(0, len(left), team.jobs):
        group = left[first : first + team.jobs]
        answers = team.round([{**dataclasses.asdict(one), "rates": rates} for one in group])
        took = []
        for problem, told in zip(group, answers, strict=True):
            if "error" in told:
                found["failed"].append(row_of(problem, **told))
                print(f"{problem.network} {problem.name}: {told['error']}", file=sys.stderr)
                continue
            rows = told.pop("found")
            found["convs"] += rows
            took.append({"network": problem.network, "name": problem.name, **told})
            for row in rows:
                told_lines = (sparse_weights if is_weights else sparse_activations).lines(row)
                print(*told_lines, sep="\n", flush=True)
        found["rounds"].append(took)
        found["convs"] = conv_file.of_problems(found["convs"], every)
        found["left"] -= len(group)
        write()
        if time.perf_counter() - start > options.seconds:
            print(f"{options.seconds} s are over", file=sys.stderr)
            return
    print(f"{time.perf_counter() - start:.0f} s")


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.worker:
        rounds.serve(preparing(options, options.worker))
    elif options.jobs == 1:
        run(options, rounds.Here(preparing(options)))
    else:
        # This process leaves the GPU alone.
        with tempfile.TemporaryDirectory() as folder:
            team = processes(options, pathlib.Path(folder))
            with contextlib.closing(team):
                run(options, team)


if __name__ == "__main__":
    main()
