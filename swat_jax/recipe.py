"""The training recipes that the files in `configs/` start from, and with them the config schema.

Each function returns a complete `ConfigDict`: every key that the program reads is there. A value of
None means "choose for me", and a flag may set it: `--config.devices=2`.

Source: Raihan and Aamodt, "Sparse Weight Activation Training" (NeurIPS 2020), section 4 and its
supplement, read as design decisions of this project where they leave something open.
"""

from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict, config_dict

from swat_jax.errors import UsageError, did_you_mean

# Rows of the paper's CIFAR tables, for the config files that have them.
UNSTRUCTURED = ("u80", "u90", "u95", "erk80", "erk90", "erk95", "m80", "m90", "m95")
STRUCTURED = ("channel50", "channel60", "channel70")

# Training images of ImageNet at the paper's batch size: 5,005 steps of 256.
IMAGENET_STEPS = 5005
IMAGENET_BATCH = 256
IMAGENET_REFRESHES_PER_EPOCH = 5


def base() -> ConfigDict:
    """What all recipes share; keys that each of them must set cannot be read here."""
    config: Any = ConfigDict()
    config.seed = 0
    config.dataset = config_dict.required_placeholder(str)
    config.epochs = config_dict.required_placeholder(int)
    config.batch_size = config_dict.required_placeholder(int)  # global: summed over all devices
    config.precision = "bfloat16"  # of conv, linear and batch norm; parameters are float32
    config.label_smoothing = 0.0
    config.deterministic = False  # on a GPU: bit-identical reruns at some cost in speed
    config.sync_batch_norm = False  # batch statistics over all devices instead of per device
    config.devices = config_dict.placeholder(int)  # None: all local ones
    config.max_steps = config_dict.placeholder(int)  # stop early, for short trials
    config.steps_per_dispatch = config_dict.placeholder(int)  # on-device data only; None: chosen

    config.model = ConfigDict()
    config.model.name = config_dict.required_placeholder(str)
    config.model.dropout_rate = config_dict.placeholder(float)  # None: the network's own
    # Batch norm and ReLU in one op. None: for sparse methods where it has kernels, or packs.
    config.model.fused_batch_norm = config_dict.placeholder(bool)

    config.data = ConfigDict()
    config.data.source = config_dict.required_placeholder(str)
    config.data.name = config_dict.placeholder(str)
    config.data.data_dir = config_dict.placeholder(str)
    config.data.image_size = config_dict.required_placeholder(int)
    config.data.augmentation = "none"
    config.data.mean = ()  # per channel, of pixel/255
    config.data.std = ()
    config.data.on_device = True
    config.data.workers = 0
    config.data.holdout = 0.0  # fraction of the training set kept out, to choose a checkpoint by
    config.data.test_fraction = 0.2  # split off where a set has no test part of its own

    config.sparsity = ConfigDict()
    config.sparsity.method = "dense"
    config.sparsity.distribution = "dense"
    config.sparsity.granularity = "unstructured"
    config.sparsity.weight = 0.0  # fractions of zeros
    config.sparsity.activation = 0.0
    config.sparsity.first_layer_dense = True
    config.sparsity.threshold_every_steps = 1  # 1: exact thresholds at every step
    config.sparsity.exact_epochs = 0
    # Keep saved activations in packed form. None: where there are kernels for it, but not under
    # momentum, whose budgets may come to keep everything.
    config.sparsity.pack = config_dict.placeholder(bool)
    # What computes the layers' products: "tuned", by the table of swat_jax.tune for this device
    # where there is one; "plain", masked weights and cuDNN; or the path of a table.
    config.sparsity.algorithms = "tuned"

    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 0.1
    config.optimizer.momentum = 0.9
    config.optimizer.nesterov = False
    config.optimizer.weight_decay = 5e-4
    config.optimizer.decay_batch_norm = True
    config.optimizer.schedule = ConfigDict()
    config.optimizer.schedule.name = "constant"
    config.optimizer.schedule.milestones = ()  # in epochs
    config.optimizer.schedule.factor = 0.1
    config.optimizer.schedule.warmup_epochs = 0

    config.checkpoint = ConfigDict()
    config.checkpoint.every_epochs = 1
    config.checkpoint.every_steps = 0  # 0: at epochs only
    config.checkpoint.keep = 1
    config.checkpoint.select = "last"  # "best_holdout" also saves every epoch that is evaluated

    config.eval = ConfigDict()
    config.eval.every_epochs = 1
    config.eval.batch_size = 500

    config.log = ConfigDict()
    config.log.every_steps = 50
    return config


def step_schedule(config: Any, milestones: Sequence[int], factor: float) -> None:
    """Sets a learning rate that is multiplied by `factor` at each of `milestones` (epochs)."""
    config.optimizer.schedule.name = "step"
    config.optimizer.schedule.milestones = tuple(milestones)
    config.optimizer.schedule.factor = factor


