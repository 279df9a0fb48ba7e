"""JPEG decoding with a random resized crop, on one core: OpenCV against Pillow and simplejpeg.

    python benchmarks/data_decode.py                         # made-up photographs, 500x375
    python benchmarks/data_decode.py --images FOLDER         # the JPEG files in a folder

Prints one table: images per second of one core's time, the median of several runs, in which the
libraries take turns (a machine that is busy for a while slows all of them). Each library decodes,
cuts out the same windows and resizes them to 224x224. Pillow and simplejpeg are measured where they
are installed; they are no dependencies. simplejpeg decodes only, OpenCV resizes for it.

Images per second of one core of an AMD EPYC that had other work to do (2026-11-24, OpenCV 5.0.0,
simplejpeg 1.9.0, Pillow 13.0.0; medians of 7 and of 5 turns):

                                    100 made up, 500x375    200 of imagenette, 224x224
    OpenCV (training)                                918                          3174
    OpenCV, full size, bilinear                      923                          3214
    simplejpeg, bilinear                             969                          4021
    simplejpeg, less exact, bilinear                1060                          4030
    Pillow, bilinear (antialiased)                   506                          1159

simplejpeg is faster here: by 6 % at about the size of ImageNet's files, by 27 % at images that are
small already. Training uses OpenCV nevertheless: it resizes for either, reads every format that
folders of images hold, and decodes large photographs at a part of their size.
"""

import argparse
import importlib.util
import io
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Sequence

import cv2
import numpy as np

from swat_jax.data import decode

SIZE = 224

# From encoded image and uniform numbers for the window to (SIZE, SIZE, 3).
Method = Callable[[bytes, np.ndarray], np.ndarray]


def ours(data: bytes, uniform: np.ndarray) -> np.ndarray:
    """What training uses: bilinear, decoded at a part of the size where the window allows it."""
    return decode.random_resized_crop(data, uniform, False, SIZE, 3, "")


def full_decode(interpolation: int) -> Method:
    """OpenCV at the full size."""

    def method(data: bytes, uniform: np.ndarray) -> np.ndarray:
        image = decode.decode(data, 3, "")
        return _resize(image, uniform, interpolation)[..., ::-1]

    return method


def with_simplejpeg(*, fast: bool) -> Method:
    """`fast`: the decoder's less exact transform and upsampling; OpenCV uses the exact ones."""
    import simplejpeg  # pyright: ignore[reportMissingImports]

    def method(data: bytes, uniform: np.ndarray) -> np.ndarray:
        image = simplejpeg.decode_jpeg(data, fastdct=fast, fastupsample=fast)
        return _resize(image, uniform, cv2.INTER_LINEAR)

    return method


def with_pillow() -> Method:
    from PIL import Image  # pyright: ignore[reportMissingImports]

    def method(data: bytes, uniform: np.ndarray) -> np.ndarray:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        top, left, height, width = decode.draw_window(uniform, image.height, image.width)
        box = (left, top, left + width, top + height)
        return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=box))

    return method


def _resize(image: np.ndarray, uniform: np.ndarray, interpolation: int) -> np.ndarray:
    top, left, height, width = decode.draw_window(uniform, *image.shape[:2])
    cut = image[top : top + height, left : left + width]
    return cv2.resize(cut, (SIZE, SIZE), interpolation=interpolation)


def methods() -> dict[str, Method]:
    found: dict[str, Method] = {
        "OpenCV (training)": ours,
        "OpenCV, full size, bilinear": full_decode(cv2.INTER_LINEAR),
        "OpenCV, full size, area": full_decode(cv2.INTER_AREA),
    }
    if importlib.util.find_spec("simplejpeg"):
        found["simplejpeg, bilinear"] = with_simplejpeg(fast=False)
        found["simplejpeg, less exact, bilinear"] = with_simplejpeg(fast=True)
    if importlib.util.find_spec("PIL"):
        found["Pillow, bilinear (antialiased)"] = with_pillow()
    return found


def made_up_photographs(count: int) -> list[bytes]:
    """500x375 JPEG files of about ImageNet's bytes per pixel: blurred noise of several scales."""
    rng = np.random.default_rng(0)
    files = []
    for _ in range(count):
        image = np.zeros((375, 500, 3))
        for scale, weight in ((4, 0.5), (32, 0.3), (250, 0.2)):
            noise = rng.normal(128, 64, (scale, scale, 3))
            image += weight * cv2.resize(noise, (500, 375), interpolation=cv2.INTER_CUBIC)
        pixels = np.clip(image, 0, 255).astype(np.uint8)
        files.append(cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes())
    return files


def images_per_second(method: Method, files: Sequence[bytes]) -> float:
    draws = np.random.default_rng(0).random((len(files), decode.ATTEMPTS, decode.DRAWS))
    start = time.thread_time()
    for data, uniform in zip(files, draws, strict=True):
        method(data, uniform)
    return len(files) / (time.thread_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=pathlib.Path, help="folder of JPEG files")
    parser.add_argument("--count", type=int, default=200, help="how many images (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="runs per library (%(default)s)")
    flags = parser.parse_args()

    if flags.images:
        paths = sorted(p for p in flags.images.rglob("*") if p.suffix.lower() in (".jpeg", ".jpg"))
        chosen = paths[:: max(1, len(paths) // flags.count)][: flags.count]
        files = [path.read_bytes() for path in chosen]
    else:
        files = made_up_photographs(flags.count)
    kib = sum(map(len, files)) / len(files) / 1024
    print(f"{platform.processor() or platform.machine()}, OpenCV {cv2.__version__}, one thread")
    print(f"{len(files)} images of {kib:.0f} KiB on average, to {SIZE}x{SIZE}\n")
    print(f"{'':34}{'images/s':>9}")
    chosen_methods = methods()
    rates = {name: [] for name in chosen_methods}
    for _ in range(flags.repeats):
        for name, method in chosen_methods.items():
            rates[name].append(images_per_second(method, files))
    for name, found in rates.items():
        print(f"{name:34}{statistics.median(found):9.0f}")


if __name__ == "__main__":
    main()
