r"""Trains, prunes and scores a network with SWAT.

Examples:
  python -m swat_jax.main --config configs/digits.py --workdir runs/digits
  python -m swat_jax.main --config configs/cifar10_resnet18.py:channel70 \
      --config.data.data_dir=DATA --workdir runs/resnet18
  python -m swat_jax.main --list

  --config FILE[:METHOD]   METHOD: dense, or u90, erk95, m95, channel70, ...
  --config.KEY=VALUE       a value of the config, such as --config.epochs=10
  --workdir FOLDER         the same command again resumes the run in it
  --list                   every row of the paper's tables, with its command
  --distributed            one process of several: joins them
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import jax

from swat_jax import command_line, config_file, data_parallel, listing, metrics, train
from swat_jax.errors import RunError, UsageError


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = config_file.Parser(__doc__)
    parser.add_argument("--workdir")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--distributed", action="store_true")
    stopped = "stopped: the same command resumes the run at its last checkpoint"
    return command_line.run(parser, _train, argv, stopped=stopped)


def _train(options: Any) -> command_line.Answer | None:
    if options.list:
        rows = listing.rows()
        return command_line.Answer(rows, listing.render(rows))
    config = config_file.require(options.config)
    if not options.workdir:
        raise UsageError("--workdir is missing: give a folder for checkpoints and results")
    if config.deterministic:
        train.set_deterministic_flags()
    if options.distributed:
        data_parallel.join_processes()
    try:
        result = train.train_and_evaluate(config, options.workdir)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        why = f"the device has too little memory ({error}); lower config.batch_size"
        raise RunError(why) from error
    if jax.process_index():  # one of several processes speaks for all
        return None
    text = f"{train.layer_table(config, result)}\n{metrics.final_table({result['method']: result})}"
    return command_line.Answer(result, text)


if __name__ == "__main__":
    sys.exit(main())
