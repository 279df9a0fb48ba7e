"""From official archives to TFDS directories that stock TFDS and our own reader agree on."""

import dataclasses
import hashlib
import http.server
import importlib.util
import json
import subprocess
import sys
import threading

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core import hashing

from swat_jax import data
from swat_jax.data.prepare import __main__ as program
from swat_jax.data.prepare import cifar, directory, download, imagenet
from swat_jax.errors import RunError, UsageError
from tests.data import archives
from tests.data.configs import encode, make_config, random_images, smooth_image


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory):
    """The directory, and (images, labels) of train and test in the order of the archive."""
    root = tmp_path_factory.mktemp("cifar10")
    train, test = archives.write_cifar10(root / "cifar-10-binary.tar.gz")
    program.run("cifar10", root, [root / "cifar-10-binary.tar.gz"], verify=False)
    return root, train, test


@pytest.fixture(scope="module")
def imagenet2012(tmp_path_factory):
    """The directory, and the encoded images by name."""
    root = tmp_path_factory.mktemp("imagenet")
    images = archives.write_imagenet(root)
    program.run("imagenet2012", root, [root], verify=False)
    return root, images


def stock(name, root, split):
    """All examples, read by TFDS's own code for the data set."""
    source = tfds.data_source(name, data_dir=root, download=False, split=split)
    return [source[index] for index in range(len(source))]


class TestCifar:
    def test_stock_tfds_reads_it(self, cifar10):
        root, *splits = cifar10
        for split, (images, labels) in zip(("train", "test"), splits, strict=True):
            examples = stock("cifar10", root, split)
            assert len(examples) == len(images)
            for example in examples:
                prefix, _, number = example["id"].decode().partition("_")
                assert prefix == split
                assert np.array_equal(example["image"], images[int(number)])
                assert example["label"] == labels[int(number)]
        names = tfds.builder("cifar10", data_dir=root).info.features["label"].names
        assert tuple(names) == archives.CIFAR10_NAMES

    def test_the_order_is_that_of_the_stock_builder(self, cifar10):
        root, (images, _), _ = cifar10
        hasher = hashing.Hasher("train")
        expected = sorted(range(len(images)), key=hasher.hash_key)
        found = [int(example["id"].decode()[6:]) for example in stock("cifar10", root, "train")]
        assert found == expected
        assert found != sorted(found)

    def test_metadata_are_the_stock_ones(self, cifar10):
        info = json.loads((cifar10[0] / "cifar10/3.0.2/dataset_info.json").read_text())
        assert info["fileFormat"] == "array_record"
        assert info["moduleName"] == "tensorflow_datasets.image_classification.cifar"
        assert [split["shardLengths"] for split in info["splits"]] == [["30"], ["10"]]
        # The prepared class must not take the stock one's place.
        assert tfds.builder_cls("cifar10").__mro__[1] is tfds.core.GeneratorBasedBuilder

    def test_we_read_it(self, cifar10):
        root, *splits = cifar10
        config = make_config("tfds", name="cifar10", data_dir=str(root), image_size=32)
        dataset = data.load(config)
        assert dataset.info.class_names == archives.CIFAR10_NAMES
        for split, (images, labels) in zip(("train", "test"), splits, strict=True):
            found = dataset.arrays(split)
            pairs = {image.tobytes(): label for image, label in zip(*found, strict=True)}
            assert pairs == {i.tobytes(): label for i, label in zip(images, labels, strict=True)}

    def test_cifar100(self, tmp_path):
        images, coarse, fine = archives.write_cifar100(tmp_path / "archive")
        program.run("cifar100", tmp_path, [tmp_path / "archive"], verify=False)
        for example in stock("cifar100", tmp_path, "train"):
            number = int(example["id"].decode().split("_")[1])
            assert np.array_equal(example["image"], images[number])
            assert (example["coarse_label"], example["label"]) == (coarse[number], fine[number])
        config = make_config("tfds", name="cifar100", data_dir=str(tmp_path), image_size=32)
        dataset = data.load(config)
        assert dataset.info.num_classes == 100
        assert dataset.info.class_names[7] == "fine_7"
        assert sorted(dataset.arrays("train")[1]) == sorted(fine)

    REFUSED = (
        ({"data_batch_3__bin": b"123"}, r"data_batch_3\.bin must be records of 3073 bytes, has 3"),
        ({"test_batch__bin": b""}, r"test_batch\.bin must be records of 3073 bytes, has 0"),
        (
            {"data_batch_1__bin": bytes([10] * 3073)},
            r"data_batch_1\.bin: label must be 0 to 9, got 10",
        ),
        ({"batches__meta__txt": b"cat\ndog\n"}, r"batches\.meta\.txt must hold 10 names, holds 2"),
    )

    @pytest.mark.parametrize(("changed", "message"), REFUSED)
    def test_broken_contents(self, tmp_path, changed, message):
        archives.write_cifar10(tmp_path / "archive", **changed)
        with pytest.raises(UsageError, match=message):
            program.run("cifar10", tmp_path, [tmp_path / "archive"], verify=False)
        assert not (tmp_path / "cifar10/3.0.2").exists()

    def test_an_archive_of_something_else(self, tmp_path):
        archives.write_cifar100(tmp_path / "archive")
        with pytest.raises(UsageError, match=r"lacks batches\.meta\.txt, data_batch_1\.bin"):
            program.run("cifar10", tmp_path, [tmp_path / "archive"], verify=False)

    @pytest.mark.parametrize("kept", [0, 10, 3000])
    def test_an_archive_that_is_cut(self, tmp_path, kept):
        path = tmp_path / "archive"
        archives.write_cifar10(path)
        path.write_bytes(path.read_bytes()[:kept])
        with pytest.raises(UsageError, match=r"--archive: (cannot read|.* lacks)"):
            program.run("cifar10", tmp_path, [path], verify=False)

    def test_too_few_images(self, tmp_path):
        archives.write_cifar10(tmp_path / "archive")
        with pytest.raises(UsageError, match="train must hold 50000 images, holds 30; --no-verify"):
            cifar.prepare("cifar10", tmp_path, tmp_path / "archive", complete=True)

    def test_no_space(self, tmp_path, monkeypatch):
        archives.write_cifar10(tmp_path / "archive")
        usage = type("usage", (), {"free": 1000})
        monkeypatch.setattr(directory.shutil, "disk_usage", lambda _: usage)
        with pytest.raises(UsageError, match=r"--data_dir: .* has 0 MiB free"):
            program.run("cifar10", tmp_path, [tmp_path / "archive"], verify=False)

    def test_a_disk_that_fails(self, tmp_path):
        archives.write_cifar10(tmp_path / "archive")
        (tmp_path / "file").write_text("")
        with pytest.raises(RunError, match=r"cannot write to .*file"):
            program.run("cifar10", tmp_path / "file", [tmp_path / "archive"], verify=False)


