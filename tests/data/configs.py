"""Small configs, images and files for the tests of the data sets."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np

from swat_jax import recipe

GREY = {"mean": (0.5,), "std": (0.25,)}
COLOUR = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3)}


def make_config(source: str, *, batch_size: int = 4, eval_batch_size: int = 5, **data: Any) -> Any:
    """A complete config; keywords set `config.data`."""
    config: Any = recipe.base()
    config.dataset = "test"
    config.epochs = 1
    config.batch_size = batch_size
    config.eval.batch_size = eval_batch_size
    config.model.name = "resnet8"
    config.data.update({"image_size": 8, "on_device": False, **COLOUR, "source": source, **data})
    return config


def digits_config(**data: Any) -> Any:
    return make_config(
        "digits",
        **{"batch_size": 64, "eval_batch_size": 100, "augmentation": "shift"} | GREY | data,
    )


def random_images(count: int, *, size: int = 8, channels: int = 3, seed: int = 0) -> np.ndarray:
    shape = (count, size, size, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def write_npz(path: Path, *, train: int = 20, test: int = 7, size: int = 8, channels: int = 3):
    """Random images with labels 0, 1, 2, 0, ...; returns what was written."""
    arrays = {
        "train_images": random_images(train, size=size, channels=channels),
        "train_labels": np.arange(train) % 3,
        "test_images": random_images(test, size=size, channels=channels, seed=1),
        "test_labels": np.arange(test) % 3,
    }
    np.savez(path, **arrays)
    return arrays


def smooth_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    """RGB without fine detail, as JPEG keeps it."""
    coarse = random_images(1, size=4, seed=seed)[0]
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def encode(image: np.ndarray, suffix: str = ".jpg") -> bytes:
    """An RGB or grey image as a file."""
    ordered = image[..., ::-1] if image.ndim == 3 else image
    quality = [cv2.IMWRITE_JPEG_QUALITY, 98] if suffix == ".jpg" else []
    return cv2.imencode(suffix, np.ascontiguousarray(ordered), quality)[1].tobytes()


def same_batches(first: list, second: list) -> bool:
    """Bit for bit."""
    return len(first) == len(second) and all(
        a.keys() == b.keys()
        and all(a[k].dtype == b[k].dtype and np.array_equal(a[k], b[k]) for k in a)
        for a, b in zip(first, second, strict=True)
    )
