r"""DenseNet-121 (growth 32) on CIFAR-100.

    python -m swat_jax.main --config configs/cifar100_densenet121.py:u90 \
        --config.data.data_dir DATA --workdir RUN

DATA comes from `python -m swat_jax.data.prepare cifar100`. There is no figure to expect: where the
paper lists CIFAR-100, the unstructured rows repeat the accuracies of CIFAR-10, so this project
takes no target from them. The recipe is that of CIFAR-10.
"""

from ml_collections import ConfigDict

from swat_jax import method as methods
from swat_jax import recipe

METHODS = ("dense", *recipe.UNSTRUCTURED, *recipe.STRUCTURED)


def get_config(method: str = "u90") -> ConfigDict:
    """Config for `method` (see `swat_jax.method.parse`)."""
    config = recipe.cifar("cifar100")
    config.model.name = "densenet121"
    config.epochs = 150
    recipe.step_schedule(config, milestones=(50, 100), factor=0.1)
    config.sparsity.threshold_every_steps = 10
    return methods.apply(config, method)