class TestImagenet:
    def test_stock_tfds_reads_it(self, imagenet2012):
        root, images = imagenet2012
        names = tfds.builder("imagenet2012", data_dir=root).info.features["label"].names
        assert len(names) == 1000
        train = stock("imagenet2012", root, "train")
        assert len(train) == 12
        for example in train:
            name = example["file_name"].decode()
            assert names[example["label"]] == name.split("_")[0]
            assert (
                example["image"].shape
                == cv2.imdecode(np.frombuffer(images[name], np.uint8), cv2.IMREAD_COLOR).shape
            )
        assert len({bytes(example["file_name"]) for example in train}) == 12

    def test_validation_labels_follow_the_number_in_the_name(self, imagenet2012):
        root, _ = imagenet2012
        builder = tfds.builder("imagenet2012", data_dir=root)
        names = builder.info.features["label"].names
        labels = (
            tfds.core.tfds_path("datasets/imagenet2012") / "validation_labels.txt"
        ).read_text()
        labels = labels.split()
        examples = stock("imagenet2012", root, "validation")
        assert len(examples) == 6
        for example in examples:
            number = int(example["file_name"].decode()[15:23])
            assert names[example["label"]] == labels[number - 1]

    def test_rgb_jpegs_are_stored_as_they_are(self, imagenet2012):
        root, images = imagenet2012
        source = tfds.builder("imagenet2012", data_dir=root).as_data_source(
            "train", decoders={"image": tfds.decode.SkipDecoding()}
        )
        changed = set()
        for index in range(len(source)):
            name = source[index]["file_name"].decode()
            stored = source[index]["image"]
            assert stored[:2] == b"\xff\xd8"
            if stored != images[name]:
                changed.add(name)
                pixels = [
                    cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR).astype(int)
                    for content in (stored, images[name])
                ]
                assert np.abs(pixels[0] - pixels[1]).max() <= 6
        # The CMYK image and the PNG file.
        assert changed == {"n01443537_0.JPEG", "n02105855_0.JPEG"}

    def test_we_read_it(self, imagenet2012):
        root, _ = imagenet2012
        config = make_config(
            "tfds",
            name="imagenet2012",
            data_dir=str(root),
            image_size=24,
            augmentation="random_resized_crop",
            workers=2,
        )
        dataset = data.load(config)
        assert (dataset.info.num_train, dataset.info.num_test) == (12, 6)
        assert dataset.info.num_classes == 1000
        batch = next(dataset.train(0))
        assert batch["image"].shape == (4, 24, 24, 3)
        labels = np.concatenate([batch["label"] for batch in dataset.evaluate("train")])
        assert np.bincount(labels[labels >= 0]).tolist() == [4, 4] + [0] * (labels.max() - 2) + [4]
        config.data.holdout = 0.25
        held_out = data.load(config).arrays("holdout")[1]
        assert sorted(held_out) == sorted(set(labels) - {data.PADDING_LABEL})  # one of each class

    def test_a_missing_archive(self, tmp_path):
        archives.write_imagenet(tmp_path)
        (tmp_path / imagenet.VALIDATION_ARCHIVE).unlink()
        with pytest.raises(UsageError, match=r"ILSVRC2012_img_val\.tar is not there; register"):
            program.run("imagenet2012", tmp_path, [tmp_path], verify=False)

    def test_two_files(self, tmp_path):
        archives.write_imagenet(tmp_path)
        paths = [tmp_path / imagenet.VALIDATION_ARCHIVE, tmp_path / imagenet.TRAIN_ARCHIVE]
        assert imagenet.find_archives(paths) == (paths[1], paths[0])

    def test_too_few_images(self, tmp_path):
        archives.write_imagenet(tmp_path)
        with pytest.raises(UsageError, match="train must hold 1281167 images, holds 12"):
            program.run("imagenet2012", tmp_path, [tmp_path])

    def test_a_cut_archive_writes_nothing(self, tmp_path):
        archives.write_imagenet(tmp_path)
        path = tmp_path / imagenet.TRAIN_ARCHIVE
        path.write_bytes(path.read_bytes()[:14_000])
        with pytest.raises(UsageError, match=r"^--archive: .*(cut short|cannot read)"):
            program.run("imagenet2012", tmp_path, [tmp_path], verify=False)
        assert not (tmp_path / "imagenet2012/5.1.0").exists()

    def test_images_are_checked(self):
        assert imagenet.as_rgb_jpeg(encode(smooth_image(9, 9)), "x") == encode(smooth_image(9, 9))
        with pytest.raises(UsageError, match=r"n0_1\.JPEG: cannot be decoded"):
            imagenet.as_rgb_jpeg(b"what is this", "n0_1.JPEG")


