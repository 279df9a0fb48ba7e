"""Temporary memory of a training step as XLA plans it: compiled for this machine, never run.

    python benchmarks/memory.py --output docs/results/memory_cpu.json

On the CPU XLA's dense plan is larger than on a GPU, and so is the ratio; what shows is whether any
dense activation is still kept.
"""

import argparse
import datetime
import json
import pathlib
import time

import jax
import training_step


def temporary_bytes(name: str, method: str, batch: int, pack: bool | None) -> int:
    settings = {
        "sparsity.threshold_every_steps": 1,
        "sparsity.pack": pack,
        "model.fused_batch_norm": pack,
    }
    found = training_step.make(
        name, method, batch, precision="float32", settings=settings, only_compile=True
    )
    return found.compiled.memory_analysis().temp_size_in_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description="Temporary memory of training steps.")
    parser.add_argument("--config", default="imagenet_resnet50", help="name of a config")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--output", help="JSON file to write")
    options = parser.parse_args()
    rows = []
    for method, pack in (("dense", None), ("u90", False), ("u90", True)):
        start = time.perf_counter()
        size = temporary_bytes(options.config, method, options.batch_size, pack)
        rows.append({
            "config": options.config, "method": method, "packed": bool(pack),
            "batch": options.batch_size, "dtype": "float32", "temporary_mib": size / 2**20,
        })  # fmt: skip
        seconds = time.perf_counter() - start
        print(f"{method:8} packed {bool(pack)!s:6} {size / 2**20:8.0f} MiB  ({seconds:.0f} s)")
    if options.output:
        found = {
            "date": datetime.date.today().isoformat(),
            "device": jax.devices()[0].device_kind,
            "versions": {"jax": jax.__version__},
            "steps": rows,
        }
        pathlib.Path(options.output).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
