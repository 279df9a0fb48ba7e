"""Config values that are refused, each with a message that says what to do."""

import pytest

from swat_jax import data
from swat_jax.data import settings
from swat_jax.errors import UsageError
from tests.data.configs import COLOUR, GREY, digits_config, make_config

REFUSED = {
    "unknown source": ({"source": "minst"}, "config.data.source: must be one of digits, tfds"),
    "no source": ({"source": ""}, "config.data.source: must be one of"),
    "unknown augmentation": ({"augmentation": "flip"}, "config.data.augmentation: must be one of"),
    "crop of digits": (
        {"augmentation": "random_resized_crop"},
        "config.data.augmentation: random_resized_crop is for folders and TFDS sets",
    ),
    "crop on the device": (
        {"augmentation": "random_resized_crop", "on_device": True},
        "config.data.on_device: random_resized_crop works on the host only",
    ),
    "negative workers": ({"workers": -1}, "config.data.workers: must be an integer of at least 0"),
    "image of no size": ({"image_size": 0}, "config.data.image_size: must be an integer of at"),
    "negative holdout": ({"holdout": -0.1}, "config.data.holdout: must be a fraction in [0, 1)"),
    "all held out": ({"holdout": 1.0}, "config.data.holdout: must be a fraction in [0, 1)"),
    "nan held out": ({"holdout": float("nan")}, "config.data.holdout: must be a fraction"),
    "no mean": ({"mean": ()}, "config.data.mean: must be 1 number (grey images) or 3"),
    "two means": ({"mean": (0.1, 0.2)}, "config.data.mean: must be 1 number"),
    "mean of another length": ({"mean": COLOUR["mean"]}, "config.data.std: must have as many"),
    "infinite mean": ({"mean": (float("inf"),)}, "config.data.mean: must be finite"),
    "zero std": ({"std": (0.0,)}, "config.data.std: must be positive"),
    "size of digits": ({"image_size": 16}, "config.data.image_size: the images of digits are 8x8"),
    "digits in colour": (COLOUR, "config.data.mean: the images of digits have 1 channel(s)"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(changes, message):
    config = digits_config()
    config.data.update(changes)
    with pytest.raises(UsageError) as caught:
        data.load(config)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["tfds", "folder", "npz"])
def test_sources_that_need_a_place(source, tmp_path):
    config = make_config(source, name="cifar10")
    with pytest.raises(UsageError, match=r"^config\.data\.data_dir: source .* needs it"):
        data.load(config)
    config.data.data_dir = str(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"^config\.data\.data_dir: nothing at '.*nowhere'"):
        data.load(config)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("seed", -1, r"config\.seed: must be an integer of at least 0"),
        ("batch_size", 0, r"config\.batch_size: must be an integer of at least 1"),
        ("batch_size", 63, r"config\.batch_size: must be divisible by the 2 processes"),
    ],
)
def test_refused_outside_of_data(key, value, message):
    config = digits_config()
    config[key] = value
    with pytest.raises(UsageError, match=message):
        data.load(config, process_count=2)


def test_evaluation_batch_is_shared_too():
    config = digits_config()
    config.eval.batch_size = 99
    with pytest.raises(UsageError, match=r"config\.eval\.batch_size: must be divisible by the 2"):
        data.load(config, process_count=2)


@pytest.mark.parametrize(("index", "count"), [(2, 2), (-1, 2), (0, 0)])
def test_processes_out_of_range(index, count):
    with pytest.raises(UsageError, match=r"process_(index|count): must be"):
        data.load(digits_config(), process_index=index, process_count=count)


def test_values_arrive():
    config = make_config("npz", data_dir="~/set.npz", workers=3, holdout=0.1, **GREY)
    with config.data.unlocked():
        config.data.test_fraction = 0.3
    config.eval.batch_size = 6
    read = settings.read(config, 1, 2)
    assert read.data_dir is not None
    assert read.data_dir.is_absolute()
    assert (read.workers, read.holdout, read.test_fraction) == (3, 0.1, 0.3)
    assert (read.batch_size, read.process_index, read.process_count, read.channels) == (4, 1, 2, 1)
