"""How much of a small training step is launching: XLA's CUDA graphs off, as they are, and more.

    python benchmarks/cuda_graphs.py --output docs/results/cuda_graphs_h200.json
    python benchmarks/cuda_graphs.py --networks cifar10_resnet18:128 --graphs default convolutions

Steps as in `benchmarks/steps.py`, all ways of a network in one group, timed in turn. XLA puts
kernels that follow each other into a graph; a convolution ends it, unless it is told otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import steps

FLAG = "--xla_gpu_enable_command_buffer="
# What is added to the environment's XLA_FLAGS.
GRAPHS = {"none": FLAG, "default": "", "convolutions": f"{FLAG}+CONVOLUTION"}


@contextlib.contextmanager
def xla_flags(more: str) -> Iterator[None]:
    """Adds flags for processes that are started within."""
    before = os.environ.get("XLA_FLAGS")
    os.environ["XLA_FLAGS"] = f"{before or ''} {more}".strip()
    try:
        yield
    finally:
        del os.environ["XLA_FLAGS"]
        if before is not None:
            os.environ["XLA_FLAGS"] = before


def measure(network: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of a network; of dense with graphs of convolutions, too, though that may fail."""
    with contextlib.ExitStack() as stack:
        members: list[tuple[str, steps.Member]] = []
        for method in options.methods:
            for graphs in options.graphs:
                folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
                with xla_flags(GRAPHS[graphs]):
                    member = steps.Member(network, method, options, folder)
                stack.callback(member.close)
                members.append((graphs, member))
                if len(members) == 1:  # it chooses XLA's algorithms on an idle GPU
                    member.compiled()
        steps.time_group([member for _, member in members], options.rounds)
        return [
            {"graphs": graphs, **steps.row(member, member.times, None)}
            for graphs, member in members
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Training steps with CUDA graphs or without.")
    networks = ["cifar10_resnet18:128", "cifar10_vgg16:128", "cifar10_densenet121:128"]
    parser.add_argument("--networks", nargs="+", default=networks, help="CONFIG:BATCH ...")
    parser.add_argument("--methods", nargs="+", default=["dense", "u90"], choices=steps.METHODS)
    parser.add_argument("--graphs", nargs="+", default=list(GRAPHS), choices=GRAPHS)
    parser.add_argument("--rounds", type=int, default=2, help="how often each is timed")
    parser.add_argument("--steps", type=int, default=100, help="timed steps of each round")
    parser.add_argument("--timeout", type=float, default=400, help="seconds without an answer")
    parser.add_argument("--cache", help="folder for compiled programs; by default one that goes")
    parser.add_argument("--output", help="JSON file to write")
    options = parser.parse_args()
    rows = []
    for network in options.networks:
        for row in measure(network, options):
            rows.append(row)
            told = row.get("error") or f"{row['ms']:8.3f} ms"
            print(f"{network:26} {row['method']:8} {row['graphs']:14} {told}", flush=True)
    if options.output:
        found = json.dumps(steps.report(rows), indent=1)
        pathlib.Path(options.output).write_text(found + "\n")


if __name__ == "__main__":
    main()
