r"""WRN-50-2 on ImageNet.

    python -m swat_jax.main --config configs/imagenet_wrn50_2.py:u80 \
        --config.data.data_dir DATA --workdir RUN

DATA comes from `python -m swat_jax.data.prepare imagenet2012`. This project has not run it. `python
-m swat_jax.flops` gives the FLOPs of each method, for u80 78.6 % less than dense, as in the SWAT
paper.
"""

from ml_collections import ConfigDict

from swat_jax import method as methods
from swat_jax import recipe

METHODS = ("dense", "u80", "u90", *recipe.STRUCTURED)


def get_config(method: str = "u90") -> ConfigDict:
    """Config for `method` (see `swat_jax.method.parse`)."""
    config = recipe.imagenet()
    config.model.name = "imagenet_wrn50_2"
    return methods.apply(config, method)