def check_keys(config: ConfigDict, path: str = "config") -> None:
    """Compares the keys of a config with those of `base`, so that a typo cannot pass unseen.

    Args:
      config: what a config file returned.
      path: the file, for the message.

    Raises:
      UsageError: a key that is unknown, missing or still without the value that it must have.
    """
    known, given = _flatten(base()), _flatten(config)
    for key in given:
        if key not in known:
            near = near_key(f"config.{key}")
            raise UsageError(f"{path}: unknown key config.{key}{near}")
    for key, value in known.items():
        if key not in given:
            raise UsageError(
                f"{path}: key config.{key} is missing; start from swat_jax.recipe.base"
            )
        if value is _REQUIRED and given[key] is _REQUIRED:
            raise UsageError(f"{path}: config.{key} must be set")


_REQUIRED = object()


def near_key(key: str) -> str:
    """What a message about an unknown key adds, see `swat_jax.errors.did_you_mean`.

    That is a key of just this name in any section, or those like it in the section it was sought.

    Args:
      key: with all sections, such as ``config.optimiser.learning_rate``.

    Example:
      >>> near_key("config.optimiser.learning_rate")
      '; did you mean config.optimizer?'
      >>> near_key("config.learning_rate")
      '; did you mean config.optimizer.learning_rate?'
    """
    sections: dict[str, dict[str, str]] = {}
    for leaf in _flatten(base()):
        path = "config"
        for part in leaf.split("."):
            sections.setdefault(path, {})[part] = f"{path}.{part}"
            path += f".{part}"
    section, rest = "config", key.split(".")[1:]
    while rest and f"{section}.{rest[0]}" in sections:
        section += f".{rest.pop(0)}"
    name = rest[0] if rest else ""
    elsewhere = next((names for names in sections.values() if name in names), {})
    return did_you_mean(name, elsewhere or sections[section])


def _flatten(section: Any, prefix: str = "") -> dict[str, Any]:
    """Values by dotted key; `_REQUIRED` where a required value was not set yet."""
    flat: dict[str, Any] = {}
    for key in section.keys():  # noqa: SIM118 (a ConfigDict)
        try:
            value = section[key]
        except config_dict.RequiredValueError:
            value = _REQUIRED
        if isinstance(value, ConfigDict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def digits() -> ConfigDict:
    """8x8 grey digits, 1,437 for training and 360 for the test, in float32: made for a CPU."""
    config: Any = base()
    config.dataset = "digits"
    config.batch_size = 64
    config.precision = "float32"
    config.data.update(
        {
            "source": "digits",
            "image_size": 8,
            "augmentation": "shift",
            "mean": (0.305,),
            "std": (0.376,),
        },
    )
    config.eval.batch_size = 360
    config.log.every_steps = 22
    return config


def cifar(dataset: str) -> ConfigDict:
    """CIFAR-10 or CIFAR-100: batch 128, lr 0.1, weight decay 5e-4 on everything, crop and flip.

    Args:
      dataset: "cifar10" or "cifar100"; also its TFDS name.
    """
    config: Any = base()
    config.dataset = dataset
    config.batch_size = 128
    config.data.update(
        {
            "source": "tfds",
            "name": dataset,
            "image_size": 32,
            "augmentation": "crop_flip",
            "mean": (0.4914, 0.4822, 0.4465),
            "std": (0.2023, 0.1994, 0.2010),
        },
    )
    return config


def imagenet() -> ConfigDict:
    """ImageNet: 90 epochs of batch 256, label smoothing, Nesterov, five threshold refreshes each.

    Learning rate (0.1 per 256 images) and threshold period follow `config.batch_size`, also when a
    flag changes it.
    """
    config: Any = base()
    config.dataset = "imagenet"
    config.epochs = 90
    config.batch_size = IMAGENET_BATCH
    config.label_smoothing = 0.1
    config.data.update(
        {
            "source": "tfds",
            "name": "imagenet2012",
            "image_size": 224,
            "augmentation": "random_resized_crop",
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "on_device": False,
            "workers": 16,
        },
    )
    batch = config.get_ref("batch_size")
    config.optimizer.learning_rate = 0.1 * batch.to_float() / IMAGENET_BATCH
    config.optimizer.nesterov = True
    config.optimizer.weight_decay = 1e-4
    config.optimizer.decay_batch_norm = False
    config.optimizer.schedule.warmup_epochs = 5
    step_schedule(config, milestones=(30, 60, 80), factor=0.1)
    config.sparsity.threshold_every_steps = (IMAGENET_STEPS * IMAGENET_BATCH) // (
        IMAGENET_REFRESHES_PER_EPOCH * batch
    )
    config.eval.batch_size = 256
    config.log.every_steps = 100
    return config
