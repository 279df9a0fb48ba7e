"""Reads what was measured, and writes it as lines of a page."""

import json
import pathlib
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "docs/results"
NAMES = {
    "imagenet_resnet50": "ResNet-50",
    "imagenet_wrn50_2": "WRN-50-2",
    "cifar10_wrn16_8": "WRN-16-8",
    "cifar10_resnet18": "ResNet-18",
    "cifar10_vgg16": "VGG-16",
    "cifar10_densenet121": "DenseNet-121",
}


def short_name(device: str) -> str:
    """H100 of NVIDIA H100 80GB HBM3."""
    return device.removeprefix("NVIDIA ").split()[0]


def read(name: str) -> Any:
    """A file of docs/results, by its name without the ending."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def line_of(*cells: Any) -> str:
    """A line of a table."""
    return f"| {' | '.join(map(str, cells))} |"


def mark_of(mark: float, met: bool, device: str) -> str:
    """A mark and whether it is met: marks are set for one GPU."""
    return f"{mark:g}: {verdict(met) if 'H200' in device else 'not measured'}"


def verdict(met: bool) -> str:
    return "met" if met else "missed"
