"""resnet8 on the 8x8 digits that come with scikit-learn: no download, about a minute on two cores.

    python -m swat_jax.main --config configs/digits.py --workdir runs/digits
    python -m swat_jax.main --config configs/digits.py:erk90 --workdir runs/digits_erk90

Expect at least 97 % test accuracy after hard pruning, for 90 % of zeros in weights and saved
activations (the first conv stays dense). This data set is not in the paper: it is here to show the
whole path at work.
"""

from ml_collections import ConfigDict

from swat_jax import method as methods
from swat_jax import recipe

METHODS = ("dense", "u90", "erk90", "m90", "channel70")


def get_config(method: str = "u90") -> ConfigDict:
    """Config for `method` (see `swat_jax.method.parse`)."""
    config = recipe.digits()
    config.model.name = "resnet8"
    config.epochs = 20
    config.optimizer.schedule.name = "cosine"
    return methods.apply(config, method)
