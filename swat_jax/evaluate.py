r"""Scores the weights of a sparse file on the test images of a config.

    python -m swat_jax.evaluate --weights pruned.safetensors \
        --config configs/cifar10_resnet18.py:channel70 --config.data.data_dir=DATA

  --weights FILE           from `python -m swat_jax.export`
  --config FILE[:METHOD]   the network and the data; the method does not matter here
  --config.KEY=VALUE       replaces a value of the config
  --json                   print JSON

The weights run as they are, in the network of stock Flax layers.

Exit code: 0 done, 2 the command, the config or the file is wrong.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags

from swat_jax import config_file, data, export, sparse_file, step, train
from swat_jax.errors import UsageError
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
    mesh = step.make_mesh(config.devices)
    step.check(config, mesh)
    dataset = data.load(config, process_index=0, process_count=1)
    trainer, make_state = step.make_trainer(config, dataset.info, mesh)
    trees = export.trees_of(weights, arrays, make_state)
    # From the host, whatever training does: each batch is used once.
    batches = Stream(trainer, dataset).evaluation("test")
    placed = jax.device_put(trees, trainer.replicated)
    return train.evaluate(trainer, batches, placed["params"], placed["batch_stats"])


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    values = flags.FlagValues()
    flags.DEFINE_string("weights", None, "a sparse file", flag_values=values)
    flags.DEFINE_bool("json", False, "print JSON", flag_values=values)
    flags.DEFINE_bool("help", False, "print this help", flag_values=values)
    try:
        config = config_file.parse_flags(values, argv)
        if values["help"].value:
            print(__doc__)
            return 0
        if not values["weights"].value:
            raise UsageError("--weights is missing: give a file that swat_jax.export has written")
        if config is None:
            raise UsageError("--config is missing: give a file, such as configs/digits.py")
        found = evaluate(Path(values["weights"].value), config)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if values["json"].value:
        print(json.dumps(found))
    else:
        print(f"test accuracy {found['accuracy']:.2%}, top-5 {found['top5_accuracy']:.2%}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
