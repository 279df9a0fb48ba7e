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


def kernel_times(folder: str) -> list[tuple[int, int, str, str]]:
    """(start, duration, kernel, operation of the program) of every launch, in ns, by time."""
    (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
    found = []
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        for line in plane.lines:
            if "Stream" not in line.name:
                continue
            for event in line.events:
                operation = next((str(v) for key, v in event.stats if key == "hlo_op"), "")
                found.append((int(event.start_ns), int(event.duration_ns), event.name, operation))
    return sorted(found)


def short(kernel: str) -> str:
    """The name without its arguments."""
    for part in ("void ", "(anonymous namespace)::", "swat::"):
        kernel = kernel.replace(part, "")
    return kernel.split("(")[0][:72]


def main() -> None:
    parser = argparse.ArgumentParser(description="Kernels of a training step by time.")
    parser.add_argument("--network", default="imagenet_resnet50:256", help="CONFIG:BATCH")
    parser.add_argument("--method", default="u90")
    parser.add_argument("--exact", action="store_true", help="exact thresholds at every step")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=JSON", help="config values")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--top", type=int, default=40)
    parser.add_argument("--hlo", help="file for the compiled program")
    parser.add_argument("--launches", help="file for all launches, as JSON")
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
        pathlib.Path(options.launches).write_text(json.dumps(launches))
    total: collections.Counter[str] = collections.Counter()
    idle: collections.Counter[str] = collections.Counter()
    count: collections.Counter[str] = collections.Counter()
    end = launches[0][0]
    for start, duration, kernel, _ in launches:
        name = short(kernel)
        total[name] += duration
        idle[name] += max(start - end, 0)
        count[name] += 1
        end = max(end, start + duration)
    per_step = 1 / options.steps / 1e6
    print(
        f"{options.network} {options.method}: {wall:.2f} ms a step, "
        f"{sum(total.values()) * per_step:.2f} in kernels, {sum(idle.values()) * per_step:.2f} idle"
    )
    print(f"{'ms':>8} {'idle before':>11} {'launches':>8}  kernel")
    for name, duration in total.most_common(options.top):
        number = count[name] / options.steps
        print(f"{duration * per_step:8.3f} {idle[name] * per_step:11.3f} {number:8.0f}  {name}")


if __name__ == "__main__":
    main()