class TestDownload:
    @pytest.fixture
    def server(self, tmp_path):
        """Serves a folder on this machine."""
        folder = tmp_path / "served"
        folder.mkdir()

        class Quiet(http.server.SimpleHTTPRequestHandler):
            def __init__(self, *args):
                super().__init__(*args, directory=str(folder))

            def log_message(self, format, *args):  # noqa: A002 (the name of the base class)
                del format, args

        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as opened:
            thread = threading.Thread(target=opened.serve_forever)
            thread.start()
            yield folder, f"http://127.0.0.1:{opened.server_address[1]}"
            opened.shutdown()
            thread.join()

    def test_fetch(self, server, tmp_path):
        folder, url = server
        content = b"archive" * 1000
        (folder / "a.tar.gz").write_bytes(content)
        sha256 = hashlib.sha256(content).hexdigest()
        archive = download.Archive(f"{url}/a.tar.gz", sha256, len(content))
        path = download.fetch(archive, tmp_path / "downloads")
        assert path.read_bytes() == content
        (folder / "a.tar.gz").unlink()
        assert download.fetch(archive, tmp_path / "downloads") == path  # kept

        wrong = dataclasses.replace(archive, sha256="0" * 64)
        with pytest.raises(RunError, match=r"sha256 of .* is .* the file was removed"):
            download.fetch(wrong, tmp_path / "downloads")
        assert not path.exists()
        with pytest.raises(RunError, match=r"cannot download .*[Nn]ot found; .* --archive PATH"):
            download.fetch(archive, tmp_path / "downloads")
        assert list((tmp_path / "downloads").iterdir()) == []

    def test_verify(self, tmp_path):
        path = tmp_path / "file"
        path.write_bytes(b"12345")
        official = download.Archive("http://x/y.tar.gz", hashlib.sha256(b"12345").hexdigest(), 5)
        download.verify(path, official)
        path.write_bytes(b"12354")
        with pytest.raises(UsageError, match=r"--archive: sha256 of .* is .*, of y\.tar\.gz"):
            download.verify(path, official)
        path.write_bytes(b"123")
        with pytest.raises(UsageError, match=r"has 3 bytes, y\.tar\.gz has 5: the download may"):
            download.verify(path, official)

    def test_checksums_are_those_that_tfds_records(self):
        for name, layout in cifar.LAYOUTS.items():
            recorded = tfds.core.tfds_path(f"url_checksums/{name}.txt").read_text().split("\t")
            archive = layout.archive
            assert recorded[:3] == [archive.url, str(archive.num_bytes), archive.sha256]


