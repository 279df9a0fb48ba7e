"""Training steps of whole networks: time and peak memory, sparse against dense.

    python benchmarks/steps.py --output docs/results/steps_h200.json
    python benchmarks/steps.py --networks imagenet_resnet50:256 --methods dense u90 --rounds 1

Every (network, method, period) runs in a process of its own, several times in turn with the others,
on synthetic images that lie on the device. `dense` is stock Flax. The time of a step at period P is
``((P - 1) * reused + refreshed) / P``, each the median over several steps; ratios are to dense.
Peak memory is what the allocator saw, beside XLA's own count of temporary memory.
"""

import argparse
import datetime
import json
import os
import pathlib
import statistics
import subprocess
import sys
from typing import Any

NETWORKS = (
    "imagenet_resnet50:256",
    "imagenet_wrn50_2:256",
    "cifar10_wrn16_8:512",
    "cifar10_resnet18:512",
    "cifar10_vgg16:512",
    "cifar10_densenet121:512",
    "cifar10_wrn16_8:128",
    "cifar10_resnet18:128",
    "cifar10_vgg16:128",
    "cifar10_densenet121:128",
)
# Name, method of the config, exact thresholds at every step, further settings.
METHODS: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "dense": ("dense", False, {}),
    "dense + our batch norm": ("dense", False, {"model.fused_batch_norm": True}),
    "u80": ("u80", False, {}),
    "u80 exact": ("u80", True, {}),
    "u90": ("u90", False, {}),
    "u90 exact": ("u90", True, {}),
    "erk90": ("erk90", False, {}),
    "channel70": ("channel70", False, {}),
    "u90 exact, xla": ("u90", True, {"backend": "xla"}),
}


def run(network: str, method: str, steps: int) -> dict[str, Any]:
    """One process's measurement; imports JAX, which the parent must not."""
    import jax
    import training_step

    from swat_jax import kernels

    name, batch = network.split(":")
    spelled, exact, given = METHODS[method]
    settings = {key: value for key, value in given.items() if key != "backend"}
    if exact:
        settings["sparsity.threshold_every_steps"] = 1
    measured = training_step.make(name, spelled, int(batch), settings=settings)
    measured.milliseconds(3, refresh=True)
    measured.milliseconds(5)
    period = measured.config.sparsity.threshold_every_steps
    reused = statistics.median(measured.milliseconds(steps // 5) for _ in range(5))
    refreshed = reused
    if period > 1:
        refreshed = statistics.median(
            measured.milliseconds(steps // 5, refresh=True) for _ in range(5)
        )
    ms = ((period - 1) * reused + refreshed) / period
    peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    temporary = measured.compiled.memory_analysis().temp_size_in_bytes
    return {
        "network": name,
        "batch": int(batch),
        "method": method,
        "threshold_every_steps": period,
        "ms": ms,
        "reused_ms": reused,
        "refreshed_ms": refreshed,
        "images_per_second": int(batch) / ms * 1e3,
        "peak_mib": peak / 2**20,
        "temporary_mib": temporary / 2**20,
        "backend": kernels.backend(),
        "device": jax.devices()[0].device_kind,
        "versions": {"jax": jax.__version__},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of training steps.")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), help="CONFIG:BATCH ...")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--rounds", type=int, default=2, help="processes per row, in turn")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--output", help="JSON file to write")
    parser.add_argument("--one", action="store_true", help="measure in this process, print JSON")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run(options.networks[0], options.methods[0], options.steps)))
        return
    rows: list[dict[str, Any]] = []
    for network in options.networks:
        found: dict[str, list[dict[str, Any]]] = {}
        for _ in range(options.rounds):
            for method in options.methods:
                command = [
                    *(sys.executable, __file__, "--one", "--networks", network),
                    *("--methods", method, "--steps", str(options.steps)),
                ]
                settings = METHODS[method][2]
                environment = dict(os.environ)
                if "backend" in settings:
                    environment["SWAT_JAX_BACKEND"] = settings["backend"]
                result = subprocess.run(command, env=environment, capture_output=True, text=True)
                if result.returncode:
                    last = (result.stderr.strip().splitlines() or ["no output"])[-1]
                    print(f"{network} {method}: {last}", file=sys.stderr)
                    continue
                found.setdefault(method, []).append(json.loads(result.stdout.splitlines()[-1]))
        for results in found.values():
            rows.append(min(results, key=lambda row: row["ms"]))
        dense = next((row for row in rows if row["method"] == "dense"
                      and f"{row['network']}:{row['batch']}" == network), None)  # fmt: skip
        for row in rows:
            if dense and f"{row['network']}:{row['batch']}" == network:
                row["time_ratio"] = row["ms"] / dense["ms"]
                row["memory_ratio"] = row["peak_mib"] / max(dense["peak_mib"], 1)
        if options.output:
            report = {"date": datetime.date.today().isoformat(), "steps": rows}
            pathlib.Path(options.output).write_text(json.dumps(report, indent=2) + "\n")
    print(f"{'network':22} {'batch':>5} {'method':24} {'P':>5} {'ms':>8} {'x dense':>7} "
          f"{'MiB':>7} {'x dense':>7} {'temp':>7} {'reused':>7} {'refresh':>7}")  # fmt: skip
    for row in rows:
        print(f"{row['network']:22} {row['batch']:5} {row['method']:24} "
              f"{row['threshold_every_steps']:5} {row['ms']:8.2f} {row.get('time_ratio', 0):7.2f} "
              f"{row['peak_mib']:7.0f} {row.get('memory_ratio', 0):7.2f} "
              f"{row['temporary_mib']:7.0f} {row['reused_ms']:7.2f} "
              f"{row['refreshed_ms']:7.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
