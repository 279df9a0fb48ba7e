"""Digits, .npz files, folders and synthetic images: what they hold and what they refuse."""

import logging
import os

import numpy as np
import pytest
from sklearn.datasets import load_digits

from swat_jax import data
from swat_jax.data.sources import synthetic
from swat_jax.errors import UsageError
from tests.data.configs import (
    GREY,
    digits_config,
    encode,
    make_config,
    random_images,
    smooth_image,
    write_npz,
)


class TestDigits:
    def test_sizes_and_split(self):
        dataset = data.load(digits_config())
        info = dataset.info
        assert (info.num_train, info.num_test, info.num_holdout) == (1437, 360, 0)
        assert (info.num_classes, info.image_shape) == (10, (8, 8, 1))
        assert info.class_names == tuple("0123456789")
        images, labels = load_digits(return_X_y=True)
        parts = [dataset.arrays(split) for split in ("train", "test")]
        for label in range(10):
            count = np.sum(parts[1][1] == label)
            assert abs(count - 360 * np.mean(labels == label)) < 1
        # Together they are the whole set: pixels are sixteenths of 255.
        ours = np.concatenate([part[0] for part in parts]).reshape(-1, 64) / 255 * 16
        ours_labels = np.concatenate([part[1] for part in parts])
        ours = np.column_stack([np.round(ours), ours_labels])
        theirs = np.column_stack([images, labels])
        assert np.array_equal(ours[np.lexsort(ours.T)], theirs[np.lexsort(theirs.T)])

    def test_the_config_normalises_them(self):
        images, _ = data.load(digits_config()).arrays("train")
        assert images.max() == 255
        assert images.mean() / 255 == pytest.approx(0.305, abs=1e-3)
        assert images.std() / 255 == pytest.approx(0.376, abs=1e-3)


REFUSED_NPZ = {
    "floats": ({"train_images": np.zeros((9, 8, 8, 3))}, "train_images must be uint8"),
    "flat images": (
        {"test_images": np.zeros((3, 192), np.uint8)},
        r"test_images must be \(N, height, width\).*got \(3, 192\)",
    ),
    "channels first": (
        {"train_images": np.zeros((9, 3, 8, 8), np.uint8)},
        r"train_images must be .*got \(9, 3, 8, 8\)",
    ),
    "float labels": ({"train_labels": np.zeros(9)}, "train_labels must be integers, got float"),
    "one-hot labels": (
        {"train_labels": np.eye(9, dtype=int)},
        r"train_labels must be \(9,\) like the images, got \(9, 9\)",
    ),
    "too few labels": (
        {"test_labels": np.zeros(2, int)},
        r"test_labels must be \(3,\) like the images, got \(2,\)",
    ),
    "negative label": (
        {"train_labels": np.arange(9) - 1},
        "train_labels must count from 0, got -1 to 7",
    ),
    "labels from 1": (
        {"train_labels": np.arange(9) % 3 + 1},
        "no training image has label 0",
    ),
    "unknown test label": (
        {"test_labels": np.array([0, 1, 3])},
        "test labels go up to 3, training labels only to 2",
    ),
    "sizes differ": (
        {"test_images": np.zeros((3, 9, 9, 3), np.uint8)},
        "training images are .* and test images .* must be equal",
    ),
    "other size": (
        {
            "train_images": np.zeros((9, 9, 9, 3), np.uint8),
            "test_images": np.zeros((3, 9, 9, 3), np.uint8),
        },
        r"config\.data\.image_size: the images of set\.npz are 9x9 pixels, got 8",
    ),
    "objects": (
        {"train_labels": np.array([{}] * 9)},
        r"cannot read .*set\.npz: Object arrays",
    ),
    "no test images": (
        {"test_images": np.zeros((0, 8, 8, 3), np.uint8), "test_labels": np.zeros(0, int)},
        "set.npz has no test images",
    ),
}


