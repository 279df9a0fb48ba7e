"""Where the time of a training step goes: its kernels by kind and by name, as the device says.

    python benchmarks/step_profile.py --output docs/results/step_profile_resnet50_h200.json
    python benchmarks/step_profile.py --raw FOLDER        # keeps launches and programs
    python benchmarks/step_profile.py --replay FOLDER     # sums them up again, needs no GPU

Launches are traced one by one, without CUDA graphs: the sum is device time, not wall time. Each is
of the kind of the instruction that launched it (`benchmarks/hlo.py`), which also says how many
bytes our ops have to move. Copies and memsets are those that XLA orders; what our own calls order
is part of the op.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import gzip
import importlib.metadata
import json
import os
import pathlib
import tempfile
from typing import Any, NamedTuple

import hlo
import jax
import training_step
from methods import METHODS


class Launch(NamedTuple):
    """One kernel, copy or memset on the device; times in ns."""

    start: int
    duration: int
    kernel: str
    operation: str
    module: str


def launches(folder: str) -> list[Launch]:
    """All launches of a trace by time; on a CPU the operations that its threads did."""
    (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
    found, on_host = [], []
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        is_device = plane.name.startswith("/device:GPU")
        for line in plane.lines:
            if is_device and "Stream" not in line.name:
                continue
            for event in line.events:
                stats = {key: str(value) for key, value in event.stats}
                operation, module = stats.get("hlo_op", ""), stats.get("hlo_module", "")
                if is_device or operation:
                    launch = Launch(
                        int(event.start_ns), int(event.duration_ns), event.name, operation, module
                    )
                    (found if is_device else on_host).append(launch)
    return sorted(found or on_host)


def short(kernel: str) -> str:
    """The name without its arguments."""
    for part in ("void ", "(anonymous namespace)::", "swat::"):
        kernel = kernel.replace(part, "")
    return kernel.split("(")[0][:72]


def kind(launch: Launch, program: hlo.Program) -> str:
    """What a launch counts as."""
    if program.is_ours(launch.operation):
        return program.kind(launch.operation)
    for name in ("memcpy", "memset"):
        if name in launch.kernel.lower():
            return {"memcpy": "copies", "memset": "memsets"}[name]
    if launch.module and program.name and launch.module != program.name:
        return "other programs"
    return program.kind(launch.operation)


def record(network: str, name: str, settings: dict[str, Any], steps: int, refresh: bool) -> Any:
    """A trace of some steps, with the program."""
    method = METHODS[name]
    config, batch = network.split(":")
    with training_step.apart(method):
        measured = training_step.make(
            config, method.name, int(batch), settings={**method.settings, **settings}, single=True
        )
    measured.milliseconds(2, refresh=True)
    wall = measured.milliseconds(10, refresh=refresh)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            measured.milliseconds(steps, refresh=refresh)
        found = launches(folder)
    return {
        "method": name,
        "threshold_every_steps": measured.period,
        "refresh": refresh,
        "wall_ms": wall,
        "traced_steps": steps,
        "launches": found,
        "program": measured.compiled.as_text(),
    }


def summary(recorded: Any) -> dict[str, Any]:
    """Time, launches and bytes of a step by kind."""
    program = hlo.Program(recorded["program"])
    # At a period of 1 every threshold is new.
    refresh = recorded["refresh"] or recorded["threshold_every_steps"] == 1
    total: collections.Counter[str] = collections.Counter()
    count: collections.Counter[str] = collections.Counter()
    operations: dict[str, set[str]] = {}
    idle, end = 0, None
    for launch in map(Launch._make, recorded["launches"]):
        name = kind(launch, program)
        total[name] += launch.duration
        count[name] += 1
        operations.setdefault(name, set()).add(launch.operation)
        idle += max(launch.start - (launch.start if end is None else end), 0)
        end = max(end or 0, launch.start + launch.duration)
    steps, kinds = recorded["traced_steps"], []
    for name, duration in total.most_common():
        ms = duration / steps / 1e6
        found = {"kind": name, "ms": ms, "launches": count[name] / steps}
        calls = [one for one in operations[name] if program.is_ours(one)]
        if calls:
            moved = sum(program.moved_bytes(one, refresh=refresh) for one in calls)
            found |= {"calls": len(calls), "bytes": moved, "gb_per_s": moved / ms / 1e6}
        kinds.append(found)
    kept = ("method", "threshold_every_steps", "refresh", "wall_ms")
    return {
        **{key: recorded[key] for key in kept},
        "kernel_ms": sum(total.values()) / steps / 1e6,
        "idle_ms": idle / steps / 1e6,
        "kinds": kinds,
    }


def show(recorded: Any, found: dict[str, Any], top: int) -> None:
    """Prints the kinds, then the kernels that take longest."""
    print(
        f"\n{found['method']}: {found['wall_ms']:.2f} ms a step, {found['kernel_ms']:.2f} in "
        f"kernels, {found['idle_ms']:.2f} idle"
    )
    print(f"{'ms':>8} {'launches':>8} {'GB':>7} {'GB/s':>6}  kind")
    for one in found["kinds"]:
        moved = f"{one['bytes'] / 1e9:7.2f} {one['gb_per_s']:6.0f}" if "bytes" in one else " " * 14
        print(f"{one['ms']:8.3f} {one['launches']:8.0f} {moved}  {one['kind']}")
    total: collections.Counter[str] = collections.Counter()
    idle: collections.Counter[str] = collections.Counter()
    count: collections.Counter[str] = collections.Counter()
    end = recorded["launches"][0][0]
    for launch in map(Launch._make, recorded["launches"]):
        name = short(launch.kernel)
        total[name] += launch.duration
        idle[name] += max(launch.start - end, 0)
        count[name] += 1
        end = max(end, launch.start + launch.duration)
    per_step = 1 / recorded["traced_steps"] / 1e6
    print(f"{'ms':>8} {'idle before':>11} {'launches':>8}  kernel")
    for name, duration in total.most_common(top):
        number = count[name] / recorded["traced_steps"]
        print(f"{duration * per_step:8.3f} {idle[name] * per_step:11.3f} {number:8.0f}  {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Kernels of a training step by time.")
    parser.add_argument("--network", default="imagenet_resnet50:256", help="CONFIG:BATCH")
    parser.add_argument("--methods", nargs="+", default=["dense", "u90"], choices=METHODS)
    parser.add_argument("--refresh", action="store_true", help="steps that recompute thresholds")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=JSON", help="config values")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--top", type=int, default=40, help="kernels to print")
    parser.add_argument("--raw", help="folder for launches and programs")
    parser.add_argument("--replay", help="such a folder: measure nothing")
    parser.add_argument("--output", help="JSON file to write")
    options = parser.parse_args()
    if options.replay:
        files = sorted(pathlib.Path(options.replay).glob("profile_*.json.gz"))
        recordings = [json.loads(gzip.decompress(file.read_bytes())) for file in files]
    else:
        # Kernels inside a CUDA graph carry no names of the program.
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_enable_command_buffer="
        name, batch = options.network.split(":")
        settings = {key: json.loads(value) for key, value in (x.split("=", 1) for x in options.set)}
        recordings = []
        for method in options.methods:
            steps = record(options.network, method, settings, options.steps, options.refresh)
            recordings.append({
                "date": datetime.date.today().isoformat(),
                "device": jax.devices()[0].device_kind,
                "versions": {key: importlib.metadata.version(key) for key in ("jax", "jaxlib")},
                "network": name, "batch": int(batch), "dtype": "bfloat16", "settings": settings,
                **steps,
            })  # fmt: skip
    if options.raw:
        folder = pathlib.Path(options.raw)
        folder.mkdir(parents=True, exist_ok=True)
        for number, recording in enumerate(recordings):
            packed = gzip.compress(json.dumps(recording).encode())
            (folder / f"profile_{number}.json.gz").write_bytes(packed)
    first = ("date", "device", "versions", "network", "batch", "dtype", "settings")
    report = {key: recordings[0][key] for key in first}
    report |= {
        "note": "kernels of one step, launches traced one by one without CUDA graphs",
        "steps": [summary(recording) for recording in recordings],
    }
    if options.output:
        pathlib.Path(options.output).write_text(json.dumps(report, indent=2) + "\n")
    print(f"{report['network']}, batch {report['batch']}, {report['device']}")
    for recording, found in zip(recordings, report["steps"], strict=True):
        show(recording, found, options.top)


if __name__ == "__main__":
    main()
