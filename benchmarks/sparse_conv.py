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
algorithms on the GPU while it compiles cuDNN's convs, and one process at a time does that, or cuDNN
might be left with an algorithm that is not its best. Operands are made when they are timed, and
given back before the next process does; every process has its share of the GPU's memory from its
start.

The file is written after each round (a conv for every process). A run that finds it there goes on
with the convs that are missing or failed, if device, versions and settings are the same; to measure
anew, give another file or remove it. With `--seconds` it ends after the round during which that
time is over.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import math
import os
import pathlib
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
from rates import device_rates
from turn import Turn
from worker import Worker

from swat_jax import kernels, native
from swat_jax.files import replace_text
from swat_jax.timing import Timer

# Of the GPU's memory, for all processes. The rest is for their contexts.
MEMORY = 0.8
# Who says how much of it a process takes, if the user does.
SHARES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


def facts(options: argparse.Namespace) -> dict[str, Any]:
    """On what is measured, and how."""
    copies, products = device_rates()
    return {
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "backend": kernels.backend(),
        "library": dict(native.load().build_info),
        "versions": {"jax": jax.__version__, **cudnn()},
        "op": options.op,
        "dtype": options.dtype,
        "copy_gb_per_s": copies / 1e6,
        "product_tflop_per_s": products / 1e9,
    }


def cudnn() -> dict[str, str]:
    """The version of cuDNN's package, if it is one."""
    names = ("nvidia-cudnn-cu12", "nvidia-cudnn-cu13")
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """Which convs are measured, and what of them."""
    is_weights = options.op in sparse_weights.OPS
    networks = ["imagenet_resnet50", "wrn16_8"] if is_weights else ["imagenet_resnet50"]
    return {
        "networks": options.networks or (list(NETWORKS) if options.all else networks),
        "every_window": options.all or is_weights,
        "batch": options.batch,
        "first": options.first,
        "sparsity": options.sparsity,
        "tiles": options.tiles,
        "granularity": options.granularity,
    }


def preparing(options: argparse.Namespace, lock: str | None = None) -> rounds.Prepare:
    """What compiles for a conv, or, where a task names none, for `facts`.

    Args:
      options: the command line.
      lock: file that processes lock by turns, if there are several.
    """
    turn, of_idle = Turn(lock), Timer(None)
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
        *("--granularity", options.granularity),
        *("--sparsity", *map(str, options.sparsity), *(("--tiles",) if options.tiles else ())),
        *("--worker", str(folder / "lock")),
    ]
    environment = dict(os.environ)
    if not any(name in environment for name in SHARES):
        environment[SHARES[0]] = f"{MEMORY / options.jobs:.3f}"

    def start(number: int) -> Worker:
        log = folder / f"{number}.log"
        return Worker(f"process {number}", command, environment, log, options.timeout)

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
        "--timeout",
        type=float,
        default=600,
        help="seconds that compiling or timing a conv may take",
    )
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="end after the round that passes it"
    )
    parser.add_argument("--output", help="JSON file to write, or to go on with")
    parser.add_argument("--worker", metavar="LOCK", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.op == sparse_activations.OP and options.dtype != "bfloat16":
        parser.error(f"{options.op} is measured in bfloat16")
    if options.jobs < 1:
        parser.error("--jobs is 1 or more")
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
    chosen = settings(options)
    found = conv_file.begin(options.output, {**told["found"], "settings": chosen})
    rates = (found["copy_gb_per_s"] * 1e6, found["product_tflop_per_s"] * 1e9)
    print(
        f"{found['device']}, {found['backend']}: copy {rates[0] / 1e6:.0f} GB/s, product "
        f"{rates[1] / 1e9:.0f} TFLOP/s"
    )
    every = problems(chosen["networks"], chosen["every_window"], chosen["batch"])
    measured = sparse_activations
    if options.op in sparse_weights.OPS:
        measured = sparse_weights
        every.sort(key=lambda one: not sparse_weights.is_mark(one))
    refused = {problem: reason for problem in every if (reason := refusal(problem, options))}
    found["refused"] = [row_of(problem, reason=refused[problem]) for problem in refused]
    done = {Problem.of(row) for row in found["convs"]}
    taken = [problem for problem in every if problem not in refused][: options.first]
    left = [problem for problem in taken if problem not in done]
    found["left"], found["failed"] = len(left), []  # what failed is tried again
    print(f"{len(left)} convs, {len(done)} are in the file, {len(refused)} refused")
    print(measured.HEADER)

    def write() -> None:
        if options.output:
            replace_text(pathlib.Path(options.output), json.dumps(found, indent=1) + "\n")

    write()
    for first in range(0, len(left), team.jobs):
        group = left[first : first + team.jobs]
        answers = team.round([{**dataclasses.asdict(one), "rates": rates} for one in group])
        took = []
        for problem, told in zip(group, answers, strict=True):
            if "error" in told:
                found["failed"].append(row_of(problem, error=told["error"]))
                name = f"{problem.network} {problem.name}"
                print(*told["stderr"], f"{name}: {told['error']}", sep="\n", file=sys.stderr)
                continue
            rows = told.pop("found")
            found["convs"] += rows
            found["date"] = datetime.date.today().isoformat()
            took.append({"network": problem.network, "name": problem.name, **told})
            for row in rows:
                print(*measured.lines(row), sep="\n", flush=True)
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
