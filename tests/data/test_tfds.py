"""TFDS directories: both file formats, other sets than ours, and what is refused."""

import os
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorboardX.record_writer import RecordWriter

from swat_jax import data
from swat_jax.data import tfds_import
from swat_jax.data.tfrecord import TfRecordFiles, index_file
from swat_jax.errors import RunError, UsageError
from tests.data.configs import GREY, encode, make_config, random_images, same_batches

IMAGES = random_images(24, size=8)
LABELS = np.arange(24) % 4


def features(*, shape=(8, 8, 3)):
    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=shape, encoding_format="png"),
            "label": tfds.features.ClassLabel(names=["a", "b", "c", "d"]),
        }
    )


def write_set(root, splits, *, name="shapes", feature_dict=None, supervised=("image", "label")):
    """A TFDS directory of some other set, written by TFDS: {split: (images, labels)}."""

    def split_generators(self, _):
        return {split: self._generate_examples(*content) for split, content in splits.items()}

    def generate(self, images, labels):
        del self
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            content = image if isinstance(image, bytes) else encode(image.squeeze(), ".png")
            others = {"other": 0} if feature_dict and "other" in feature_dict else {}
            yield number, {"image": content, "label": int(label), **others}

    with tfds.core.registered.skip_registration():
        builder = type(
            "Shapes",
            (tfds.core.GeneratorBasedBuilder,),
            {
                "__module__": __name__,
                "name": name,
                "VERSION": tfds.core.Version("1.0.0"),
                "_info": lambda self: tfds.core.DatasetInfo(
                    builder=self, features=feature_dict or features(), supervised_keys=supervised
                ),
                "_split_generators": split_generators,
                "_generate_examples": generate,
            },
        )
    builder(data_dir=str(root), file_format="array_record").download_and_prepare()
    return root / name / "1.0.0"


def as_tfrecord(folder):
    """Turns a directory into the TFRecord files that TFDS writes by default."""
    builder = tfds.builder_from_directory(folder)
    info_path = folder / "dataset_info.json"
    info = info_path.read_text()
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    for split in builder.info.splits:
        source = builder.as_data_source(split, deserialize_method=raw)
        name = f"{builder.info.name}-{split}.tfrecord-00000-of-00001"
        writer = RecordWriter(str(folder / name))
        for index in range(len(source)):
            writer.write(source[index])
        writer.close()
    for path in folder.glob("*.array_record-*"):
        path.unlink()
    info_path.write_text(info.replace('"array_record"', '"tfrecord"'))


def load(root, *, name="shapes", **changes):
    return data.load(make_config("tfds", name=name, data_dir=str(root), **changes))


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    root = tmp_path_factory.mktemp("tfds")
    write_set(root, {"train": (IMAGES[:18], LABELS[:18]), "test": (IMAGES[18:], LABELS[18:])})
    return root


@pytest.fixture(scope="module")
def tfrecord(tmp_path_factory, shapes):
    root = tmp_path_factory.mktemp("tfrecord")
    shutil.copytree(shapes, root, dirs_exist_ok=True)
    as_tfrecord(root / "shapes" / "1.0.0")
    return root


def test_a_set_that_tfds_does_not_know(shapes):
    dataset = load(shapes)
    info = dataset.info
    assert (info.num_train, info.num_test, info.class_names) == (18, 6, ("a", "b", "c", "d"))
    images, labels = dataset.arrays("test")
    pairs = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
    assert pairs == {i.tobytes(): n for i, n in zip(IMAGES[18:], LABELS[18:], strict=True)}


@pytest.mark.parametrize("augmentation", ["crop_flip", "random_resized_crop"])
def test_both_formats_give_the_same_batches(shapes, tfrecord, augmentation):
    changes = {"augmentation": augmentation, "holdout": 0.2, "image_size": 8}
    first, second = load(shapes, **changes), load(tfrecord, workers=2, **changes)
    assert same_batches(list(first.train(1)), list(second.train(1)))
    for split in ("train", "holdout", "test"):
        assert same_batches(list(first.evaluate(split)), list(second.evaluate(split)))


def test_another_size_is_refused_where_images_have_one(shapes):
    with pytest.raises(UsageError, match=r"config\.data\.image_size: the images of shapes are 8x8"):
        load(shapes, image_size=16)


def test_images_of_no_fixed_size(tmp_path):
    images = [encode(random_images(1, size=n)[0], ".png") for n in range(9, 21)]
    content = (images, np.arange(12) % 4)
    write_set(tmp_path, {"train": content}, feature_dict=features(shape=(None, None, 3)))
    dataset = load(tmp_path, batch_size=2)
    # No test set: a fifth, by class.
    assert (dataset.info.num_train, dataset.info.num_test) == (10, 2)
    assert dataset.arrays("test")[0].shape == (2, 8, 8, 3)


def test_validation_where_the_test_set_has_no_labels(tmp_path):
    hidden = np.full(3, -1)
    write_set(
        tmp_path,
        {
            "train": (IMAGES[:12], LABELS[:12]),
            "validation": (IMAGES[12:20], LABELS[12:20]),
            "test": (IMAGES[20:23], hidden),
        },
    )
    assert load(tmp_path).info.num_test == 8


def test_grey_images(tmp_path):
    grey = random_images(8, channels=1)
    content = (grey, np.arange(8) % 4)
    write_set(tmp_path, {"train": content, "test": content}, feature_dict=features(shape=(8, 8, 1)))
    with pytest.raises(UsageError, match=r"config\.data\.mean: the images of shapes have 1 chan"):
        load(tmp_path)
    images, _ = load(tmp_path, **GREY).arrays("train")
    assert sorted(i.tobytes() for i in images) == sorted(i.tobytes() for i in grey)


