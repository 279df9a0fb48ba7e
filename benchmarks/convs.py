"""The convs of the six networks, at the batch that the table of training steps has."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from swat_jax.convolution import Convolution
from swat_jax.layer_table import network_table

# Images of a step, and what they are: those of docs/performance.md.
NETWORKS: dict[str, tuple[int, int, int]] = {
    "imagenet_resnet50": (256, 224, 1000),
    "imagenet_wrn50_2": (256, 224, 1000),
    "wrn16_8": (512, 32, 10),
    "resnet18": (512, 32, 10),
    "densenet121": (512, 32, 10),
    "vgg16": (512, 32, 10),
}


@dataclasses.dataclass(frozen=True)
class Problem:
    """The conv of a layer, and how often the network has it."""

    network: str
    batch: int
    window: tuple[int, int]
    channels: tuple[int, int]
    size: tuple[int, int]  # of the input
    result: tuple[int, int]
    stride: int
    layers: int = 1

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Problem:
        """What a row of a file, or a line of another process, is about."""
        found = {field.name: row[field.name] for field in dataclasses.fields(cls)}
        values: Any = (tuple(one) if isinstance(one, list) else one for one in found.values())
        return cls(*values)

    @property
    def name(self) -> str:
        height, width = self.window
        inputs, outputs = self.channels
        step = f"/{self.stride}" if self.stride > 1 else ""
        return f"{height}x{width}{step} {inputs}->{outputs} @{self.size[0]}"

    @property
    def conv(self) -> Convolution:
        padding = tuple((extent // 2, extent // 2) for extent in self.window)
        return Convolution((self.stride,) * 2, padding, (1, 1), (1, 1))

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Those of input, kernel and output."""
        inputs, outputs = self.channels
        return (
            (self.batch, *self.size, inputs),
            (*self.window, inputs, outputs),
            (self.batch, *self.result, outputs),
        )

    @property
    def operations(self) -> int:
        return 2 * self.batch * math.prod(self.window + self.channels + self.result)

    @property
    def is_mark(self) -> bool:
        """Whether it has to be 1.3 times as fast as from dense operands."""
        narrow, wide = sorted(self.channels)
        where = (narrow, self.size[0]) in ((64, 56), (128, 28))
        return where and wide == 4 * narrow and self.window == (1, 1)


def problems(networks: Sequence[str], every: bool, batch: int | None = None) -> list[Problem]:
    """The distinct convs of networks, the most important first.

    Args:
      networks: names from `NETWORKS`.
      every: all windows, or 1x1 only.
      batch: of images; None: that of `NETWORKS`.
    """
    counts: dict[Problem, int] = {}
    for network in networks:
        images, size, classes = NETWORKS[network]
        for layer in network_table(network, num_classes=classes, image_shape=(size, size, 3)):
            if layer.kind != "conv":
                continue
            height, width, inputs, outputs = layer.kernel_shape
            # Padded by half the window: the stride is what makes the size of the result.
            stride = -(-layer.input_hw[0] // layer.output_hw[0])
            problem = Problem(
                network, batch or images, (height, width), (inputs, outputs),
                (layer.input_hw[0], layer.input_hw[1]), (layer.output_hw[0], layer.output_hw[1]),
                stride,
            )  # fmt: skip
            if every or problem.window == (1, 1):
                counts[problem] = counts.get(problem, 0) + 1
    found = [dataclasses.replace(one, layers=layers) for one, layers in counts.items()]
    return sorted(found, key=lambda one: (not one.is_mark, math.prod(one.window)))


def lines_of_cuts(row: Mapping[str, Any]) -> Iterator[str]:
    """A line with the times of all cuts of a kernel, the fastest first, where there are several."""
    if len(row["cuts_ms"]) > 1:
        best = sorted(row["cuts_ms"].items(), key=lambda one: one[1])
        yield "    " + "  ".join(f"{name} {ms:.4f}" for name, ms in best)
