"""The pictures of `swat_jax.report`, as SVG text that is the same for the same figures."""

from __future__ import annotations

import io
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from swat_jax.errors import UsageError

Run = dict[str, Any]
Runs = Mapping[tuple[str, str], Sequence[Run]]


def draw(rows: Runs, paper: Mapping[str, Mapping[str, float | None]]) -> dict[str, tuple[str, str]]:
    """All pictures that the runs allow.

    Args:
      rows: runs by (network, method).
      paper: top-1 in percent by network and method; None where there is none.

    Returns:
      Name -> (title, SVG).

    Raises:
      UsageError: matplotlib is not installed.
    """
    found: dict[str, tuple[str, str]] = {
        "flops": ("Accuracy and training FLOPs", _flops(rows, paper))
    }
    for network in dict.fromkeys(network for network, _ in rows):
        own = {method: runs for (name, method), runs in rows.items() if name == network}
        title = f"Test accuracy of {network} while it is trained"
        found[f"{network}_accuracy"] = (title, _curves(own))
        sparse = {method: runs[0] for method, runs in own.items() if method != "dense"}
        if sparse:
            found[f"{network}_layers"] = (f"Zeros in the layers of {network}", _layers(sparse))
    return found


def mean_accuracy(runs: Sequence[Run]) -> float:
    """Mean over seeds of the pruned top-1, in percent."""
    return 100 * statistics.fmean(run["pruned_test_accuracy"] for run in runs)


def flops_saved(runs: Sequence[Run]) -> float:
    """FLOPs of training that a row saves, in percent of dense training's.

    By the paper's convention, of the sparsity that was asked for: what is measured counts zeros
    that a ReLU leaves, too. Where budgets move only the measured figure is one.
    """
    moves = runs[0]["config"]["sparsity"]["distribution"] == "momentum"
    key = "training_flop_reduction" if moves else "planned_training_flop_reduction"
    return statistics.fmean(run[key] for run in runs)


def _flops(rows: Runs, paper: Mapping[str, Mapping[str, float | None]]) -> str:
    """Accuracy over the FLOPs of training, as a share of dense training's."""
    figure, axes = figure_of(7, 4.5)
    networks = dict.fromkeys(network for network, _ in rows)
    colours = {network: f"C{number}" for number, network in enumerate(networks)}
    for (network, method), runs in rows.items():
        share = 1 - flops_saved(runs) / 100
        here = mean_accuracy(runs)
        axes.plot(share, here, "o", color=colours[network])
        axes.annotate(method, (share, here), xytext=(5, -9), textcoords="offset points", size=7)
        theirs = paper.get(network, {}).get(method)
        if theirs is not None:
            axes.plot(share, theirs, "x", color=colours[network])
            axes.plot([share, share], [here, theirs], color=colours[network], lw=0.5)
    for network, colour in colours.items():
        axes.plot([], [], "o", color=colour, label=network)
    axes.plot([], [], "x", color="grey", label="the paper's")
    axes.set_xlabel("FLOPs of training, of dense training")
    axes.set_xlim(0, 1.12)  # room for the names
    axes.set_ylabel("top-1 after pruning, %")
    axes.legend()
    return svg_of(figure)


def _curves(own: Mapping[str, Sequence[Run]]) -> str:
    """Test accuracy by epoch, a line for each method, of its first seed."""
    figure, axes = figure_of(7, 4)
    for method, runs in own.items():
        epochs = runs[0]["epochs"]
        steps = runs[0]["steps"] / runs[0]["config"]["epochs"]
        numbers = [one["step"] / steps for one in epochs]
        axes.plot(numbers, [100 * one["test_accuracy"] for one in epochs], label=method, lw=1)
    # What the first epochs show is the same everywhere; what matters is within a few points.
    axes.set_ylim(bottom=axes.get_ylim()[1] - 20)
    axes.set_xlabel("epoch")
    axes.set_ylabel("top-1 under exact masks, %")
    axes.legend()
    return svg_of(figure)


def _layers(sparse: Mapping[str, Run]) -> str:
    """Zeros in the weights and saved inputs of every layer, two panels for each method."""
    figure, panels = figure_of(9, 2.2 * len(sparse), rows=len(sparse))
    for axes, (method, run) in zip(panels, sparse.items(), strict=True):
        layers = {path: run["layers"][path] for path in sorted(run["layers"], key=_place)}
        places = range(len(layers))
        for key, shift, label in (
            ("weight_sparsity", -0.2, "weights"),
            ("activation_sparsity", 0.2, "saved activations"),
        ):
            zeros = [100 * layer[key] for layer in layers.values()]
            axes.bar([place + shift for place in places], zeros, 0.4, label=label)
        axes.set_title(method, size=9)
        axes.set_ylabel("zeros, %")
        axes.set_xticks(list(places) if len(layers) <= 24 else [])
        if len(layers) <= 24:
            axes.set_xticklabels(list(layers), rotation=60, ha="right", size=6)
        else:
            axes.set_xlabel(f"{len(layers)} layers, from the input on")
        axes.set_ylim(0, 100)
    named = panels[0].get_legend_handles_labels()
    figure.legend(*named, loc="outside upper right", ncols=2, prop={"size": 8})
    return svg_of(figure)


def _place(path: str) -> tuple[Any, ...]:
    """What puts layers in the order in which they are computed."""
    part = path.split("/")[0].rstrip("0123456789")
    # A transition stands behind the stage of its number.
    ranks = {"stem": 0, "stage": 1, "transition": 1, "hidden": 2, "classifier": 3}
    numbers = [int(digits) for digits in re.findall(r"\d+", path)]
    return ranks.get(part, 4), numbers[:1], part == "transition", numbers, path


def figure_of(width: float, height: float, rows: int | None = None) -> tuple[Any, Any]:
    """A figure of so many inches, and its axes; a list of them where rows are given.

    Raises:
      UsageError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("pictures need matplotlib: pip install swat-jax[report]") from error
    # Names inside the SVG come from a hash, which would be random.
    matplotlib.rcParams["svg.hashsalt"] = "swat_jax"
    figure = Figure(figsize=(width, height), layout="constrained")
    if rows is None:
        return figure, figure.add_subplot()
    return figure, list(figure.subplots(rows, squeeze=False)[:, 0])


def svg_of(figure: Any) -> str:
    """The figure as SVG: the same text for the same figure."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return "\n".join(text.rstrip() for text in buffer.getvalue().splitlines()) + "\n"
