r"""Takes a sparse network home: its hard-pruned weights in one small file.

Examples:
  python -m swat_jax.export runs/digits pruned.safetensors
  python -m swat_jax.export runs/digits pruned.safetensors --most_mib 16
  python -m swat_jax.export pruned.safetensors half.safetensors --values float16

  RUN               workdir of a run that is done, whose last checkpoint is
                    pruned to exact masks; or a file that was written from one
  OUTPUT            the file; sparse kernels are a bit a weight and what is left
  --values TYPE     rounds those values to bfloat16, float16 or float32
  --most_mib SIZE   rounds them to bfloat16 where the file would be larger

In Python, `save` writes any model with SWAT layers, `load` reads a file, and
`load_into` puts it into a model of stock or of SWAT layers.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from ml_collections import ConfigDict

from swat_jax import (
    checkpoint,
    command_line,
    data_parallel,
    network,
    pruning,
    sparse_file,
    training_setup,
)
from swat_jax.data import Info
from swat_jax.errors import UsageError
from swat_jax.files import replace_bytes
from swat_jax.layer_state import ThresholdAge, WeightBudget
from swat_jax.sparsity import granularity

# What is saved of a model, of the collections in `network.STATEFUL`.
COLLECTIONS = {"params": nnx.Param, "batch_stats": nnx.BatchStat}
# What files are taken seriously, though anybody may have written one.
MOST_CLASSES, MOST_PIXELS, MOST_DEPTH = 1_000_000, 4096, 64
# Of a run's result: what a file says about it.
_RESULTS = (
    *("network", "method", "seed", "dataset", "steps", "pruned_test_accuracy"),
    *("weight_sparsity", "num_classes", "image_shape", "class_names"),
)


def save(
    path: str | os.PathLike[str],
    model: nnx.Module,
    *,
    facts: Mapping[str, Any] | None = None,
    values: str | None = None,
) -> int:
    """Writes the weights of a model under their exact masks, and the averages of its batch norms.

    Args:
      path: the file, such as ``pruned.safetensors``.
      model: with SWAT layers anywhere in it, or without any; it stays as it is. What is written
        are its parameters and the averages of batch norms, no variables of other types.
      facts: what to say about it, anything that JSON can hold, such as ``{"config": ...}``.
      values: the type for values of sparse kernels, such as "bfloat16"; None: their own.

    Returns:
      The size of the file in bytes.

    Raises:
      UsageError: a weight of a type that a file cannot hold, or a SWAT layer whose masks cannot be
        told from its kernel: a stack of layers, one with a ``mask``, one that shares a kernel.
      OSError: the file cannot be written.

    Example:
      >>> from swat_jax import SwatConv
      >>> layer = SwatConv(3, 64, (3, 3), weight_sparsity=0.9, rngs=nnx.Rngs(0))
      >>> size = save("layer.safetensors", layer)
    """
    _check_layers(model)
    layers = pruning.layers_of(model)
    found = network.values(model)
    found["params"] = pruning.prune(layers, found["params"], found["budgets"])
    arrays = _flat({name: found[name] for name in COLLECTIONS})
    return sparse_file.write(
        Path(path), arrays, sparse=_sparse(layers, arrays), facts=facts, values=values
    )


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The weights of a file as nested dicts: ``{"params": ..., "batch_stats": ...}``.

    Arrays are NumPy's, bit for bit what was saved unless values were rounded then.

    Raises:
      UsageError: it is no such file, or a damaged one.

    Example:
      >>> from swat_jax import SwatConv
      >>> layer = SwatConv(3, 64, (3, 3), weight_sparsity=0.9, rngs=nnx.Rngs(0))
      >>> size = save("layer.safetensors", layer)
      >>> load("layer.safetensors")["params"]["kernel"].shape
      (3, 3, 3, 64)
    """
    arrays = sparse_file.read(Path(path)).arrays
    return _nested(Path(path), arrays)


