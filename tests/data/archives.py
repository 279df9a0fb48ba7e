"""Tiny archives in the official formats, and what they hold."""

import io
import tarfile
from pathlib import Path

import numpy as np

from tests.data.configs import encode, random_images, smooth_image

CIFAR10_NAMES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
TRAIN_SYNSETS = ("n01440764", "n01443537", "n02105855")


def add_file(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def cifar_records(images: np.ndarray, *labels: np.ndarray) -> bytes:
    """Label bytes, then the red, green and blue plane of each image."""
    planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    columns = [np.asarray(label, np.uint8)[:, None] for label in labels]
    return np.concatenate([*columns, planes], axis=1).tobytes()


def write_cifar10(path: Path, *, per_batch: int = 6, test: int = 10, **changed: bytes):
    """`cifar-10-binary.tar.gz` with few images; `changed` replaces files (dots as __)."""
    images = random_images(5 * per_batch + test, size=32)
    labels = (np.arange(len(images)) * 7) % 10
    files = {}
    for batch in range(5):
        rows = slice(batch * per_batch, (batch + 1) * per_batch)
        files[f"data_batch_{batch + 1}.bin"] = cifar_records(images[rows], labels[rows])
    files["test_batch.bin"] = cifar_records(images[-test:], labels[-test:])
    files["batches.meta.txt"] = "\n".join([*CIFAR10_NAMES, "", ""]).encode()
    files["readme.html"] = b"not needed"
    files |= {name.replace("__", "."): content for name, content in changed.items()}
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            add_file(tar, f"cifar-10-batches-bin/{name}", content)
    train = 5 * per_batch
    return (images[:train], labels[:train]), (images[train:], labels[train:])


def write_cifar100(path: Path, *, train: int = 12, test: int = 5):
    """`cifar-100-binary.tar.gz` with few images."""
    images = random_images(train + test, size=32)
    fine = (np.arange(train + test) * 37) % 100
    coarse = fine // 5
    with tarfile.open(path, "w:gz") as tar:
        records = cifar_records(images[:train], coarse[:train], fine[:train])
        add_file(tar, "cifar-100-binary/train.bin", records)
        records = cifar_records(images[train:], coarse[train:], fine[train:])
        add_file(tar, "cifar-100-binary/test.bin", records)
        for kind, count in (("coarse", 20), ("fine", 100)):
            names = "".join(f"{kind}_{number}\n" for number in range(count))
            add_file(tar, f"cifar-100-binary/{kind}_label_names.txt", names.encode())
    return images[:train], coarse[:train], fine[:train]


def cmyk_jpeg() -> bytes:
    """A JPEG of 4 components, 8x8, all coefficients 0: mid grey in every component."""
    table = bytes(1 for _ in range(64))
    # One Huffman code of one bit, 0: for DC "no difference", for AC "end of block".
    huffman = bytes([1] + [0] * 15) + b"\x00"
    components = b"".join(bytes([number, 0x11, 0]) for number in range(1, 5))
    scan = b"".join(bytes([number, 0x00]) for number in range(1, 5))

    def segment(marker: int, content: bytes) -> bytes:
        return bytes([0xFF, marker]) + (len(content) + 2).to_bytes(2, "big") + content

    return (
        b"\xff\xd8"
        + segment(0xDB, b"\x00" + table)
        + segment(0xC0, b"\x08\x00\x08\x00\x08\x04" + components)
        + segment(0xC4, b"\x00" + huffman)
        + segment(0xC4, b"\x10" + huffman)
        + segment(0xDA, b"\x04" + scan + b"\x00\x3f\x00")
        + b"\x00"  # 4 blocks, DC and AC code each: 8 bits
        + b"\xff\xd9"
    )


def write_imagenet(folder: Path, *, per_class: int = 4, val: int = 6) -> dict[str, bytes]:
    """Both tar files of ILSVRC 2012 with few images; returns the images by name."""
    images: dict[str, bytes] = {}
    with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as outer:
        for synset in TRAIN_SYNSETS:
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w") as inner:
                for number in range(per_class):
                    name = f"{synset}_{number}.JPEG"
                    image = smooth_image(40 + number, 60, seed=len(images))
                    images[name] = encode(image)
                    if synset == TRAIN_SYNSETS[2] and number == 0:
                        images[name] = encode(image, ".png")  # as one of ImageNet's is
                    if synset == TRAIN_SYNSETS[1] and number == 0:
                        images[name] = cmyk_jpeg()
                    add_file(inner, name, images[name])
            add_file(outer, f"{synset}.tar", buffer.getvalue())
    with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w") as outer:
        for number in reversed(range(1, val + 1)):  # not in the order of the names
            name = f"ILSVRC2012_val_{number:08d}.JPEG"
            images[name] = encode(smooth_image(50, 50 + number, seed=1000 + number))
            add_file(outer, name, images[name])
    return images
