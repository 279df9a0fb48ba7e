"""Batches of uint8 images and labels, from the source that `config.data` names."""

from swat_jax.data.interface import PADDING_LABEL, Batch, Dataset, Info, Split
from swat_jax.data.load import load

__all__ = ["PADDING_LABEL", "Batch", "Dataset", "Info", "Split", "load"]
