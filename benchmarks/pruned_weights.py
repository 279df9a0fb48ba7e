"""The weights of a finished run under their masks, in compact form: `WORKDIR OUT.npz`.

    python benchmarks/pruned_weights.py runs/cifar10_vgg16_u90_seed0 vgg16_u90.npz

Of a sparse kernel `PATH/bitmap` (uint8, little-endian bits) says where weights are not zero,
`PATH/values` holds those in order, `PATH/shape` its shape; everything else (biases, batch norm and
its running averages, dense kernels) is an array under its path. Values are float32, or, where the
file would be larger than 16 MiB, bfloat16 as uint16 (`values_bfloat16`).
"""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict
from parts import MOST_BYTES

from swat_jax import checkpoint, step
from swat_jax.data import Info


def load(workdir: pathlib.Path) -> tuple[dict[str, np.ndarray], set[str]]:
    """Pruned weights and running averages by path, and the paths of sparse kernels."""
    plain = json.loads((workdir / "config.json").read_text())
    result = json.loads((workdir / "result.json").read_text())
    classes = result["num_classes"]
    info = Info(
        name="", num_classes=classes, image_shape=tuple(result["image_shape"]),
        num_train=plain["batch_size"], num_holdout=0, num_test=1, mean=plain["data"]["mean"],
        std=plain["data"]["std"], class_names=tuple(map(str, range(classes))),
    )  # fmt: skip
    trainer, make_state = step.make_trainer(ConfigDict(plain), info, step.make_mesh(1))
    with checkpoint.Checkpointer(workdir / "checkpoints", config=plain) as checkpoints:
        restored = checkpoints.restore(make_state(), refresh=("activation_thresholds",))
    if restored is None or restored.step != result["steps"]:
        step_of = "none" if restored is None else f"one of step {restored.step}"
        raise SystemExit(f"{workdir} must hold a checkpoint of step {result['steps']}: {step_of}")
    if plain["checkpoint"]["select"] != "last":
        raise SystemExit(f"{workdir}: its scores are not those of the last checkpoint")
    trees = {
        "params": trainer.prune(restored.state),
        "batch_stats": restored.state["batch_stats"],
    }
    found: Any = traverse_util.flatten_dict(jax.device_get(trees), sep="/")
    sparse = {
        f"params/{layer.path}/kernel" for layer in trainer.layers if layer.weight_sparsity > 0
    }
    return found, sparse & found.keys()


def compact(arrays: dict[str, np.ndarray], sparse: set[str], narrow: bool) -> dict[str, Any]:
    """What the file holds."""
    found: dict[str, Any] = {}
    for path, array in arrays.items():
        if path not in sparse:
            found[path] = array
            continue
        kept = array != 0
        values = array[kept]
        found[f"{path}/shape"] = np.array(array.shape)
        found[f"{path}/bitmap"] = np.packbits(kept, bitorder="little")
        if narrow:
            narrowed = np.asarray(jnp.asarray(values, jnp.bfloat16))
            found[f"{path}/values_bfloat16"] = narrowed.view(np.uint16)
        else:
            found[f"{path}/values"] = values
    return found


def restore(file: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays by path, dense again."""
    found: dict[str, np.ndarray] = {}
    with np.load(file) as held:
        for name in held.files:
            if name.endswith("/shape"):
                path = name.removesuffix("/shape")
                shape = tuple(held[name])
                bits = np.unpackbits(held[f"{path}/bitmap"], bitorder="little")
                kept = bits[: np.prod(shape)].astype(bool)
                dense = np.zeros(kept.shape, np.float32)
                narrow = f"{path}/values_bfloat16"
                if narrow in held:
                    dense[kept] = (held[narrow].astype(np.uint32) << 16).view(np.float32)
                else:
                    dense[kept] = held[f"{path}/values"]
                found[path] = dense.reshape(shape)
            elif not name.endswith(("/bitmap", "/values", "/values_bfloat16")):
                found[name] = held[name]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="The pruned weights of a run, in compact form.")
    parser.add_argument("workdir", type=pathlib.Path)
    parser.add_argument("output", type=pathlib.Path)
    options = parser.parse_args()
    arrays, sparse = load(options.workdir)
    for narrow in (False, True):
        np.savez_compressed(options.output, **compact(arrays, sparse, narrow))
        size = options.output.stat().st_size
        if size <= MOST_BYTES:
            break
    else:
        raise SystemExit(f"{options.output}: {size / 2**20:.1f} MiB are more than 16")
    print(f"{options.output}: {size / 2**20:.1f} MiB{', bfloat16' if narrow else ''}")


if __name__ == "__main__":
    main()
