"""The one-word name of a training method, such as `u90`, and what it means.

Every config takes it as its argument: `--config configs/cifar10_resnet18.py:channel70`.
"""

import dataclasses
import decimal
import re
from typing import Any, Literal

from ml_collections import ConfigDict

from swat_jax.errors import UsageError, did_you_mean

Distribution = Literal["dense", "uniform", "erk", "momentum"]
Granularity = Literal["unstructured", "channel", "filter", "vector8", "vector16", "vector32"]

_KINDS: dict[str, tuple[Distribution, Granularity]] = {
    "u": ("uniform", "unstructured"),
    "erk": ("erk", "unstructured"),
    "m": ("momentum", "unstructured"),
    "channel": ("uniform", "channel"),
    "filter": ("uniform", "filter"),
    # What ends with a number is kept apart from the percentage.
    "vector8-": ("uniform", "vector8"),
    "vector16-": ("uniform", "vector16"),
    "vector32-": ("uniform", "vector32"),
}
_PERCENTAGES = (50, 60, 70, 80, 90, 95)  # of the paper's tables
_ALLOWED = (
    f"'dense', or one of {', '.join(_KINDS)} followed by the percentage of zeros,"
    " at least 0 and below 100 (u90, erk95, m97.5, channel70, vector16-80)"
)
_PATTERN = re.compile(rf"({'|'.join(_KINDS)})([0-9]{{1,3}}(?:\.[0-9]{{1,6}})?)", re.ASCII)


@dataclasses.dataclass(frozen=True)
class Method:
    """A training method.

    Attributes:
      distribution: how sparsity spreads over layers: "dense" (ordinary training), "uniform"
        (SWAT-U), "erk" (SWAT-ERK) or "momentum" (SWAT-M).
      granularity: what is pruned as a unit: "unstructured" (single weights), "channel" (kernel
        slices, the paper's structured SWAT), "filter" (output channels), or "vector8", "vector16"
        and "vector32" (so many output channels of one tap and input channel).
      sparsity: fraction of zeros, in [0, 1), for weights and for saved activations. It is the float
        that prints as the decimal that was asked for, so keep counts come out exact.
    """

    distribution: Distribution
    granularity: Granularity
    sparsity: float


def parse(text: str) -> Method:
    """Reads a method's name.

    Args:
      text: `dense`, or `u`, `erk`, `m`, `channel`, `filter`, `vector8-`, `vector16-`, `vector32-`
        followed by a percentage.

    Raises:
      UsageError: the text is none of these.

    Example:
      >>> parse("erk97.5")
      Method(distribution='erk', granularity='unstructured', sparsity=0.975)
    """
    if text == "dense":
        return Method("dense", "unstructured", 0.0)
    match = _PATTERN.fullmatch(text)
    percent = decimal.Decimal(match[2]) if match else None
    if match is None or percent is None or percent >= 100:
        common = ("dense", *(f"{kind}{percent}" for kind in _KINDS for percent in _PERCENTAGES))
        raise UsageError(f"method: got {text!r}, allowed: {_ALLOWED}{did_you_mean(text, common)}")
    distribution, granularity = _KINDS[match[1]]
    return Method(distribution, granularity, float(percent / 100))


def apply(config: ConfigDict, text: str) -> ConfigDict:
    """Fills `config.sparsity` for the method called `text`; other keys stay as they are.

    `weight` and `activation` get the same sparsity. The first conv stays dense for the uniform
    methods (structured ones too), as in the paper; `erk` and `momentum` decide about it themselves.

    Args:
      config: a config whose `sparsity` section exists; changed in place.
      text: see `parse`.

    Returns:
      `config`, so that a `get_config` can end in this call.

    Raises:
      UsageError: `text` names no method.
    """
    method = parse(text)
    config.sparsity.method = text
    config.sparsity.distribution = method.distribution
    config.sparsity.granularity = method.granularity
    config.sparsity.weight = method.sparsity
    config.sparsity.activation = method.sparsity
    config.sparsity.first_layer_dense = method.distribution in ("dense", "uniform")
    return config


def label(sparsity: Any) -> str:
    """What a run under `config.sparsity` is called where its results are shown.

    It comes from the values alone, since a flag may have changed any of them after the method was
    named: `config.sparsity.method` says what the run started from.

    Args:
      sparsity: the section, with the keys that `apply` fills.

    Returns:
      The method's name where the values are those of a method, else a name that says all of them.

    Example:
      >>> from swat_jax import recipe
      >>> config = apply(recipe.digits(), "u90")
      >>> label(config.sparsity)
      'u90'
      >>> config.sparsity.weight = 0.8
      >>> label(config.sparsity)
      'u (weight 80, activation 90)'
    """
    if sparsity.distribution == "dense":
        return "dense"
    kind = (sparsity.distribution, sparsity.granularity)
    names = {meaning: name for name, meaning in _KINDS.items()}
    name = names.get(kind, " ".join(kind) + " ")
    weight, activation = _percent(sparsity.weight), _percent(sparsity.activation)
    remarks = []
    if weight == activation:
        name += weight
    else:
        remarks += [f"weight {weight}", f"activation {activation}"]
    if sparsity.first_layer_dense != (sparsity.distribution == "uniform"):
        remarks.append(f"first layer {'dense' if sparsity.first_layer_dense else 'sparse'}")
    return f"{name.rstrip(' -')} ({', '.join(remarks)})" if remarks else name


def _percent(fraction: float) -> str:
    """The decimal that was asked for, in percent: 0.975 is "97.5"."""
    percent = format(decimal.Decimal(str(fraction)) * 100, "f")
    return percent.rstrip("0").rstrip(".") if "." in percent else percent