def load_into(path: str | os.PathLike[str], model: nnx.Module) -> None:
    """Puts the weights of a file into a model, in the types that the model has.

    In SWAT layers whose number of weights is state (SWAT-M) it becomes that of the file; reused
    thresholds are found anew in the next training step.

    Args:
      path: the file.
      model: with the same layers under the same names, of stock or of SWAT layers.

    Raises:
      UsageError: it is no such file, or one of another model; the model is unchanged.

    Example:
      >>> from swat_jax import SwatConv
      >>> layer = SwatConv(3, 64, (3, 3), weight_sparsity=0.9, rngs=nnx.Rngs(0))
      >>> size = save("layer.safetensors", layer)
      >>> stock = nnx.Conv(3, 64, (3, 3), rngs=nnx.Rngs(1))
      >>> load_into("layer.safetensors", stock)
      >>> int((stock.kernel[...] != 0).sum())
      173
    """
    path = Path(path)
    arrays = sparse_file.read(path).arrays
    flat = [
        ("/".join((name, *map(str, place))), place, variable)
        for name, kind in COLLECTIONS.items()
        for place, variable in nnx.to_flat_state(nnx.state(model, kind))
    ]
    check_names(path, arrays, {name: variable.get_value().shape for name, _, variable in flat})

    def filled(name: str, variable: Any) -> Any:
        present = variable.get_value()
        return variable.replace(
            jax.device_put(arrays[name].astype(present.dtype), present.sharding)
        )

    _check_layers(model)
    new = [(place, filled(name, variable)) for name, place, variable in flat]
    nnx.update(model, nnx.from_flat_state(new))
    for _, layer in pruning.sparse_layers(model):
        if layer.weight_budget is not None:
            scores = granularity.score(layer.kernel.get_value(), layer.granularity)
            kept = jnp.count_nonzero(scores).astype(jnp.int32)
            layer.weight_budget = nnx.data(WeightBudget(kept))
        if layer.threshold_age is not None:  # stored thresholds are of other weights
            layer.threshold_age = nnx.data(ThresholdAge(jnp.zeros((), jnp.int32)))


def _check_layers(model: nnx.Module) -> None:
    """Refuses SWAT layers whose masks `pruning.prune` would not find."""
    params = network.collection(model, nnx.Param)
    for path, layer in pruning.sparse_layers(model):
        kernel = layer.kernel.get_value()
        axes = len(getattr(layer, "kernel_size", ())) + 2
        for wrong, why in (
            (kernel.ndim != axes, f"is a stack of layers: its kernel has the shape {kernel.shape}"),
            (getattr(layer, "mask", None) is not None, "has a mask of its own"),
            (
                "kernel" not in (network.lookup(params, path) or {}),
                "shares its kernel with another layer, or has a name with a slash in it",
            ),
        ):
            if wrong:
                raise UsageError(f"model: the SWAT layer {path or '(the model)'} {why}")