class TestCommandLine:
    def test_wrong_archive(self, tmp_path, capsys):
        archives.write_cifar10(tmp_path / "archive")
        arguments = ["cifar10", "--data_dir", str(tmp_path), "--archive", str(tmp_path / "archive")]
        assert program.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: --archive: ")
        assert error.count("\n") == 1
        assert program.main([*arguments, "--no-verify"]) == 0
        assert f"--config.data.data_dir={tmp_path}" in capsys.readouterr().out
        assert program.main([*arguments, "--json"]) == 0  # there already
        output, errors = capsys.readouterr()
        assert json.loads(output) == {
            "path": str(directory.existing("cifar10", tmp_path)),
            "data_dir": str(tmp_path),
        }
        assert "is there already" in errors

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["cifar10", "--archive", "nowhere"], "error: --archive: nothing at 'nowhere'"),
            (
                ["cifar10", "--archive", ".", "--archive", "."],
                "error: --archive: cifar10 takes one",
            ),
            (["imagenet2012"], "error: --archive: ILSVRC2012_img_train.tar is not there"),
        ],
    )
    def test_wrong_use(self, tmp_path, capsys, arguments, message):
        assert program.main([*arguments, "--data_dir", str(tmp_path)]) == 2
        assert message in capsys.readouterr().err

    def test_unknown_set(self, capsys):
        assert program.main(["mnist"]) == 2
        assert "cifar10" in capsys.readouterr().err

    @pytest.mark.skipif(
        importlib.util.find_spec("tensorflow") is not None, reason="TensorFlow is installed"
    )
    def test_without_tensorflow(self, cifar10):
        """Where TensorFlow is not installed, nothing asks for it."""
        script = (
            "import importlib.util\n"
            "assert importlib.util.find_spec('tensorflow') is None\n"
            "from swat_jax import data\n"
            "from tests.data.configs import make_config\n"
            f"config = make_config('tfds', name='cifar10', data_dir={str(cifar10[0])!r}, "
            "image_size=32)\n"
            "print(next(data.load(config).train(0))['image'].shape)\n"
        )
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", script],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == "(4, 32, 32, 3)\n"


def test_images_of_random_pixels_survive_png(tmp_path):
    """The PNG detour is lossless and keeps red first."""
    image = random_images(1, size=32)
    records = np.frombuffer(archives.cifar_records(image, np.array([3])), np.uint8)[None]
    example = cifar.CifarSplit("train", records, ("label",)).example(0)
    decoded = cv2.imdecode(np.frombuffer(example["image"], np.uint8), cv2.IMREAD_COLOR)
    assert np.array_equal(decoded[..., ::-1], image[0])
    assert (example["label"], example["id"]) == (3, "train_00000")
