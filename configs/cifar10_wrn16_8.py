r"""WRN-16-8 (dropout 0.3) on CIFAR-10.

    python -m swat_jax.main --config configs/cifar10_wrn16_8.py:u90 \
        --config.data.data_dir DATA --workdir RUN

DATA comes from `python -m swat_jax.data.prepare cifar10`. The SWAT paper's top-1 in percent: u90
95.13, erk95 95.00, m95 94.97. Its figures are of the checkpoint that was best on the test set,
pruned; this program scores the last one, so expect a little less. Other methods have no published
figure to compare with.
"""

from ml_collections import ConfigDict

from swat_jax import method as methods
from swat_jax import recipe

METHODS = ("dense", *recipe.UNSTRUCTURED)


def get_config(method: str = "u90") -> ConfigDict:
    """Config for `method` (see `swat_jax.method.parse`)."""
    config = recipe.cifar("cifar10")
    config.model.name = "wrn16_8"
    config.epochs = 200
    recipe.step_schedule(config, milestones=(60, 120, 160), factor=0.2)
    config.sparsity.threshold_every_steps = 20
    return methods.apply(config, method)
