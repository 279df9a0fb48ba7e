r"""ResNet-50 (stride in the 3x3 convs) on ImageNet.

    python -m swat_jax.main --config configs/imagenet_resnet50.py:u80 \
        --config.data.data_dir DATA --workdir RUN

DATA comes from `python -m swat_jax.data.prepare imagenet2012`. This project has not run it. The
SWAT paper's abstract reports 80 % fewer training FLOPs at 1.63 points below dense top-1; `python -m
swat_jax.flops` gives the FLOPs of each method, for u80 76.1 % less than dense.
"""

from ml_collections import ConfigDict

from swat_jax import method as methods
from swat_jax import recipe

METHODS = ("dense", "u80", "u90", "erk80", "erk90", "m80", "m90", *recipe.STRUCTURED)


def get_config(method: str = "u90") -> ConfigDict:
    """Config for `method` (see `swat_jax.method.parse`)."""
    config = recipe.imagenet()
    config.model.name = "imagenet_resnet50"
    return methods.apply(config, method)
