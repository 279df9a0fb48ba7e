"""The parts of a config that concern the data, checked once, before anything is read."""

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from swat_jax.data.augment import AUGMENTATIONS
from swat_jax.errors import UsageError

SOURCES = ("digits", "tfds", "folder", "npz", "synthetic")
RANDOM_RESIZED_CROP = "random_resized_crop"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Checked values of `config.data` and the batch sizes.

    Attributes:
      title: `config.dataset`.
      source: one of `SOURCES`.
      name: TFDS name; empty for other sources.
      data_dir: directory or file; None for sources that need none.
      image_size: height and width of the images in a batch.
      augmentation: one of `AUGMENTATIONS` or "random_resized_crop".
      mean: per channel, of pixel / 255; its length is the number of channels.
      std: per channel, of pixel / 255.
      on_device: the training set will be asked for as arrays.
      workers: threads that prepare batches; 0: in the thread that asks for them.
      holdout: fraction of the training set that is kept out of training.
      test_fraction: part of the images that becomes the test set where there is none.
      seed: `config.seed`.
      batch_size: training batch over all processes.
      eval_batch_size: evaluation batch over all processes.
      process_index: which of the processes this is.
      process_count: how many processes share a batch.
    """

    title: str
    source: str
    name: str
    data_dir: pathlib.Path | None
    image_size: int
    augmentation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    on_device: bool
    workers: int
    holdout: float
    test_fraction: float
    seed: int
    batch_size: int
    eval_batch_size: int
    process_index: int
    process_count: int

    @property
    def channels(self) -> int:
        """Channels of an image: 1 (grey) or 3 (RGB)."""
        return len(self.mean)

    @property
    def directory(self) -> pathlib.Path:
        """`data_dir` of a source that needs one.

        Raises:
          UsageError: it was not given, or there is nothing at that path.
        """
        if self.data_dir is None:
            raise UsageError(
                f"config.data.data_dir: source {self.source!r} needs it; add "
                "--config.data.data_dir=PATH"
            )
        if not self.data_dir.exists():
            raise UsageError(f"config.data.data_dir: nothing at {str(self.data_dir)!r}")
        return self.data_dir


def read(config: Any, process_index: int = 0, process_count: int = 1) -> Settings:
    """Checks the data part of a config.

    Args:
      config: a config with the keys of `swat_jax.recipe.base`.
      process_index: which of the processes this is.
      process_count: how many processes share a batch.

    Raises:
      UsageError: a value that is not allowed.
    """
    data = config.data
    source = _choice("config.data.source", data.source, SOURCES)
    augmentation = _choice(
        "config.data.augmentation", data.augmentation, (*AUGMENTATIONS, RANDOM_RESIZED_CROP)
    )
    if augmentation == RANDOM_RESIZED_CROP:
        if data.on_device:
            raise UsageError(
                "config.data.on_device: random_resized_crop works on the host only; set "
                "--config.data.on_device=False"
            )
        if source in ("digits", "npz"):
            raise UsageError(
                f"config.data.augmentation: random_resized_crop is for folders and TFDS sets; "
                f"source {source!r} takes {', '.join(AUGMENTATIONS)}"
            )
    _integer("process_count", process_count, 1)
    if not 0 <= _integer("process_index", process_index, 0) < process_count:
        raise UsageError(
            f"process_index: must be below process_count {process_count}, got {process_index}"
        )
    mean, std = _statistics(data.mean, data.std)
    return Settings(
        title=str(config.dataset),
        source=source,
        name=data.name or "",
        data_dir=pathlib.Path(data.data_dir).expanduser() if data.data_dir else None,
        image_size=_integer("config.data.image_size", data.image_size, 1),
        augmentation=augmentation,
        mean=mean,
        std=std,
        on_device=bool(data.on_device),
        workers=_integer("config.data.workers", data.workers, 0),
        holdout=_fraction("config.data.holdout", data.holdout, zero=True),
        test_fraction=_fraction("config.data.test_fraction", data.test_fraction, zero=False),
        seed=_integer("config.seed", config.seed, 0),
        batch_size=_shared("config.batch_size", config.batch_size, process_count),
        eval_batch_size=_shared("config.eval.batch_size", config.eval.batch_size, process_count),
        process_index=process_index,
        process_count=process_count,
    )


def _choice(argument: str, value: Any, allowed: Sequence[str]) -> str:
    if value not in allowed:
        raise UsageError(f"{argument}: must be one of {', '.join(allowed)}, got {value!r}")
    return value


def _integer(argument: str, value: Any, minimum: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise UsageError(f"{argument}: must be an integer of at least {minimum}, got {value!r}")
    return value


def _shared(argument: str, value: Any, process_count: int) -> int:
    """A batch size that the processes share evenly."""
    if _integer(argument, value, 1) % process_count:
        raise UsageError(
            f"{argument}: must be divisible by the {process_count} processes, got {value}"
        )
    return value


def _fraction(argument: str, value: Any, *, zero: bool) -> float:
    inside = isinstance(value, int | float) and (0 <= value < 1 if zero else 0 < value < 1)
    if not inside:
        bounds = "[0, 1)" if zero else "(0, 1)"
        raise UsageError(f"{argument}: must be a fraction in {bounds}, got {value!r}")
    return float(value)


def _statistics(mean: Any, std: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation: one finite number per channel each."""
    for argument, values in (("config.data.mean", mean), ("config.data.std", std)):
        numbers = isinstance(values, Sequence) and all(isinstance(v, int | float) for v in values)
        if not numbers or len(values) not in (1, 3):
            raise UsageError(
                f"{argument}: must be 1 number (grey images) or 3 (colour), got {values!r}"
            )
        if not all(math.isfinite(value) for value in values):
            raise UsageError(f"{argument}: must be finite, got {values!r}")
    if len(mean) != len(std):
        raise UsageError(
            f"config.data.std: must have as many numbers as config.data.mean ({len(mean)}), "
            f"got {len(std)}"
        )
    if min(std) <= 0:
        raise UsageError(f"config.data.std: must be positive, got {std!r}")
    return tuple(map(float, mean)), tuple(map(float, std))
