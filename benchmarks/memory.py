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
from typing import Any

import jax
import numpy as np

from swat_jax import config_file, step
from swat_jax.data import Info


def temporary_bytes(name: str, method: str, batch: int, pack: bool | None) -> int:
    config: Any = config_file.load(f"configs/{name}.py:{method}")
    config.batch_size, config.precision = batch, "float32"
    config.sparsity.threshold_every_steps = 1
    config.sparsity.pack = config.model.fused_batch_norm = pack
    size, classes = (224, 1000) if name.startswith("imagenet") else (32, 10)
    info = Info(
        name="synthetic", num_classes=classes, image_shape=(size, size, 3), num_train=50_000,
        num_holdout=0, num_test=1, mean=(0.5,) * 3, std=(0.25,) * 3,
        class_names=tuple(map(str, range(classes))),
    )  # fmt: skip
    trainer, make_state = step.make_trainer(config, info, step.make_mesh(1))
    train_step: Any = trainer.train_step
    images = jax.ShapeDtypeStruct((batch, size, size, 3), np.uint8)
    labels = jax.ShapeDtypeStruct((batch,), np.int32)
    lowered = train_step.lower(jax.eval_shape(make_state), images, labels)
    return lowered.compile().memory_analysis().temp_size_in_bytes


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
