r"""Says what is on images, by the weights of a sparse file.

Examples:
  python -m swat_jax.predict --weights pruned.safetensors cat.jpg
  python -m swat_jax.predict --weights pruned.safetensors photos/*.jpg
  python -m swat_jax.predict --weights pruned.safetensors --json cat.jpg dog.png

  IMAGE ...        files in any format that OpenCV reads
  --weights FILE   of `python -m swat_jax.export`, or one in pretrained/

The file knows its network, the size and the colours that images are brought to,
and the names of the classes. An image's shorter side is resized, and its centre
cut out, as for the scores of a run.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from swat_jax import build, command_line, data_parallel, export, sparse_file, training_setup
from swat_jax.data import decode, on_device
from swat_jax.errors import UsageError

MOST_TOLD = 5


def predict(weights: Path, images: Sequence[Path]) -> list[list[tuple[str, float]]]:
    """The likeliest classes of every image, each with its probability, the likeliest first.

    Args:
      weights: a file of `python -m swat_jax.export`.
      images: files in any format that OpenCV reads.

    Raises:
      UsageError: a file that cannot be read, or that does not say of which network it is.
    """
    found = sparse_file.read(weights)
    try:
        plain = found.facts["config"]
        info = export.info_of(plain, found.facts)
        config: Any = ConfigDict(plain)
        trainer, make_state = training_setup.make_trainer(config, info, data_parallel.make_mesh(1))
        margin = config.data.augmentation == "random_resized_crop"
        trees = export.trees_of(weights, found.arrays, make_state)
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise UsageError(f"{weights} does not say of which network it is: {error!r}") from error
    size, _, channels = info.image_shape
    model = trainer.dense.model(trees)
    model.eval()
    dtype = build.PRECISIONS[config.precision]
    told = []
    for path in images:
        pixels = decode.center_crop(_bytes(path), size, channels, str(path), margin=margin)
        inputs = on_device.normalize(jnp.asarray(pixels[None]), info.mean, info.std, dtype)
        shares = np.asarray(jax.nn.softmax(model(inputs)[0].astype(jnp.float32)))
        order = np.argsort(-shares, kind="stable")[:MOST_TOLD]
        told.append([(info.class_names[label], float(shares[label])) for label in order])
    return told


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error


def _plain(name: str) -> str:
    """A name of a file that anybody may have written, fit for a terminal."""
    return name if name.isprintable() else ascii(name)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = command_line.Parser(__doc__)
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    parser.add_argument("--weights", type=Path, required=True)
    return command_line.run(parser, _predict, argv)


def _predict(options: Any) -> command_line.Answer:
    found = predict(options.weights, options.images)
    lines = [
        f"{path}: {', '.join(f'{_plain(name)} {share:.1%}' for name, share in classes)}"
        for path, classes in zip(options.images, found, strict=True)
    ]
    by_image = dict(zip(map(str, options.images), found, strict=True))
    return command_line.Answer(by_image, "\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