class TestNpz:
    @pytest.mark.parametrize("channels", [1, 3])
    def test_arrays_come_back(self, tmp_path, channels):
        written = write_npz(tmp_path / "set.npz", channels=channels)
        config = make_config("npz", data_dir=str(tmp_path / "set.npz"))
        if channels == 1:
            config.data.update(GREY)
        dataset = data.load(config)
        for split in ("train", "test"):
            images, labels = dataset.arrays(split)
            assert np.array_equal(images, written[f"{split}_images"])
            assert np.array_equal(labels, written[f"{split}_labels"])
            assert labels.dtype == np.int32
        assert dataset.info.num_classes == 3

    def test_names_and_shapes_of_keras(self, tmp_path):
        images = random_images(9, channels=1)[..., 0]
        labels = np.arange(9, dtype=np.uint8)[:, None] % 3
        path = tmp_path / "keras.npz"
        np.savez(path, x_train=images, y_train=labels, x_test=images[:3], y_test=labels[:3])
        dataset = data.load(make_config("npz", data_dir=str(path), **GREY))
        assert np.array_equal(dataset.arrays("train")[0], images[..., None])
        assert np.array_equal(dataset.arrays("train")[1], labels[:, 0])

    @pytest.mark.parametrize(("changes", "message"), REFUSED_NPZ.values(), ids=REFUSED_NPZ)
    def test_refused(self, tmp_path, changes, message):
        arrays = {
            "train_images": random_images(9),
            "train_labels": np.arange(9) % 3,
            "test_images": random_images(3),
            "test_labels": np.arange(3),
        }
        np.savez(tmp_path / "set.npz", **(arrays | changes))
        with pytest.raises(UsageError, match=message):
            data.load(make_config("npz", data_dir=str(tmp_path / "set.npz")))

    def test_other_names(self, tmp_path):
        np.savez(tmp_path / "set.npz", images=np.zeros(3), labels=np.zeros(3))
        with pytest.raises(
            UsageError, match=r"must hold train_images, .*; it holds images, labels"
        ):
            data.load(make_config("npz", data_dir=str(tmp_path / "set.npz")))

    @pytest.mark.parametrize("kind", ["text", "empty", "npy", "cut", "folder"])
    def test_not_such_a_file(self, tmp_path, kind):
        path = tmp_path / "set.npz"
        write_npz(path)
        if kind == "folder":
            path = tmp_path
        elif kind == "npy":
            with path.open("wb") as file:
                np.save(file, np.zeros(3))  # to a path it would add .npy
        else:
            content = path.read_bytes()
            path.write_bytes({"text": b"hello", "empty": b"", "cut": content[:500]}[kind])
        with pytest.raises(UsageError, match=r"^config\.data\.data_dir: .*(read|no \.npz|a file)"):
            data.load(make_config("npz", data_dir=str(path)))


def fill_folder(root, classes, count=4, size=8):
    """PNG files of exact pixels; returns them by path."""
    written = {}
    for name in classes:
        (root / name).mkdir(parents=True)
        for number in range(count):
            image = random_images(1, size=size, seed=len(written))[0]
            path = root / name / f"{number}.png"
            path.write_bytes(encode(image, ".png"))
            written[path] = image
    return written


