r"""What a training step and an inference cost, layer by layer, and what SWAT saves.

Examples:
  python -m swat_jax.flops --config configs/imagenet_resnet50.py:u80
  python -m swat_jax.flops --config configs/cifar10_vgg16.py:u90 --bytes
  python -m swat_jax.flops --config configs/cifar10_vgg16.py:u90 --bytes \
      --batch_size=32 --config.precision=float32

  --config FILE[:METHOD]   METHOD: dense, or u90, erk95, m95, channel70, ...
  --config.KEY=VALUE       a value of the config
  --bytes                  what layers keep for their backward passes, not MACs
  --batch_size N           with --bytes: of N images on one device
"""

import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from swat_jax import command_line, config_file, kept_bytes, method
from swat_jax.errors import UsageError
from swat_jax.layer_table import Layer, Sparsities, layer_table, network_table, sparsities

# Known without opening the data. Anything else is counted with ten classes: the classifier is a
# vanishing part of the MACs.
NUM_CLASSES = {"digits": 10, "cifar10": 10, "cifar100": 100, "imagenet": 1000}
DEFAULT_CLASSES = 10

__all__ = [
    "Layer",
    "Sparsities",
    "bytes_report",
    "channels_pruned",
    "config_table",
    "inference_flop_reduction",
    "layer_table",
    "mean_activation_sparsity",
    "mean_weight_sparsity",
    "network_table",
    "render",
    "report",
    "sparsities",
    "training_flop_reduction",
]

MOMENTUM_NOTE = (
    "the budgets of momentum change while training; these figures are for the start:"
    " uniform, with the first layer sparse"
)


def training_flop_reduction(
    layers: Sequence[Layer], weight: Mapping[str, float], activation: Mapping[str, float]
) -> float:
    """Percentage of the MACs of a training step that the given sparsities save.

    Counted are the multiply-accumulates (MACs) of convolutions and linear layers, per image:

    * forward `F = Cin*Cout*kh*kw*Hout*Wout / groups`, and as many for the weight gradient;
    * input gradient `X = Cin*Cout*kh*kw*Hin*Win / groups`, at the resolution of the INPUT, and for
      the first layer too, although nobody needs that one.

    With weight sparsity s_W and activation sparsity s_A of a layer, SWAT leaves `(F + X)(1 - s_W)`
    of forward and input gradient and `F (1 - s_A)` of the weight gradient. This convention
    reproduces the columns of the SWAT paper (Raihan and Aamodt, NeurIPS 2020);
    `tests/test_flops.py` lists them, with the two rows that it does not.

    Args:
      layers: the layer table.
      weight: weight sparsity by path.
      activation: activation sparsity by path.
    """
    dense = sum(2 * layer.macs_forward + layer.macs_input_gradient for layer in layers)
    saved = sum(
        (layer.macs_forward + layer.macs_input_gradient) * weight[layer.path]
        + layer.macs_forward * activation[layer.path]
        for layer in layers
    )
    return 100 * saved / dense


def inference_flop_reduction(layers: Sequence[Layer], weight: Mapping[str, float]) -> float:
    """Percentage of the MACs of a forward pass that the given weight sparsities save."""
    dense = sum(layer.macs_forward for layer in layers)
    return 100 * sum(layer.macs_forward * weight[layer.path] for layer in layers) / dense


def channels_pruned(
    layers: Sequence[Layer], weight: Mapping[str, float], granularity: str
) -> float:
    """Percentage of the (input, output) channel pairs of all convs that are pruned as a unit.

    It is 0 where single weights or vectors go: they leave something of a pair.
    """
    if granularity not in ("channel", "filter"):
        return 0.0
    convs = [layer for layer in _once(layers) if layer.kind == "conv"]
    return _percentage([(math.prod(x.kernel_shape[-2:]), weight[x.path]) for x in convs])


def mean_weight_sparsity(layers: Sequence[Layer], weight: Mapping[str, float]) -> float:
    """Percentage of zeros among the weights of all layers."""
    return _percentage([(layer.weights, weight[layer.path]) for layer in _once(layers)])


def mean_activation_sparsity(layers: Sequence[Layer], activation: Mapping[str, float]) -> float:
    """Percentage of zeros among the layer inputs that are kept for the backward pass."""
    return _percentage([(layer.activations, activation[layer.path]) for layer in layers])


def _once(layers: Sequence[Layer]) -> list[Layer]:
    """Without the second and later uses of a layer: its weights exist once."""
    return list({layer.path: layer for layer in layers}.values())


def _percentage(parts: Sequence[tuple[int, float]]) -> float:
    """Mean of the fractions in (size, fraction) pairs, weighted by size, in percent."""
    total = sum(size for size, _ in parts)
    return 100 * sum(size * fraction for size, fraction in parts) / total if total else 0.0


def config_table(config: Any, num_classes: int | None = None) -> list[Layer]:
    """The layer table of the network that a config trains.

    Args:
      config: needs `model.name`, `data.image_size` and `data.mean` (one number per channel).
      num_classes: width of the output; None: what `config.dataset` is known to have.
    """
    return network_table(config.model.name, **facts(config, num_classes))


