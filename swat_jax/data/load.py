"""Chooses the source that the config names."""

import importlib
from typing import Any

from swat_jax.data import settings as data_settings
from swat_jax.data.interface import Dataset


def load(config: Any, *, process_index: int = 0, process_count: int = 1) -> Dataset:
    """Opens the data set of a config; everything that can be checked without decoding is checked.

    Args:
      config: a config with the keys of `swat_jax.recipe.base`.
      process_index: which of the processes this is (`jax.process_index()`).
      process_count: how many processes share a batch (`jax.process_count()`).

    Raises:
      UsageError: a value that is not allowed, or data that are missing or broken.

    Example:
      >>> from swat_jax import config_file
      >>> dataset = load(config_file.load("configs/digits.py"))
      >>> next(iter(dataset.train(epoch=0)))["image"].shape
      (64, 8, 8, 1)
    """
    settings = data_settings.read(config, process_index, process_count)
    # Only the source that is used is imported: some of them take seconds to import.
    source = importlib.import_module(f"swat_jax.data.sources.{settings.source}")
    return source.load(settings)