class TestFolder:
    def config(self, root, **changes):
        return make_config("folder", data_dir=str(root), **{"batch_size": 2} | changes)

    @pytest.mark.parametrize("test_folder", ["val", "validation", "test"])
    def test_labels_follow_the_names(self, tmp_path, test_folder):
        train = fill_folder(tmp_path / "train", ["dog", "cat", "bird"])
        test = fill_folder(tmp_path / test_folder, ["cat", "bird", "dog"], count=1)
        dataset = data.load(self.config(tmp_path))
        assert dataset.info.class_names == ("bird", "cat", "dog")
        assert (dataset.info.num_train, dataset.info.num_test) == (12, 3)
        for split, written in (("train", train), ("test", test)):
            images, labels = dataset.arrays(split)
            paths = sorted(written)
            assert [path.parent.name for path in paths] == [
                dataset.info.class_names[label] for label in labels
            ]
            assert np.array_equal(images, [written[path] for path in paths])

    def test_one_level_is_split_by_class(self, tmp_path):
        written = fill_folder(tmp_path, ["a", "b"], count=10)
        config = self.config(tmp_path)
        dataset = data.load(config)
        assert (dataset.info.num_train, dataset.info.num_test) == (16, 4)
        train, test = dataset.arrays("train"), dataset.arrays("test")
        assert np.bincount(test[1]).tolist() == [2, 2]
        together = [image.tobytes() for image in (*train[0], *test[0])]
        assert sorted(together) == sorted(image.tobytes() for image in written.values())
        config.seed = 5
        assert np.array_equal(data.load(config).arrays("test")[0], test[0])
        with config.data.unlocked():
            config.data.test_fraction = 0.5
        assert data.load(config).info.num_test == 10

    def test_nested_folders_hidden_files_and_others(self, tmp_path, caplog):
        fill_folder(tmp_path / "train", ["a", "b"])
        fill_folder(tmp_path / "val", ["a", "b"])
        nested = tmp_path / "train" / "a" / "more"
        nested.mkdir()
        os.rename(tmp_path / "train" / "a" / "0.png", nested / "0.PNG")
        (tmp_path / "train" / "a" / ".DS_Store").write_bytes(b"")
        (tmp_path / "train" / ".hidden").mkdir()
        (tmp_path / "train" / "b" / "boxes.txt").write_text("1 2 3")
        with caplog.at_level(logging.WARNING):
            dataset = data.load(self.config(tmp_path))
        assert dataset.info.num_train == 8
        assert "1 files under" in caplog.text
        assert "boxes.txt" in caplog.text

    @pytest.mark.parametrize("augmentation", ["none", "crop_flip", "random_resized_crop"])
    @pytest.mark.parametrize("workers", [0, 2])
    def test_an_unreadable_image_among_good_ones(self, tmp_path, augmentation, workers):
        fill_folder(tmp_path / "train", ["a", "b"])
        fill_folder(tmp_path / "val", ["a", "b"])
        broken = tmp_path / "train" / "b" / "2.png"
        broken.write_bytes(broken.read_bytes()[:60])
        config = self.config(tmp_path, augmentation=augmentation, workers=workers)
        dataset = data.load(config)
        with pytest.raises(UsageError, match=str(broken)):
            list(dataset.train(0))
        with pytest.raises(UsageError, match=str(broken)):
            dataset.arrays("train")

    def test_a_file_that_went_away(self, tmp_path):
        fill_folder(tmp_path, ["a", "b"])
        dataset = data.load(self.config(tmp_path))
        for path in tmp_path.glob("a/*"):
            path.unlink()
        with pytest.raises(UsageError, match=r"/a/.* cannot be read: No such file"):
            list(dataset.train(0))

    def test_grey_images(self, tmp_path):
        fill_folder(tmp_path, ["a", "b"])
        dataset = data.load(self.config(tmp_path, **GREY))
        assert dataset.arrays("train")[0].shape[-1] == 1

    def test_images_of_any_size(self, tmp_path):
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            for number in range(3):
                image = smooth_image(9 + 7 * number, 30)
                (tmp_path / name / f"{number}.jpg").write_bytes(encode(image))
        dataset = data.load(self.config(tmp_path, augmentation="random_resized_crop", image_size=7))
        assert next(dataset.train(0))["image"].shape == (2, 7, 7, 3)
        assert dataset.arrays("test")[0].shape == (1, 7, 7, 3)

    def test_an_empty_class(self, tmp_path):
        fill_folder(tmp_path, ["a", "b"])
        (tmp_path / "c").mkdir()
        with pytest.raises(UsageError, match=r"class folder .*/c holds no image"):
            data.load(self.config(tmp_path))

    def test_classes_differ(self, tmp_path):
        fill_folder(tmp_path / "train", ["a", "b", "c"])
        fill_folder(tmp_path / "val", ["a", "b"])
        with pytest.raises(UsageError, match="class 'c' is in only one of"):
            data.load(self.config(tmp_path))

    def test_no_evaluation_folder(self, tmp_path):
        fill_folder(tmp_path / "train", ["a", "b"])
        with pytest.raises(UsageError, match="has train/ but none of val/, validation/, test/"):
            data.load(self.config(tmp_path))

    def test_no_classes(self, tmp_path):
        (tmp_path / "image.png").write_bytes(encode(random_images(1)[0], ".png"))
        with pytest.raises(UsageError, match="must hold one folder of images per class"):
            data.load(self.config(tmp_path))

    def test_a_file(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(UsageError, match="source 'folder' needs a folder"):
            data.load(self.config(tmp_path / "file"))

    def test_too_large_for_arrays(self, tmp_path, monkeypatch):
        fill_folder(tmp_path, ["a", "b"])
        monkeypatch.setattr("swat_jax.data.records.MAX_ARRAY_BYTES", 100)
        with pytest.raises(UsageError, match=r"config\.data\.on_device: 6 images .* set --config"):
            data.load(self.config(tmp_path)).arrays("train")


class TestSynthetic:
    @pytest.mark.parametrize("title", [*synthetic.SIZES, "anything"])
    def test_sizes(self, title, monkeypatch):
        monkeypatch.setattr(synthetic, "MAX_SPLIT_BYTES", 1000)
        config = make_config("synthetic", augmentation="random_resized_crop")
        config.dataset = title
        info = data.load(config).info
        sizes = synthetic.SIZES.get(title, synthetic.OTHER)
        assert (info.num_classes, info.num_train, info.num_test) == sizes

    def test_images_of_a_class_are_alike(self):
        images, labels = data.load(make_config("synthetic")).arrays("train")
        assert sorted(set(labels)) == list(range(10))
        means = np.stack([images[labels == label].mean(0) for label in range(10)])
        distances = [np.abs(means - image).mean((1, 2, 3)).argmin() for image in images[:200]]
        assert np.mean(distances == labels[:200]) > 0.99
        assert len(np.unique(images, axis=0)) == len(images)

    def test_large_sets_repeat_images(self, monkeypatch):
        monkeypatch.setattr(synthetic, "MAX_SPLIT_BYTES", 1000)
        config = make_config("synthetic", batch_size=50)
        dataset = data.load(config)
        assert dataset.info.num_train == synthetic.OTHER.train
        batch = next(dataset.train(0))
        images = {batch["image"][batch["label"] == label].tobytes() for label in batch["label"]}
        assert len(images) == len(set(batch["label"]))
        for label in set(batch["label"]):
            assert len(np.unique(batch["image"][batch["label"] == label], axis=0)) == 1
        with pytest.raises(UsageError, match="synthetic images of this size are too many"):
            dataset.arrays("train")
        config.data.holdout = 0.1
        with pytest.raises(UsageError, match=r"config\.data\.holdout: must be 0 for synthetic"):
            data.load(config)