def check_names(
    path: Path, arrays: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuses the arrays of a file that are not those of a network.

    Args:
      path: the file, for the message.
      arrays: what it holds.
      shapes: what the network has.

    Raises:
      UsageError: names what is missing, what is too much, or what has another shape.
    """
    for told, names in (
        ("lacks", sorted(shapes.keys() - arrays.keys())),
        ("has, and the network has not,", sorted(arrays.keys() - shapes.keys())),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UsageError(
                f"{path} is of another network: it {told} {', '.join(names[:3])}{more}"
            )
    for name, shape in shapes.items():
        if arrays[name].shape != tuple(shape):
            raise UsageError(
                f"{path} is of another network: {name} has the shape {arrays[name].shape}, and "
                f"{tuple(shape)} in the network"
            )


def trees_of(weights: Path, arrays: dict[str, np.ndarray], make_state: Any) -> dict[str, Any]:
    """Arrays of a file as the collections of a network, in its types.

    Args:
      weights: the file, for messages.
      arrays: what it holds.
      make_state: from `training_setup.make_trainer`.

    Raises:
      UsageError: they are those of another network.
    """
    state = jax.eval_shape(make_state)
    types: Any = traverse_util.flatten_dict({name: state[name] for name in COLLECTIONS}, sep="/")
    check_names(weights, arrays, {name: one.shape for name, one in types.items()})
    cast = {name: arrays[name].astype(one.dtype) for name, one in types.items()}
    return _nested(weights, cast)


def of_run(workdir: Path) -> tuple[dict[str, np.ndarray], set[str], dict[str, Any]]:
    """The pruned weights of a run that is done.

    Args:
      workdir: the run's folder.

    Returns:
      Arrays by name, the names of sparse ones, and what there is to say about them.

    Raises:
      UsageError: there is no such run, it is not done, or its scores are of another checkpoint.
    """
    try:
        plain = json.loads((workdir / "config.json").read_text())
        result = json.loads((workdir / "result.json").read_text())
        if plain["checkpoint"]["select"] != "last":
            raise UsageError(f"{workdir}: its scores are not those of the last checkpoint")
        info, steps = info_of(plain, result), result["steps"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{workdir} must be the workdir of a run that is done: {error!r}"
        ) from error
    trainer, make_state = training_setup.make_trainer(
        ConfigDict(plain), info, data_parallel.make_mesh(1)
    )
    with checkpoint.Checkpointer(workdir / "checkpoints", config=plain) as checkpoints:
        restored = checkpoints.restore(make_state(), refresh=("activation_thresholds",))
    if restored is None or restored.step != steps:
        found = "none" if restored is None else f"one of step {restored.step}"
        raise UsageError(f"{workdir} must hold a checkpoint of step {steps}: {found}")
    state = restored.state
    trees = {"params": trainer.prune(state), "batch_stats": state["batch_stats"]}
    arrays = _flat(trees)
    facts = {"config": plain, **{key: result[key] for key in _RESULTS if key in result}}
    return arrays, _sparse(trainer.layers, arrays), facts


def info_of(config: Mapping[str, Any], result: Mapping[str, Any]) -> Info:
    """Facts about data that are not there, as far as a network depends on them.

    Args:
      config: of a run, as plain dicts.
      result: with ``num_classes`` and ``image_shape``, and ``class_names`` where they are known.

    Raises:
      ValueError: a value that no data set has.
      KeyError, TypeError: there is none.
    """
    classes, shape = result["num_classes"], result["image_shape"]
    mean, std = (config["data"][key] for key in ("mean", "std"))
    if type(classes) is not int or not 1 <= classes <= MOST_CLASSES:
        raise ValueError(f"num_classes must be between 1 and {MOST_CLASSES}, got {classes!r}")
    if not (
        isinstance(shape, list)
        and all(type(side) is int for side in shape)
        and len(shape) == 3
        and 1 <= shape[0] == shape[1] <= MOST_PIXELS
        and shape[2] in (1, 3)
    ):
        raise ValueError(f"image_shape must be [n, n, 1 or 3], n <= {MOST_PIXELS}, got {shape!r}")
    for key, values in (("mean", mean), ("std", std)):
        numbers = isinstance(values, list) and all(type(one) in (int, float) for one in values)
        if not numbers or len(values) != shape[2] or not all(map(math.isfinite, values)):
            raise ValueError(f"data.{key} must be a number for each channel, got {values!r}")
    if min(std) <= 0:
        raise ValueError(f"data.std must be above 0, got {std!r}")
    names = result.get("class_names")
    if names is None:
        names = [str(number) for number in range(classes)]
    texts = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not texts or len(names) != classes:
        raise ValueError(f"class_names must be {classes} texts")
    return Info(
        name=config["dataset"], num_classes=classes, image_shape=(shape[0], shape[1], shape[2]),
        num_train=config["batch_size"], num_holdout=0, num_test=1, mean=tuple(mean),
        std=tuple(std), class_names=tuple(names),
    )  # fmt: skip


def _flat(trees: Mapping[str, Any]) -> dict[str, np.ndarray]:
    flat: Any = traverse_util.flatten_dict(jax.device_get(dict(trees)), sep="/")
    return dict(flat)


def _sparse(layers: Sequence[pruning.SparseLayer], arrays: Mapping[str, np.ndarray]) -> set[str]:
    """Names of kernels that have zeros to be left out."""
    kernels = {"/".join(filter(None, ("params", layer.path, "kernel"))) for layer in layers}
    return {name for name in kernels & arrays.keys() if np.any(arrays[name] == 0)}


def _nested(path: Path, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    tree: dict[str, Any] = {name: {} for name in COLLECTIONS}
    for name, array in arrays.items():
        told = f"{path} holds {name[:80]!r}, which"
        parts = name.split("/", MOST_DEPTH + 1)
        if parts[0] not in COLLECTIONS or not 2 <= len(parts) <= MOST_DEPTH:
            raise UsageError(f"{told} is no weight of a network")
        node = tree
        for part in parts[:-1]:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise UsageError(f"{told} lies inside of another array")
        if parts[-1] in node:
            raise UsageError(f"{told} has other arrays inside")
        node[parts[-1]] = array
    return tree


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = command_line.Parser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("output", type=Path, metavar="OUTPUT")
    parser.add_argument("--values", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--most_mib", type=float, metavar="SIZE")
    return command_line.run(parser, _export, argv)


def _export(options: Any) -> command_line.Answer:
    arrays, sparse, facts = (sparse_file.read if options.run.is_file() else of_run)(options.run)
    most = math.inf if options.most_mib is None else options.most_mib * 2**20
    values = options.values
    data = sparse_file.encode(arrays, sparse=sparse, facts=facts, values=values)
    if len(data) > most and values is None:
        values = "bfloat16"
        data = sparse_file.encode(arrays, sparse=sparse, facts=facts, values=values)
    size = len(data)
    if size > most:
        raise UsageError(
            f"--most_mib {options.most_mib:g} cannot be met: {options.output} would have "
            f"{size / 2**20:.1f} MiB with values in {values}"
        )
    try:
        replace_bytes(options.output, data)
    except OSError as error:
        raise UsageError(f"{options.output} cannot be written: {error.strerror}") from error
    text = f"{options.output}: {size / 2**20:.1f} MiB{f', {values}' if values else ''}"
    return command_line.Answer({"file": str(options.output), "bytes": size, "values": values}, text)


if __name__ == "__main__":
    sys.exit(main())