def facts(config: Any, num_classes: int | None = None) -> dict[str, Any]:
    """Width of the output and shape of an image, as far as the config tells them."""
    size = config.data.image_size
    return {
        "num_classes": num_classes or NUM_CLASSES.get(config.dataset, DEFAULT_CLASSES),
        "image_shape": (size, size, len(config.data.mean)),
    }


def report(config: Any, num_classes: int | None = None) -> dict[str, Any]:
    """Everything that this module knows about a config, ready for JSON.

    Percentages are of the MACs of a training step or an inference, the same for any batch size.

    Args:
      config: see `config_table`; also `sparsity`.
      num_classes: see `config_table`.
    """
    layers = config_table(config, num_classes)
    found = sparsities(layers, config.sparsity)
    result = {
        "network": config.model.name,
        "method": method.label(config.sparsity),
        "training_flop_reduction": training_flop_reduction(layers, found.weight, found.activation),
        "inference_flop_reduction": inference_flop_reduction(layers, found.weight),
        "channels_pruned": channels_pruned(layers, found.weight, config.sparsity.granularity),
        "weight_sparsity": mean_weight_sparsity(layers, found.weight),
        "activation_sparsity": mean_activation_sparsity(layers, found.activation),
        "weights": sum(layer.weights for layer in _once(layers)),
        "forward_macs": sum(layer.macs_forward for layer in layers),
        "training_macs": sum(2 * x.macs_forward + x.macs_input_gradient for x in layers),
        "note": MOMENTUM_NOTE if config.sparsity.distribution == "momentum" else "",
        "layers": [
            {
                **dataclasses.asdict(layer),
                "weights": layer.weights,
                "activations": layer.activations,
                "macs_forward": layer.macs_forward,
                "macs_input_gradient": layer.macs_input_gradient,
                "weight_sparsity": found.weight[layer.path],
                "activation_sparsity": found.activation[layer.path],
            }
            for layer in layers
        ],
    }
    return result


def render(result: Mapping[str, Any]) -> str:
    """`report` as text: one line a layer, then the totals."""
    width = max(len(layer["path"]) for layer in result["layers"])
    head = f"{'layer':{width}}  {'kernel':>16}  {'input':>9}  {'output':>9}"
    lines = [f"{head}  {'forward MACs':>13}  {'input-grad MACs':>15}  {'s_W %':>6}  {'s_A %':>6}"]
    for layer in result["layers"]:
        sizes = [_times(layer[key]) for key in ("kernel_shape", "input_hw", "output_hw")]
        lines.append(
            f"{layer['path']:{width}}  {sizes[0]:>16}  {sizes[1]:>9}  {sizes[2]:>9}"
            f"  {layer['macs_forward']:>13,}  {layer['macs_input_gradient']:>15,}"
            f"  {100 * layer['weight_sparsity']:>6.2f}  {100 * layer['activation_sparsity']:>6.2f}"
        )
    lines += [
        "",
        f"{result['network']}, {result['method']}: {result['weights']:,} weights",
        f"MACs per image: {result['forward_macs']:,} forward, {result['training_macs']:,} training",
        f"training FLOP reduction   {result['training_flop_reduction']:6.1f} %",
        f"inference FLOP reduction  {result['inference_flop_reduction']:6.1f} %",
        f"weight sparsity           {result['weight_sparsity']:6.1f} %  (of all weights)",
        f"activation sparsity       {result['activation_sparsity']:6.1f} %  (of all saved inputs)",
        f"channels pruned           {result['channels_pruned']:6.1f} %  (pairs of channels)",
    ]
    if result["note"]:
        lines.append(f"note: {result['note']}")
    return "\n".join(lines)


def bytes_report(config: Any, batch_size: int | None = None) -> dict[str, Any]:
    """What layers keep for their backward passes, see `swat_jax.kept_bytes.report`.

    Args:
      config: with the keys of `swat_jax.recipe.base`.
      batch_size: images that one device takes in a step; None: those of the config, spread over its
        devices, or on one if it does not say how many there are.

    Raises:
      UsageError: a number of images that cannot be had, or see there.
    """
    key, size = "--batch_size", batch_size
    if size is None:
        key, size = "config.batch_size", config.batch_size
        devices = 1 if config.devices is None else config.devices
        if devices < 1 or size % devices:
            raise UsageError(
                f"config.batch_size must be divisible by config.devices, got {size} and {devices}"
            )
        size //= devices
    if size < 1:
        raise UsageError(f"{key} must be a whole number >= 1, got {size}")
    return kept_bytes.report(config, **facts(config), batch_size=size)


def _times(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "-"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = config_file.Parser(__doc__)
    parser.add_argument("--bytes", action="store_true")
    parser.add_argument("--batch_size", type=int, metavar="N")
    return command_line.run(parser, _report, argv)


def _report(options: Any) -> command_line.Answer:
    config = config_file.require(options.config)
    if options.bytes:
        result = bytes_report(config, options.batch_size)
        return command_line.Answer(result, kept_bytes.render(result))
    if options.batch_size is not None:
        raise UsageError("--batch_size: only --bytes counts what depends on it")
    result = report(config)
    return command_line.Answer(result, render(result))


if __name__ == "__main__":
    sys.exit(main())
