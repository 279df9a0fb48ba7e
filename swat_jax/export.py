r"""Takes a sparse network home: its hard-pruned weights in one small file.

    python -m swat_jax.export RUN pruned.safetensors
    python -m swat_jax.export RUN pruned.safetensors --values bfloat16
    python -m swat_jax.export RUN pruned.safetensors --most_mib 16

RUN is the workdir of a run that is done. Its last checkpoint is pruned to exact masks, and kernels
that are sparse are written as one bit a weight and the values that are left (`sparse_file.py` says
how). `--values bfloat16` rounds those, `--most_mib` does so only where the file would be larger.

In Python, `save` writes any model with SWAT layers, `load` reads a file, `load_into` puts it into a
model of stock or of SWAT layers.

Exit code: 0 done, 2 the request cannot be met.
"""

from __future__ import annotations

import argparse
import json
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

from swat_jax import checkpoint, network, pruning, sparse_file, step
from swat_jax.data import Info
from swat_jax.errors import UsageError
from swat_jax.layers import WeightBudget

# What is saved of a model, of the collections in `network.STATEFUL`.
COLLECTIONS = {"params": nnx.Param, "batch_stats": nnx.BatchStat}
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
      model: with SWAT layers anywhere in it, or without any; it stays as it is.
      facts: what to say about it, anything that JSON can hold, such as ``{"config": ...}``.
      values: the type for values of sparse kernels, such as "bfloat16"; None: their own.

    Returns:
      The size of the file in bytes.

    Raises:
      UsageError: a weight of a type that a file cannot hold.
      OSError: the file cannot be written.

    Example:
      >>> layer = SwatConv(3, 64, (3, 3), weight_sparsity=0.9, rngs=nnx.Rngs(0))
      >>> save("layer.safetensors", layer)  # doctest: +SKIP
    """
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
      >>> load("layer.safetensors")["params"]["kernel"].shape  # doctest: +SKIP
      (3, 3, 3, 64)
    """
    arrays = sparse_file.read(Path(path)).arrays
    return _nested(Path(path), arrays)


def load_into(path: str | os.PathLike[str], model: nnx.Module) -> None:
    """Puts the weights of a file into a model, in the types that the model has.

    In SWAT layers whose number of weights is state (SWAT-M) it becomes that of the file.

    Args:
      path: the file.
      model: with the same layers under the same names, of stock or of SWAT layers.

    Raises:
      UsageError: it is no such file, or one of another model; the model is unchanged.

    Example:
      >>> load_into("pruned.safetensors", model)  # doctest: +SKIP
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

    new = [(place, filled(name, variable)) for name, place, variable in flat]
    nnx.update(model, nnx.from_flat_state(new))
    for place, layer in pruning.sparse_layers(model):
        if layer.weight_budget is not None:
            kernel = "/".join(filter(None, ("params", place, "kernel")))
            kept = np.count_nonzero(arrays[kernel])
            layer.weight_budget = nnx.data(WeightBudget(jnp.asarray(kept, jnp.int32)))


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
      make_state: from `step.make_trainer`.

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
    except (OSError, ValueError) as error:
        raise UsageError(f"{workdir} must be the workdir of a run that is done: {error}") from error
    if plain["checkpoint"]["select"] != "last":
        raise UsageError(f"{workdir}: its scores are not those of the last checkpoint")
    trainer, make_state = step.make_trainer(
        ConfigDict(plain), info_of(plain, result), step.make_mesh(1)
    )
    with checkpoint.Checkpointer(workdir / "checkpoints", config=plain) as checkpoints:
        restored = checkpoints.restore(make_state(), refresh=("activation_thresholds",))
    if restored is None or restored.step != result["steps"]:
        found = "none" if restored is None else f"one of step {restored.step}"
        raise UsageError(f"{workdir} must hold a checkpoint of step {result['steps']}: {found}")
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
    """
    names = result.get("class_names") or map(str, range(result["num_classes"]))
    return Info(
        name=config["dataset"], num_classes=result["num_classes"],
        image_shape=tuple(result["image_shape"]), num_train=config["batch_size"], num_holdout=0,
        num_test=1, mean=tuple(config["data"]["mean"]), std=tuple(config["data"]["std"]),
        class_names=tuple(names),
    )  # fmt: skip


def _flat(trees: Mapping[str, Any]) -> dict[str, np.ndarray]:
    flat: Any = traverse_util.flatten_dict(jax.device_get(dict(trees)), sep="/")
    return dict(flat)


def _sparse(layers: Sequence[pruning.SparseLayer], arrays: Mapping[str, np.ndarray]) -> set[str]:
    """Names of kernels that have zeros to be left out."""
    kernels = {"/".join(filter(None, ("params", layer.path, "kernel"))) for layer in layers}
    return {name for name in kernels & arrays.keys() if np.any(arrays[name] == 0)}


def _nested(path: Path, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    for name in arrays:
        parents = name.split("/")[:-1]
        if any("/".join(parents[: n + 1]) in arrays for n in range(len(parents))):
            raise UsageError(f"{path}: {name} lies inside of another array")
    tree: dict[str, Any] = {name: {} for name in COLLECTIONS}
    return tree | traverse_util.unflatten_dict(dict(arrays), sep="/")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m swat_jax.export", description="The pruned weights of a run as one file."
    )
    parser.add_argument("run", type=Path, help="workdir of a run that is done")
    parser.add_argument("output", type=Path, help="file to write, such as pruned.safetensors")
    types = ("bfloat16", "float16", "float32")
    parser.add_argument("--values", choices=types, help="of sparse kernels; default: as trained")
    parser.add_argument("--most_mib", type=float, help="bfloat16 values where it would be larger")
    options = parser.parse_args(argv)
    try:
        arrays, sparse, facts = of_run(options.run)
        values = options.values
        size = sparse_file.write(options.output, arrays, sparse=sparse, facts=facts, values=values)
        if options.most_mib is not None and size > options.most_mib * 2**20 and values is None:
            values = "bfloat16"
            size = sparse_file.write(
                options.output, arrays, sparse=sparse, facts=facts, values=values
            )
    except (UsageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.output}: {size / 2**20:.1f} MiB{f', {values}' if values else ''}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
