"""Several runs at once on one GPU: processes, or seeds under `jax.vmap` in one program.

    python benchmarks/several_runs.py --network cifar10_resnet18:128 --method channel70 \
        --at_once 1 2 4 --output docs/results/several_runs_h200.json

A small network leaves a large GPU idle between its kernels. What counts is the images per second
of all runs together, on synthetic images that lie on the device, with augmentation and a hundred
steps per dispatch. All processes are compiled before the first is timed, and of a row the time
counts in which all of its processes work.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import itertools
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
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

    from swat_jax import training_setup

    name, batch = network.split(":")
    first = training_step.make(name, method, int(batch))
    if not isinstance(first, training_step.ResidentSteps):
        sys.exit(f"--network {network}: only small batches of CIFAR are trained on resident data")
    arguments = (*first.batches[0], first.order)
    state, compiled, first.state = first.state, first.compiled, None
    if count > 1:
        states = [state]
        for seed in range(1, count):
            config = first.config.copy_and_resolve_references()
            config.seed = seed
            states.append(training_setup.make_trainer(config, first.info, first.trainer.mesh)[1]())
        state, batched = together(first.trainer, states, first.steps)
        compiled = jax.jit(batched, donate_argnums=0).lower(state, *arguments).compile()

    def work(seconds: float) -> list[float]:
        """When it began, and when each dispatch ended, on the clock of all processes."""
        nonlocal state
        ends = [time.monotonic()]
        while len(ends) < 3 or ends[-1] - ends[0] < seconds:
            state, metrics = compiled({**state, "step": jnp.zeros_like(state["step"])}, *arguments)
            jax.block_until_ready(metrics)
            ends.append(time.monotonic())
        return ends

    work(0)
    facts = {
        "device": jax.devices()[0].device_kind,
        "steps_per_dispatch": first.steps,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")},
    }
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:
        print(json.dumps({"ends": work(float(line))}), flush=True)


def together(trainer: Any, states: list[Any], steps: int) -> tuple[Any, Callable[..., Any]]:
    """The states of several seeds as one, and the function that trains them all.

    Args:
      trainer: of a config; seeds differ in their states alone.
      states: one of each seed, all at the same step.
      steps: to train at once.

    Returns:
      The state, and ``(state, images, labels, order) -> (state, metrics)``, metrics (seeds, steps).
    """
    import jax
    import jax.numpy as jnp

    # What all have in common has no axis of its own, so that branches on it stay branches.
    common = ("step", "stale")
    stacked = {
        key: states[0][key]
        if key in common
        else jax.tree.map(lambda *leaves: jnp.stack(leaves), *[one[key] for one in states])
        for key in states[0]
    }
    axes = {key: None if key in common else 0 for key in stacked}

    def train(state: Any, images: Any, labels: Any, order: Any) -> tuple[Any, Any]:
        return trainer.train_steps(state, images, labels, order, steps)

    return stacked, jax.vmap(train, in_axes=(axes, None, None, None), out_axes=(axes, 0))


def mps_folder() -> pathlib.Path:
    """Where NVIDIA's MPS has its pipes while it runs."""
    return pathlib.Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"))


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


def measure(
    row: Row, processes: list[subprocess.Popen[str]], steps: int, options: Any
) -> dict[str, Any]:
    """Images per second of all runs of a row together, of ``steps`` in each dispatch."""
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(f"{options.seconds}\n")
        process.stdin.flush()
    found = [answer(process)["ends"] for process in processes]
    batch = int(options.network.split(":")[1])
    seeds = row.at_once if row.way == "vmap" else 1
    rate = dispatches_per_second(found) * steps * batch * seeds
    return {"way": row.way, "at_once": row.at_once, "images_per_second": rate}


def dispatches_per_second(found: Sequence[Sequence[float]]) -> float:
    """Of all processes together, while all of them worked.

    Args:
      found: of each process when it began, and when each of its dispatches ended.
    """
    begin, end = max(ends[0] for ends in found), min(ends[-1] for ends in found)
    if begin >= end:
        sys.exit("the processes did not work at the same time: give more --seconds")
    total = 0.0
    for ends in found:
        for start, stop in itertools.pairwise(ends):
            # Of one that was under way at either end, the part that lies between.
            total += max(0.0, min(stop, end) - max(start, begin)) / (stop - start)
    return total / (end - begin)


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
    counts = [count for count in options.at_once if count > 1] if "vmap" in options.ways else []
    members: list[subprocess.Popen[str]] = []
    try:
        for count in (*[1] * most, *counts):
            members.append(start(options, count))
        alone, seeds = members[:most], dict(zip(counts, members[most:], strict=True))
        compiled = [answer(process) for process in members]
        steps = compiled[0]["steps_per_dispatch"]
        rows = []
        for count in options.at_once:
            if "processes" in options.ways or count == 1:
                rows.append(measure(Row("processes", count), alone[:count], steps, options))
            if count in seeds:
                rows.append(measure(Row("vmap", count), [seeds[count]], steps, options))
    finally:
        for process in members:
            process.kill()
            process.communicate()
    report = {
        "date": datetime.date.today().isoformat(),
        **compiled[0],
        "network": options.network,
        "method": options.method,
        "mps": (mps_folder() / "control").exists(),
        "rows": rows,
    }
    if options.output:
        pathlib.Path(options.output).write_text(json.dumps(report, indent=2) + "\n")
    print(f"{options.network} {options.method}, {compiled[0]['device']}")
    for row in rows:
        print(f"{row['at_once']:3} {row['way']:10} {row['images_per_second']:10.0f} images/s")


if __name__ == "__main__":
    main()
