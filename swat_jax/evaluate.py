r"""Scores the weights of a sparse file on the test images of a config.

Examples:
  python -m swat_jax.evaluate --weights FILE --config configs/digits.py
  python -m swat_jax.evaluate --weights FILE --config.data.data_dir=DATA \
      --config configs/cifar10_resnet18.py
  python -m swat_jax.evaluate --weights FILE --json --config.data.source=npz \
      --config configs/cifar10_vgg16.py --config.precision=float32 \
      --config.data.data_dir=cifar10.npz

  --weights FILE           of `python -m swat_jax.export`, or one in pretrained/
  --config FILE[:METHOD]   the network and the data; METHOD does not matter here
  --config.KEY=VALUE       a value of the config

The weights run as they are, in the network of stock Flax layers.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from swat_jax import (
    command_line,
    config_file,
    data,
    data_parallel,
    export,
    scoring,
    sparse_file,
    training_setup,
)
from swat_jax.feed import Stream


def evaluate(weights: Path, config: Any) -> dict[str, float]:
    """Scores of a file's weights on a config's test images.

    Args:
      weights: the file.
      config: with the keys of `swat_jax.recipe.base`.

    Returns:
      ``accuracy`` (top-1), ``top5_accuracy`` and ``loss`` (mean cross-entropy).

    Raises:
      UsageError: no such file, or one of another network than the config's.
    """
    arrays = sparse_file.read(weights).arrays
    mesh = data_parallel.make_mesh(config.devices)
    training_setup.check(config, mesh)
    dataset = data.load(config, process_index=0, process_count=1)
    trainer, make_state = training_setup.make_trainer(config, dataset.info, mesh)
    trees = export.trees_of(weights, arrays, make_state)
    # From the host, whatever training does: each batch is used once.
    batches = Stream(trainer, dataset).evaluation("test")
    placed = jax.device_put(trees, trainer.replicated)
    return scoring.evaluate(trainer, batches, placed["params"], placed["batch_stats"])


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = config_file.Parser(__doc__)
    parser.add_argument("--weights", type=Path, required=True)
    return command_line.run(parser, _evaluate, argv)


def _evaluate(options: Any) -> command_line.Answer:
    found = evaluate(options.weights, config_file.require(options.config))
    text = f"test accuracy {found['accuracy']:.2%}, top-5 {found['top5_accuracy']:.2%}"
    return command_line.Answer(found, text)


if __name__ == "__main__":
    sys.exit(main())
