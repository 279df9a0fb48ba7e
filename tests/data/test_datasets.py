"""What every source promises, asked of each: order, resuming, workers, processes, evaluation."""

import numpy as np
import pytest

from swat_jax import data
from swat_jax.data import order
from swat_jax.errors import UsageError
from tests.data import configs
from tests.data.configs import encode, make_config, same_batches, smooth_image

TRAIN, TEST = 21, 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`train` and `val` with 3 classes of images in several sizes and formats."""
    root = tmp_path_factory.mktemp("folder")
    for split, count in (("train", TRAIN), ("val", TEST)):
        for number in range(count):
            place = root / split / f"class_{number % 3}"
            place.mkdir(parents=True, exist_ok=True)
            suffix = (".jpg", ".png", ".JPEG")[number % 3]
            image = smooth_image(20 + number, 30, seed=number + len(split) * 1000)
            (place / f"{number}{suffix}").write_bytes(encode(image, suffix.lower()))
    return root


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    path = tmp_path_factory.mktemp("npz") / "set.npz"
    configs.write_npz(path, train=TRAIN, test=TEST)
    return path


@pytest.fixture(params=["npz", "folder", "folder_crop", "synthetic"])
def config(request, npz, folder):
    """Small sets of 3 (10) classes; batches of 4."""
    if request.param == "npz":
        return make_config("npz", data_dir=str(npz), augmentation="crop_flip")
    if request.param == "folder":
        return make_config("folder", data_dir=str(folder), augmentation="random_resized_crop")
    if request.param == "folder_crop":
        return make_config("folder", data_dir=str(folder), augmentation="crop_flip")
    made = make_config("synthetic", batch_size=256, eval_batch_size=300, augmentation="shift")
    made.dataset = "digits"
    return made


def batches(config, epoch=0, start_step=0, **processes):
    return list(data.load(config, **processes).train(epoch, start_step))


def test_batches_are_full_uint8_and_as_many_as_fit(config):
    dataset = data.load(config)
    made = list(dataset.train(0))
    assert len(made) == dataset.info.num_train // config.batch_size
    for batch in made:
        assert batch["image"].shape == (config.batch_size, *dataset.info.image_shape)
        assert batch["label"].shape == (config.batch_size,)
        assert batch["image"].dtype == np.uint8
        assert batch["label"].dtype == np.int32


@pytest.mark.parametrize("workers", [0, 3])
def test_resuming_at_any_step_equals_going_on(config, workers):
    config.data.workers = 0
    whole = batches(config, epoch=2)
    config.data.workers = workers
    for step in range(len(whole) + 1):
        assert same_batches(batches(config, 2, step), whole[step:])


def test_epochs_and_seeds_differ(config):
    first = batches(config, 0)
    assert same_batches(first, batches(config, 0))
    assert not same_batches(first, batches(config, 1))
    config.seed = 1
    assert not same_batches(first, batches(config, 0))


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_batches_of_one(config, count):
    config.eval.batch_size = 4
    whole = batches(config, 1)
    parts = [batches(config, 1, process_index=i, process_count=count) for i in range(count)]
    for step, batch in enumerate(whole):
        for key in batch:
            joined = np.concatenate([part[step][key] for part in parts])
            assert np.array_equal(joined, batch[key])


def test_an_epoch_visits_every_image_once(config):
    config.data.augmentation = "none"
    config.data.workers = 2
    dataset = data.load(config)
    images, labels = dataset.arrays("train")
    made = list(dataset.train(3))
    seen = np.concatenate([batch["image"] for batch in made])
    wanted = order.epoch_order(config.seed, 3, len(labels))[: len(seen)]
    assert np.array_equal(seen, images[wanted])
    assert np.array_equal(np.concatenate([batch["label"] for batch in made]), labels[wanted])


@pytest.mark.parametrize("split", ["train", "test", "holdout"])
@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_is_everything_in_order_with_padding_at_the_end(config, split, workers):
    config.data.holdout = 0.3
    config.data.workers = workers
    dataset = data.load(config)
    images, labels = dataset.arrays(split)
    made = list(dataset.evaluate(split))
    assert len(made) == -(-len(labels) // config.eval.batch_size)
    assert all(len(batch["label"]) == config.eval.batch_size for batch in made)
    joined_labels = np.concatenate([batch["label"] for batch in made])
    joined = np.concatenate([batch["image"] for batch in made])
    assert np.array_equal(joined_labels[: len(labels)], labels)
    assert np.array_equal(joined[: len(labels)], images)
    assert np.all(joined_labels[len(labels) :] == data.PADDING_LABEL)
    assert not joined[len(labels) :].any()


def test_processes_share_an_evaluation(config):
    config.eval.batch_size = 6  # 7 test images: the second process gets nothing of the last batch
    whole = list(data.load(config).evaluate("test"))
    parts = [
        list(data.load(config, process_index=i, process_count=2).evaluate("test")) for i in (0, 1)
    ]
    assert len(parts[0]) == len(parts[1]) == len(whole)
    for step, batch in enumerate(whole):
        for key in batch:
            joined = np.concatenate([part[step][key] for part in parts])
            assert np.array_equal(joined, batch[key])


def test_holdout_divides_the_training_set_by_class(config):
    all_images, all_labels = data.load(config).arrays("train")
    config.data.holdout = 1 / 3
    config.batch_size = 2
    dataset = data.load(config)
    info = dataset.info
    kept, held = dataset.arrays("train"), dataset.arrays("holdout")
    assert (info.num_train, info.num_holdout) == (len(kept[1]), len(held[1]))
    assert info.num_holdout == round(len(all_labels) / 3)

    def counted(images, labels):
        pairs = zip(images, labels, strict=True)
        return sorted(image.tobytes() + bytes([label]) for image, label in pairs)

    assert sorted(counted(*kept) + counted(*held)) == counted(all_images, all_labels)
    for label in np.unique(all_labels):
        assert abs(np.sum(held[1] == label) - np.sum(all_labels == label) / 3) < 1
    config.seed = 9
    assert np.array_equal(data.load(config).arrays("holdout")[0], held[0])


def test_nothing_held_out_is_an_error(config):
    dataset = data.load(config)
    for ask in (dataset.evaluate, dataset.arrays):
        with pytest.raises(UsageError, match=r"^config\.data\.holdout: nothing is held out"):
            ask("holdout")


def test_unknown_split_is_an_error(config):
    with pytest.raises(UsageError, match="split: must be one of train, holdout, test"):
        data.load(config).arrays("validation")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("step", [-1, 1000])
def test_start_step_out_of_range(config, step):
    with pytest.raises(UsageError, match="start_step: must be 0 to"):
        data.load(config).train(0, step)


def test_batch_larger_than_the_set(config):
    config.batch_size = 100_000
    with pytest.raises(UsageError, match=r"config\.batch_size: must be at most the \d+ training"):
        data.load(config)


def test_holdout_that_leaves_too_little(config):
    dataset = data.load(config)
    config.data.holdout = 1 - (config.batch_size - 1) / dataset.info.num_train
    with pytest.raises(UsageError, match=rf"at most the {config.batch_size - 1} training images"):
        data.load(config)


def test_iterators_can_be_left(config):
    config.data.workers = 2
    iterator = data.load(config).train(0)
    next(iterator)
    iterator.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert next(iterator, None) is None
