"""Imports tensorflow-datasets and checks that it is whole."""

import importlib
from typing import Any

from swat_jax.errors import RunError


def tensorflow_datasets() -> Any:
    """The package `tensorflow_datasets`; TensorFlow is neither needed nor imported.

    Raises:
      RunError: it is not there, or came up empty.
    """
    try:
        tfds = importlib.import_module("tensorflow_datasets")
    except ImportError as error:
        raise RunError(f"tensorflow-datasets cannot be imported: {error}") from error
    # It hides an import error of its own dependencies behind an empty module.
    if not hasattr(tfds, "core"):
        raise RunError(
            "tensorflow-datasets lacks something that it needs, importlib_resources perhaps; "
            "run pip install importlib_resources"
        )
    return tfds
