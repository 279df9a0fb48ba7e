"""Where the time of a training step goes: its kernels by time, as the device reports them.

    python benchmarks/step_profile.py --network imagenet_resnet50:256 --method u90

Launches are traced one by one, without CUDA graphs: the sum is device time, not wall time.
"""

import argparse
import collections
import json
import os
import pathlib
import tempfile
from typing import Any

# Kernels inside a CUDA graph carry no names of the program.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_command_buffer="

import jax
import training_step


def kernel_times(folder: str) -> list[tuple[str, str, int]]:
    """(kernel, operation of the program, nanoseconds) of every launch that was traced."""
    (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
    found = []
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        for line in plane.lines:
            if "Stream" not in line.name:
                continue
            for event in line.events:
                facts = dict(event.stats)
                operation = str(facts.get("hlo_op", ""))
                found.append((event.name, operation, int(event.duration_ns)))
    return found


def short(kernel: str) -> str:
    """The name without its arguments."""
    return kernel.replace("void ", "").split("(")[0][:72]


def main() -> None:
    parser = argparse.ArgumentParser(description="Kernels of a training step by time.")
    parser.add_argument("--network", default="imagenet_resnet50:256", help="CONFIG:BATCH")
    parser.add_argument("--method", default="u90")
    parser.add_argument("--exact", action="store_true", help="exact thresholds at every step")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=JSON", help="config values")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--top", type=int, default=40)
    parser.add_argument("--hlo", help="file for the compiled program")
    parser.add_argument("--launches", help="file for all launches of the last step, as JSON")
    options = parser.parse_args()
    name, batch = options.network.split(":")
    settings: dict[str, Any] = {}
    for pair in options.set:
        key, value = pair.split("=", 1)
        settings[key] = json.loads(value)
    if options.exact:
        settings["sparsity.threshold_every_steps"] = 1
    measured = training_step.make(name, options.method, int(batch), settings=settings)
    if options.hlo:
        pathlib.Path(options.hlo).write_text(measured.compiled.as_text())
    measured.milliseconds(2, refresh=True)
    wall = measured.milliseconds(10)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            measured.milliseconds(options.steps)
        launches = kernel_times(folder)
    if options.launches:
        rows = [[short(kernel), op, ns] for kernel, op, ns in launches]
        pathlib.Path(options.launches).write_text(json.dumps(rows))
    total: collections.Counter[str] = collections.Counter()
    count: collections.Counter[str] = collections.Counter()
    for kernel, _, nanoseconds in launches:
        total[short(kernel)] += nanoseconds
        count[short(kernel)] += 1
    everything = sum(total.values()) / options.steps / 1e6
    print(
        f"{options.network} {options.method}: {wall:.2f} ms a step, {everything:.2f} ms of kernels"
    )
    print(f"{'ms':>8} {'launches':>8}  kernel")
    for kernel, nanoseconds in total.most_common(options.top):
        number = count[kernel] / options.steps
        print(f"{nanoseconds / options.steps / 1e6:8.3f} {number:8.0f}  {kernel}")


if __name__ == "__main__":
    main()
