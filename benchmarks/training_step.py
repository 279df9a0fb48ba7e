"""A training step of a config on synthetic images that lie on the device: what is measured here."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from swat_jax import config_file, step
from swat_jax.data import Info


@dataclasses.dataclass
class TrainingStep:
    """A compiled step with its state, which `run` moves on.

    Attributes:
      config: as it was compiled.
      compiled: the program.
      state: a training state; None where the step is only compiled.
      batch: images and labels.
    """

    config: Any
    compiled: Any
    state: Any
    batch: tuple[jax.Array, ...]

    def run(self, *, refresh: bool = False) -> None:
        """One step, asynchronously; with ``refresh`` one that recomputes thresholds."""
        if refresh:
            self.state = {**self.state, "step": jax.numpy.zeros_like(self.state["step"])}
        self.state, _ = self.compiled(self.state, *self.batch)

    def milliseconds(self, count: int, *, refresh: bool = False) -> float:
        """Mean time of a step over ``count`` of them."""
        jax.block_until_ready(self.state)
        start = time.perf_counter()
        for _ in range(count):
            self.run(refresh=refresh)
        jax.block_until_ready(self.state)
        return (time.perf_counter() - start) / count * 1e3


def make(
    name: str,
    method: str,
    batch: int,
    *,
    precision: str = "bfloat16",
    settings: Mapping[str, Any] | None = None,
    only_compile: bool = False,
) -> TrainingStep:
    """Compiles a step of ``configs/<name>.py:<method>`` for one device.

    Args:
      name: of the config.
      method: as it is spelled after the config's file.
      batch: images.
      precision: as in the config.
      settings: further values of the config by their dotted names.
      only_compile: whether nothing is put on the device.
    """
    config: Any = config_file.load(f"configs/{name}.py:{method}")
    config.batch_size, config.precision = batch, precision
    config.update_from_flattened_dict(dict(settings or {}))
    size, classes = (224, 1000) if name.startswith("imagenet") else (32, 10)
    info = Info(
        name="synthetic", num_classes=classes, image_shape=(size, size, 3),
        num_train=1_281_167 if size == 224 else 50_000, num_holdout=0, num_test=1,
        mean=(0.5,) * 3, std=(0.25,) * 3, class_names=tuple(map(str, range(classes))),
    )  # fmt: skip
    trainer, make_state = step.make_trainer(config, info, step.make_mesh(1))
    train_step: Any = trainer.train_step
    shape = (batch, size, size, 3)
    if only_compile:
        images: Any = jax.ShapeDtypeStruct(shape, np.uint8)
        labels: Any = jax.ShapeDtypeStruct((batch,), np.int32)
        compiled = train_step.lower(jax.eval_shape(make_state), images, labels).compile()
        return TrainingStep(config, compiled, None, ())
    rng = np.random.default_rng(0)
    images, labels = step.put_batch(
        trainer,
        rng.integers(0, 256, shape, np.uint8),
        rng.integers(0, classes, batch).astype(np.int32),
    )
    state = make_state()
    compiled = train_step.lower(state, images, labels).compile()
    return TrainingStep(config, compiled, state, (images, labels))
