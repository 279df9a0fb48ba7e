"""Images per second that reach the training loop, by source and number of workers.

    python benchmarks/data_pipeline.py                                 # synthetic CIFAR in memory
    python benchmarks/data_pipeline.py --config configs/cifar10_resnet18.py --data_dir DATA
    python benchmarks/data_pipeline.py --config configs/imagenet_resnet50.py --data_dir DATA \
        --source folder --batch_size 64

Prints one table: batches of the host path (decoded and augmented, still uint8), without training.
"""

import argparse
import itertools
import os
import time
from typing import Any

from swat_jax import config_file, data, recipe


def make_config(flags: argparse.Namespace) -> Any:
    config: Any = config_file.load(flags.config) if flags.config else recipe.cifar("cifar10")
    if not flags.config:
        config.data.source = "synthetic"
    config.data.on_device = False
    for key in ("source", "name", "data_dir"):
        if getattr(flags, key):
            config.data[key] = getattr(flags, key)
    if flags.batch_size:
        config.batch_size = flags.batch_size
    return config


def images_per_second(dataset: data.Dataset, batch_size: int, seconds: float) -> float:
    """Over as many batches as fit into `seconds`; the first one is not counted."""
    epochs = itertools.chain.from_iterable(dataset.train(epoch) for epoch in itertools.count())
    next(epochs)
    start = time.perf_counter()
    count = 0
    while time.perf_counter() - start < seconds:
        next(epochs)
        count += batch_size
    return count / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", help="config file; none: synthetic CIFAR-10")
    parser.add_argument("--data_dir", help="config.data.data_dir")
    parser.add_argument("--source", help="config.data.source, where it is not the config's")
    parser.add_argument("--name", help="config.data.name, where it is not the config's")
    parser.add_argument("--batch_size", type=int, help="config.batch_size")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2, 4, 8, 16])
    parser.add_argument("--seconds", type=float, default=5, help="per row (%(default)s)")
    flags = parser.parse_args()

    config = make_config(flags)
    start = time.perf_counter()
    info = data.load(config).info
    print(
        f"{info.name}: {info.num_train} images {info.image_shape}, {config.data.augmentation}, "
        f"batch {config.batch_size}, {os.cpu_count()} cores; opened in "
        f"{time.perf_counter() - start:.1f} s\n"
    )
    print(f"{'workers':>7}{'images/s':>10}")
    for workers in flags.workers:
        config.data.workers = workers
        rate = images_per_second(data.load(config), config.batch_size, flags.seconds)
        print(f"{workers:7}{rate:10.0f}")


if __name__ == "__main__":
    main()
