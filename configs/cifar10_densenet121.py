r"""DenseNet-121 (growth 32) on CIFAR-10.

    python -m swat_jax.main --config configs/cifar10_densenet121.py:u90 \
        --config.data.data_dir DATA --workdir RUN

DATA comes from `python -m swat_jax.data.prepare cifar10`. The SWAT paper's top-1 in percent: u90
94.48, erk90 94.14, m90 94.29; channel50 95.04, channel60 94.82, channel70 94.81. Its figures are of
the checkpoint that was best on the test set, pruned; this program scores the last one, so expect a
little less. Other methods have no published figure to compare with.
"""

from ml_collections import ConfigDict

from swat_jax import method as methods
from swat_jax import recipe

METHODS = ("dense", *recipe.UNSTRUCTURED, *recipe.STRUCTURED)


def get_config(method: str = "u90") -> ConfigDict:
    """Config for `method` (see `swat_jax.method.parse`)."""
    config = recipe.cifar("cifar10")
    config.model.name = "densenet121"
    config.epochs = 150
    recipe.step_schedule(config, milestones=(50, 100), factor=0.1)
    config.sparsity.threshold_every_steps = 10
    return methods.apply(config, method)
