r"""Times all algorithms for the layers of a network; training uses the fastest.

Examples:
  python -m swat_jax.tune --config configs/imagenet_resnet50.py:u90
  python -m swat_jax.tune --config configs/cifar10_vgg16.py:vector16-80 \
      --config.batch_size=512 --layers 'stage5/**'
  python -m swat_jax.tune --config configs/digits.py:u90 --output table.json

  --config FILE[:METHOD]   METHOD: u90, erk95, channel70, vector16-80, ...
  --config.KEY=VALUE       a value of the config: --config.batch_size=512
  --layers PATTERN         these only: a path as stage1/0/conv1, with * and **
  --ops OP ...             these only: forward, input_gradient, weight_gradient
  --output FILE            the table; default: this device's in ~/.cache
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from swat_jax import (
    algorithm_table,
    build,
    command_line,
    config_file,
    data_parallel,
    dispatch,
    flops,
    kernels,
    native,
    patterns,
    training_setup,
    trial,
)
from swat_jax.algorithm_table import Table, Times
from swat_jax.algorithms import PLAIN
from swat_jax.candidates import OPS, Problem
from swat_jax.errors import UsageError
from swat_jax.timing import milliseconds


def tune(
    config: Any,
    output: Path | None = None,
    layers: str | None = None,
    ops: Sequence[str] = OPS,
) -> dict[str, Any]:
    """Times the layers of a config's network and writes what was found into a table.

    What the table holds of other layers and ops stays. It is written after every layer.

    Args:
      config: with the keys of `swat_jax.recipe.base`.
      output: the table; None: `algorithm_table.path_of` the device.
      layers: pattern of paths; None: all.
      ops: those of `swat_jax.candidates.OPS` that are timed.

    Returns:
      ``table``, its path; ``layers``, what was timed, by name; ``paths``, the layers of each name;
      ``chosen``, how many ops are not plain; ``wrong``, which algorithms were not right, and why.

    Raises:
      UsageError: nothing can be timed, there is no such op, or the table cannot be written.
    """
    if unknown := [op for op in ops if op not in OPS]:
        raise UsageError(f"ops must be some of {', '.join(OPS)}; got {', '.join(unknown)}")
    mesh = data_parallel.make_mesh(config.devices)
    training_setup.check(config, mesh)
    device, backend = mesh.devices.flat[0].device_kind, kernels.backend()
    if output is None and backend != "cuda":
        raise UsageError(
            "the backend is xla, which computes every layer in the plain way: there is nothing to "
            "choose; --output FILE times the definitions of the kernels nevertheless"
        )
    found = _layers(config, config.batch_size // mesh.size, layers)
    path = algorithm_table.path_of(device) if output is None else output
    table = Table(device, algorithm_table.package_version(), backend)
    if path.exists():
        table = _same_kind(algorithm_table.read(path), table, path)
    made_with = {"date": datetime.date.today().isoformat(), "jax": jax.__version__}
    library = native.load().build_info if backend == "cuda" else {}
    table = Table(table.device, table.version, backend, table.layers, {**made_with, **library})
    # Before the long work: whether it can be written.
    algorithm_table.write(path, table)

    idle = milliseconds(None)
    timed: dict[str, Mapping[str, Times]] = {}
    for name, (paths, layer, problem) in found.items():
        start = time.monotonic()
        timed[name] = trial.run(
            problem, layer.weight_sparsity, layer.activation_sparsity, idle, ops
        )
        table = table.with_layers({name: timed[name]})
        algorithm_table.write(path, table)
        print(f"{' '.join(paths)}: {name}", *_lines(timed[name]), sep="\n")
        print(f"  {time.monotonic() - start:.0f} s, {len(timed)} of {len(found)}", flush=True)
    every = [(name, op, of[op]) for name, of in timed.items() for op in of]
    return {
        "table": str(path),
        "device": device,
        "backend": backend,
        "bound": trial.bound(build.PRECISIONS[config.precision]),
        "margin": trial.MARGIN,
        "paths": {name: paths for name, (paths, _, _) in found.items()},
        "layers": {
            name: {op: dataclasses.asdict(times) for op, times in of.items()}
            for name, of in timed.items()
        },
        "chosen": sum(times.chosen != PLAIN[op] for _, op, times in every),
        "wrong": {
            f"{name}: {op} {algorithm}": why
            for name, op, times in every
            for algorithm, why in times.wrong.items()
        },
    }


def _layers(config: Any, batch: int, pattern: str | None) -> dict[str, Any]:
    """Name in a table -> paths of the layers that are called so, one of them, what it computes."""
    if config.sparsity.distribution in ("dense", "momentum"):
        why = {
            "dense": "its layers are not sparse",
            "momentum": "how sparse its layers are changes at every step",
        }[config.sparsity.distribution]
        raise UsageError(f"config: nothing to time for {config.sparsity.method}: {why}")
    facts = flops.facts(config)
    model = nnx.eval_shape(lambda: build.build(config, **facts, rngs=nnx.Rngs(0)))
    sparse = {
        path: layer for path, layer in build.sparse_layers(model) if dispatch.is_sparse(layer)
    }
    chosen = sparse if pattern is None else patterns.select(pattern, list(sparse), "--layers")
    x = jax.ShapeDtypeStruct((batch, *facts["image_shape"]), build.PRECISIONS[config.precision])
    found: dict[str, tuple[list[str], Any, Problem]] = {}
    for path, problem in dispatch.problems(model, x).items():
        if path in chosen:
            name = dispatch.table_name(sparse[path], problem)
            found.setdefault(name, ([], sparse[path], problem))[0].append(path)
    return found


def _same_kind(found: Table, wanted: Table, path: Path) -> Table:
    """A table that is there already, and to which what is measured now may be added."""
    for name in ("device", "version", "backend"):
        was, now = getattr(found, name), getattr(wanted, name)
        if was != now:
            raise UsageError(
                f"{path} is a table of {name} {was}, this is {now}; delete it, or give --output"
            )
    return found


def _lines(ops: Mapping[str, Times]) -> list[str]:
    """What was measured of a layer: a line for each op, and for what is refused or wrong."""
    lines = []
    for op, times in ops.items():
        plain = times.milliseconds[PLAIN[op]]
        others = {one: ms for one, ms in times.milliseconds.items() if one != PLAIN[op]}
        best = min(others, key=lambda one: others[one], default=None)
        told = "no candidate" if best is None else f"{best} {others[best]:.4f} ms"
        gain = math.nan if best is None else plain / others[best]
        chosen = "" if times.chosen == PLAIN[op] else f", chosen: {gain:.2f} times as fast"
        lines.append(f"  {op:15} {PLAIN[op]} {plain:.4f} ms, {told}{chosen}")
        lines += [f"  {op:15} {one} is refused: {why}" for one, why in times.refused.items()]
        lines += [f"  {op:15} {one} IS WRONG: {why}" for one, why in times.wrong.items()]
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = config_file.Parser(__doc__)
    parser.add_argument("--layers")
    parser.add_argument("--ops", nargs="+", choices=OPS, default=OPS)
    parser.add_argument("--output", type=Path)
    return command_line.run(parser, _tune, argv)


def _tune(options: Any) -> command_line.Answer:
    found = tune(config_file.require(options.config), options.output, options.layers, options.ops)
    wrong = found["wrong"]
    told = (
        f"{found['table']}: {found['chosen']} ops of {len(found['layers'])} layers are faster than "
        f"the plain way by {found['margin']:.0%} or more; errors up to {found['bound']:.2g} of the "
        "largest value are right"
    )
    lines = [told, *(f"WRONG: {what}: {why}" for what, why in wrong.items())]
    code = command_line.FAILED if wrong else command_line.DONE
    return command_line.Answer(found, "\n".join(lines), code)


if __name__ == "__main__":
    sys.exit(main())
