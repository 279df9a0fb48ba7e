r"""Trains a network with SWAT.

    python -m swat_jax.main --config configs/digits.py --workdir runs/digits
    python -m swat_jax.main --config configs/cifar10_resnet18.py:channel70 \
        --config.data.data_dir=DATA --workdir runs/resnet18
    python -m swat_jax.main --list

  --config FILE[:METHOD]   METHOD: dense, or u90, erk95, m95, channel70, ...
  --config.KEY=VALUE       replaces a value of the config, such as --config.epochs=10
  --workdir FOLDER         the run's folder; the same command again resumes the run
  --list [--json]          every row of the paper's tables, with its command
  --distributed            one process of several: calls jax.distributed.initialize()

Exit code: 0 done, 1 the run had to stop, 2 the command or the config is wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import jax
from absl import flags

from swat_jax import config_file, listing, metrics, step, train
from swat_jax.errors import RunError, UsageError


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "the run's folder", flag_values=values)
    flags.DEFINE_bool("list", False, "print the rows of the paper's tables", flag_values=values)
    flags.DEFINE_bool("json", False, "print JSON", flag_values=values)
    flags.DEFINE_bool("distributed", False, "one process of several", flag_values=values)
    flags.DEFINE_bool("help", False, "print this help", flag_values=values)
    try:
        config = config_file.parse_flags(values, argv)
        if values["help"].value:
            print(__doc__)
            return 0
        if values["list"].value:
            listing.print_rows(bool(values["json"].value))
            return 0
        if config is None:
            raise UsageError("--config is missing: give a file, such as configs/digits.py:u90")
        workdir = values["workdir"].value
        if not workdir:
            raise UsageError("--workdir is missing: give a folder for checkpoints and results")
        if config.deterministic:
            train.set_deterministic_flags()
        if values["distributed"].value:
            step.join_processes()
        result = train.train_and_evaluate(config, workdir)
    except (UsageError, RunError) as error:
        return _stopped(error, 2 if isinstance(error, UsageError) else 1)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _stopped(f"the device has too little memory ({error}); lower config.batch_size", 1)
    except KeyboardInterrupt:
        print("stopped: the same command resumes the run at its last checkpoint", file=sys.stderr)
        return 130
    if jax.process_index() == 0:
        print(train.layer_table(config, result))
        print(metrics.final_table({result["method"]: result}))
    return 0


def _stopped(reason: object, code: int) -> int:
    """Says in one line why the program ends."""
    print(f"error: {'; '.join(str(reason).split(chr(10)))}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv))
