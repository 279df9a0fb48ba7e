"""JPEG decoding with a random resized crop, on one core: OpenCV against Pillow and simplejpeg.

    python benchmarks/data_decode.py                         # made-up photographs, 500x375
    python benchmarks/data_decode.py --images FOLDER         # the JPEG files in a folder

Prints one table: images per second of one core's time, the best of several runs (other work on the
machine only adds to the time). Each library decodes, cuts out the same windows and resizes them to
224x224. Pillow and simplejpeg are measured where they are installed; they are no dependencies.
simplejpeg decodes only, OpenCV resizes for it.
"""

import argparse
import importlib.util
import io
import pathlib
import platform
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


def images_per_second(method: Method, files: Sequence[bytes], repeats: int) -> float:
    draws = np.random.default_rng(0).random((len(files), decode.ATTEMPTS, decode.DRAWS))
    rates = []
    for _ in range(repeats):
        start = time.thread_time()
        for data, uniform in zip(files, draws, strict=True):
            method(data, uniform)
        rates.append(len(files) / (time.thread_time() - start))
    return max(rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=pathlib.Path, help="folder of JPEG files")
    parser.add_argument("--count", type=int, default=200, help="how many images (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="runs per library (%(default)s)")
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
    for name, method in methods().items():
        print(f"{name:34}{images_per_second(method, files, flags.repeats):9.0f}")


if __name__ == "__main__":
    main()
