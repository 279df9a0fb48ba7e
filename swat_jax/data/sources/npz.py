"""An `.npz` file of uint8 images and integer labels."""

import pathlib
import zipfile
from typing import Any

import numpy as np

from swat_jax.data.in_memory import Arrays, InMemoryDataset
from swat_jax.data.settings import Settings
from swat_jax.errors import UsageError

# (training images, training labels, test images, test labels); the first is what we write.
KEYS = (
    ("train_images", "train_labels", "test_images", "test_labels"),
    ("x_train", "y_train", "x_test", "y_test"),
)


def load(settings: Settings) -> InMemoryDataset:
    """Loads the file at `config.data.data_dir`.

    Args:
      settings: checked config.

    Raises:
      UsageError: not such a file, or arrays of the wrong names, shapes, dtypes or values.

    Example:
      >>> np.savez("set.npz", train_images=..., train_labels=..., test_images=..., test_labels=...)
    """
    path = settings.directory
    arrays = _read(path)
    train = _checked(path, *arrays[:2])
    test = _checked(path, *arrays[2:])
    if train.images.shape[1:] != test.images.shape[1:]:
        raise UsageError(
            f"config.data.data_dir: {path}: training images are {train.images.shape[1:]} and test "
            f"images {test.images.shape[1:]}; they must be equal"
        )
    num_classes = int(train.labels.max(initial=-1)) + 1
    if test.labels.max(initial=-1) >= num_classes:
        raise UsageError(
            f"config.data.data_dir: {path}: test labels go up to {test.labels.max()}, training "
            f"labels only to {num_classes - 1}"
        )
    absent = np.setdiff1d(np.arange(num_classes), train.labels)
    if absent.size:
        raise UsageError(
            f"config.data.data_dir: {path}: no training image has label {absent[0]}; labels must "
            f"be 0 to {num_classes - 1} without gaps"
        )
    return InMemoryDataset(
        settings,
        name=path.name,
        class_names=tuple(str(label) for label in range(num_classes)),
        train=train,
        test=test,
    )


def _read(path: pathlib.Path) -> list[tuple[str, Any]]:
    """Names and values of the four arrays."""
    if not path.is_file():
        raise UsageError(f"config.data.data_dir: source 'npz' needs a file, got {str(path)!r}")
    try:
        # Opened here: numpy leaves a file open that turns out to be broken.
        with path.open("rb") as opened:
            file = np.load(opened, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise UsageError(f"config.data.data_dir: {path} is no .npz file")
            for names in KEYS:
                if all(name in file for name in names):
                    return [(name, file[name]) for name in names]
            wanted = " or ".join(", ".join(names) for names in KEYS)
            raise UsageError(
                f"config.data.data_dir: {path} must hold {wanted}; it holds {', '.join(file)}"
            )
    except UsageError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"config.data.data_dir: cannot read {path}: {error}") from error


def _checked(path: pathlib.Path, images: tuple[str, Any], labels: tuple[str, Any]) -> Arrays:
    """Images as (N, H, W, C) and labels as (N,), or an error that says what is wrong."""
    where = f"config.data.data_dir: {path}:"
    name, pixels = images
    if pixels.dtype != np.uint8:
        raise UsageError(f"{where} {name} must be uint8 (0 to 255), got {pixels.dtype}")
    if pixels.ndim == 3:
        pixels = pixels[..., None]
    if pixels.ndim != 4 or pixels.shape[-1] not in (1, 3):
        raise UsageError(
            f"{where} {name} must be (N, height, width) or (N, height, width, 1 or 3), "
            f"got {images[1].shape}"
        )
    name, classes = labels
    if not np.issubdtype(classes.dtype, np.integer):
        raise UsageError(f"{where} {name} must be integers, got {classes.dtype}")
    if classes.shape == (len(pixels), 1):  # as Keras keeps CIFAR
        classes = classes[:, 0]
    if classes.shape != (len(pixels),):
        raise UsageError(
            f"{where} {name} must be ({len(pixels)},) like the images, got {classes.shape}"
        )
    if classes.size and (classes.min() < 0 or classes.max() >= 2**31):
        raise UsageError(
            f"{where} {name} must count from 0, got {classes.min()} to {classes.max()}"
        )
    return Arrays(pixels, classes.astype(np.int32))
