"""Official archives to standard TFDS directories: ``python -m swat_jax.data.prepare NAME``."""

# What can be prepared, by its TFDS name.
DATASETS = ("cifar10", "cifar100", "imagenet2012")