def test_a_damaged_image_is_named(tmp_path):
    images = [encode(image, ".png") for image in IMAGES[:12]]
    images[7] = images[7][:50]
    content = (images, LABELS[:12])
    write_set(tmp_path, {"train": content, "test": content})
    with pytest.raises(UsageError, match=r"^shapes train, record \d+: cannot be decoded"):
        load(tmp_path)
    dataset = load(tmp_path, augmentation="random_resized_crop", workers=2)
    with pytest.raises(UsageError, match=r"^shapes train, record \d+: cannot be decoded"):
        list(dataset.train(0))


def test_sets_of_something_else(tmp_path):
    two = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(8, 8, 3), encoding_format="png"),
            "label": tfds.features.ClassLabel(num_classes=4),
            "other": tfds.features.ClassLabel(num_classes=4),
        }
    )
    content = (IMAGES[:4], LABELS[:4])
    write_set(tmp_path, {"train": content, "test": content}, feature_dict=two, supervised=None)
    with pytest.raises(UsageError, match=r"not a set of images .* are image, label, other"):
        load(tmp_path)


NOT_FOUND = {
    "cifar10": r"cifar10 is not prepared in .*; run python -m swat_jax\.data\.prepare cifar10 --da",
    "imagenet2012:5.1.0": r"is not prepared in .*; run python -m .*prepare imagenet2012 --data_dir",
    "mnist": r"mnist is not prepared in .*; run tfds build mnist --data_dir .* array_record",
    "cifar11": r"config\.data\.name: TFDS has no 'cifar11' and .* neither; did you mean cifar10",
    "qqqqqqqqqq": r"TFDS has no 'qqqqqqqqqq' and .* neither; check the name",
    "no such name!": r"config\.data\.name: must look like NAME, NAME/CONFIG or NAME:VERSION",
    "": r"config\.data\.name: source 'tfds' needs a TFDS name",
}


@pytest.mark.parametrize("name", NOT_FOUND)
def test_not_found(tmp_path, name):
    with pytest.raises(UsageError, match=NOT_FOUND[name]) as caught:
        load(tmp_path, name=name)
    assert "\n" not in str(caught.value)


def test_a_missing_file(shapes, tmp_path):
    shutil.copytree(shapes, tmp_path, dirs_exist_ok=True)
    next(tmp_path.rglob("*-train.array_record*")).unlink()
    with pytest.raises(
        UsageError, match=r"shapes-train\.array_record.* is missing; prepare the se"
    ):
        load(tmp_path)


def test_a_damaged_file(shapes, tmp_path):
    shutil.copytree(shapes, tmp_path, dirs_exist_ok=True)
    path = next(tmp_path.rglob("*-train.array_record*"))
    path.write_bytes(b"\0" * 100)
    with pytest.raises(UsageError, match=r"cannot read .*shapes|record 0: damaged|records"):
        load(tmp_path)


@pytest.mark.parametrize("file_format", ["riegeli", "parquet"])
def test_other_formats(shapes, tmp_path, file_format):
    shutil.copytree(shapes, tmp_path, dirs_exist_ok=True)
    info = next(tmp_path.rglob("dataset_info.json"))
    info.write_text(info.read_text().replace('"array_record"', f'"{file_format}"'))
    for path in list(tmp_path.rglob("*.array_record*")):
        os.rename(path, str(path).replace("array_record", file_format))
    with pytest.raises(UsageError, match=rf"holds {file_format} files; array_record and tfrecord"):
        load(tmp_path)


def test_no_training_split(tmp_path):
    write_set(tmp_path, {"test": (IMAGES, LABELS)})
    with pytest.raises(UsageError, match="shapes has no split 'train'; it has test"):
        load(tmp_path)


def test_a_broken_installation(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorflow_datasets", type("empty", (), {}))
    with pytest.raises(RunError, match="tensorflow-datasets lacks something"):
        tfds_import.tensorflow_datasets()


class TestTfRecord:
    @pytest.fixture
    def files(self, tmp_path):
        """Two files with 3 and 2 records of different lengths, one of them empty."""
        contents = [b"one", b"", b"three" * 100, b"four", b"five" * 9]
        paths = [tmp_path / "a", tmp_path / "b"]
        for path, part in zip(paths, (contents[:3], contents[3:]), strict=True):
            writer = RecordWriter(str(path))
            for content in part:
                writer.write(content)
            writer.close()
        return paths, contents

    def test_records_in_order(self, files):
        paths, contents = files
        found = TfRecordFiles(paths, [3, 2])
        assert len(found) == 5
        assert [found[index] for index in (4, 0, 2, 1, 3)] == [contents[i] for i in (4, 0, 2, 1, 3)]

    def test_an_empty_file(self, tmp_path):
        (tmp_path / "empty").write_bytes(b"")
        assert index_file(str(tmp_path / "empty")).shape == (0, 2)

    def test_cut_anywhere(self, files):
        path = files[0][1]
        content = path.read_bytes()
        for kept in range(1, len(content)):
            path.write_bytes(content[:kept])
            if kept == 12 + 4 + 4:  # exactly one record
                assert len(index_file(str(path))) == 1
            else:
                with pytest.raises(UsageError, match="damaged or cut short at record"):
                    index_file(str(path))

    def test_wrong_count(self, files):
        with pytest.raises(UsageError, match="b: must hold 3 records, holds 2"):
            TfRecordFiles(files[0], [3, 3])

    def test_missing(self, tmp_path):
        with pytest.raises(UsageError, match="nowhere: cannot be read: No such file"):
            TfRecordFiles([tmp_path / "nowhere"], [1])
