"""Several runs at once on one GPU: processes, or seeds under `jax.vmap` in one program.

    python benchmarks/several_runs.py --network cifar10_resnet18:128 --method channel70 \
        --at_once 1 2 4 --output docs/results/several_runs_h200.json

A small network leaves a large GPU idle between its kernels. What counts is the images per second
of all runs together, on synthetic images that lie on the device, with augmentation and as many
steps per dispatch as in training. All processes are compiled before the first is timed, and all of
a row work during the whole time that is measured.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any, NamedTuple

WAYS = ("processes", "vmap")


class Row(NamedTuple):
    """A way of running so many at once."""

    way: str
    at_once: int


def run_one(network: str, method: str, count: int) -> None:
    """A process of ``count`` runs under vmap: compiles, then works as long as a line asks for."""
    import jax
    import jax.numpy as jnp
    import training_step

    several = [
        training_step.make(*network_and_method(network, method), settings={"seed": seed})
        for seed in range(count)
    ]
    first = several[0]
    if not isinstance(first, training_step.ResidentSteps):
        sys.exit(f"--network {network}: only small batches of CIFAR are trained on resident data")
    steps = first.steps

    def train(state: Any, images: Any, labels: Any, order: Any) -> tuple[Any, Any]:
        return first.trainer.train_steps(state, images, labels, order, steps)

    arguments = (*first.batches[0], first.order)
    state, compiled = first.state, first.compiled
    if count > 1:
        # What all have in common has no axis of its own, so that branches on it stay branches.
        common = ("step", "stale")
        states = [one.state for one in several]
        state = {
            key: states[0][key]
            if key in common
            else jax.tree.map(lambda *leaves: jnp.stack(leaves), *[one[key] for one in states])
            for key in states[0]
        }
        axes = {key: None if key in common else 0 for key in state}
        batched = jax.vmap(train, in_axes=(axes, None, None, None), out_axes=(axes, 0))
        compiled = jax.jit(batched, donate_argnums=0).lower(state, *arguments).compile()
    for one in several:
        one.state = None

    def work(seconds: float) -> tuple[int, float]:
        nonlocal state
        done, start = 0, time.perf_counter()
        while not done or time.perf_counter() - start < seconds:
            state, metrics = compiled({**state, "step": jnp.zeros_like(state["step"])}, *arguments)
            jax.block_until_ready(metrics)
            done += steps
        return done, time.perf_counter() - start

    work(0)
    facts = {
        "device": jax.devices()[0].device_kind,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")},
    }
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:
        done, seconds = work(float(line))
        print(json.dumps({"steps": done, "seconds": seconds}), flush=True)


def network_and_method(network: str, method: str) -> tuple[str, str, int]:
    """Arguments of `training_step.make`."""
    name, batch = network.split(":")
    return name, method, int(batch)


def start(options: argparse.Namespace, count: int) -> subprocess.Popen[str]:
    """A process of `run_one`."""
    command = [sys.executable, __file__, "--one", str(count)]
    return subprocess.Popen(
        [*command, "--network", options.network, "--method", options.method],
        env={**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Its next line of JSON."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            return json.loads(line)
    sys.exit(f"a run ended with code {process.wait()}, see above")


def measure(row: Row, processes: list[subprocess.Popen[str]], options: Any) -> dict[str, Any]:
    """Images per second of all runs of a row together."""
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(f"{options.seconds}\n")
        process.stdin.flush()
    found = [answer(process) for process in processes]
    batch = int(options.network.split(":")[1])
    seeds = row.at_once if row.way == "vmap" else 1
    total = sum(one["steps"] * batch * seeds / one["seconds"] for one in found)
    return {"way": row.way, "at_once": row.at_once, "images_per_second": total}


def main() -> None:
    parser = argparse.ArgumentParser(description="Images per second of several runs at once.")
    parser.add_argument("--network", default="cifar10_resnet18:128", help="CONFIG:BATCH")
    parser.add_argument("--method", default="channel70")
    parser.add_argument("--at_once", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--seconds", type=float, default=8, help="each is timed for")
    parser.add_argument("--output", help="JSON file to write")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        run_one(options.network, options.method, options.one)
        return
    most = max(options.at_once) if "processes" in options.ways else 1
    alone = [start(options, 1) for _ in range(most)]
    counts = [count for count in options.at_once if count > 1] if "vmap" in options.ways else []
    together = {count: start(options, count) for count in counts}
    members = [*alone, *together.values()]
    try:
        compiled = [answer(process) for process in members]
        rows = []
        for count in options.at_once:
            if "processes" in options.ways or count == 1:
                rows.append(measure(Row("processes", count), alone[:count], options))
            if count in together:
                rows.append(measure(Row("vmap", count), [together[count]], options))
    finally:
        for process in members:
            process.kill()
            process.communicate()
    report = {
        "date": datetime.date.today().isoformat(),
        **compiled[0],
        "network": options.network,
        "method": options.method,
        "mps": "CUDA_MPS_PIPE_DIRECTORY" in os.environ,
        "rows": rows,
    }
    if options.output:
        pathlib.Path(options.output).write_text(json.dumps(report, indent=2) + "\n")
    print(f"{options.network} {options.method}, {compiled[0]['device']}")
    for row in rows:
        print(f"{row['at_once']:3} {row['way']:10} {row['images_per_second']:10.0f} images/s")


if __name__ == "__main__":
    main()
