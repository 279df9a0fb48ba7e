"""A user's own ResNet-50 of stock layers, made sparse and fused, beside ours: time and peak memory.

    python benchmarks/own_model.py --output docs/results/own_model_h200.json

Both train in the same steps and the same run, as `benchmarks/steps.py` measures them; "own model"
is the network of `tests/stock_networks.py` with `swat_jax.fuse` around its forward pass. It should
take at most 1.05 of what ours takes, in time and in memory.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import Any, NamedTuple

import steps

# Ours and the user's, which are timed side by side.
PAIRS = (
    ("dense", "dense, own model"),
    ("u90", "u90, own model"),
    ("u90 exact", "u90 exact, own model"),
)
MOST = 1.05


class Pair(NamedTuple):
    """The user's network beside ours, trained by the same method."""

    users: dict[str, Any]
    ours: dict[str, Any]

    def ratio(self, key: str) -> float:
        """What the user's takes of ours."""
        return self.users[key] / max(self.ours[key], 1e-9)

    @property
    def is_within(self) -> bool:
        return max(self.ratio("ms"), self.ratio("peak_mib")) <= MOST


def pairs(rows: list[dict[str, Any]]) -> list[Pair]:
    """The pairs of which both were measured."""
    by_method = {one["method"]: one for one in rows if "error" not in one}
    return [
        Pair(by_method[users], by_method[ours])
        for ours, users in PAIRS
        if ours in by_method and users in by_method
    ]


def compared(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each pair of which both were measured."""
    return [
        f"{pair.users['method']}: {pair.ratio('ms'):.3f} of the time and "
        f"{pair.ratio('peak_mib'):.3f} of the memory of {pair.ours['method']}, "
        f"{'within' if pair.is_within else 'NOT within'} {MOST}"
        for pair in pairs(rows)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="A user's own network beside ours.")
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--jobs", type=int, default=4, help="processes at once, dense included")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is timed")
    parser.add_argument("--steps", type=int, default=50, help="timed steps of each kind and round")
    parser.add_argument("--timeout", type=float, default=600, help="seconds without an answer")
    parser.add_argument("--cache", help="folder for compiled programs; by default one that goes")
    parser.add_argument("--methods", nargs="+", help="some of them only")
    parser.add_argument("--output", help="JSON file to write")
    options = parser.parse_args()
    # Dense is in every group; the two of a pair are in one.
    order = ["dense", "u90", "u90, own model", "dense, own model"]
    order += ["u90 exact", "u90 exact, own model"]
    options.methods = [one for one in order if one in (options.methods or order)]
    rows: dict[str, dict[str, Any]] = {}
    network = f"imagenet_resnet50:{options.batch_size}"
    for one in steps.measure_network(network, options):
        rows[one["method"]] = one
    found = steps.report(list(rows.values()))
    if options.output:
        pathlib.Path(options.output).write_text(json.dumps(found, indent=2) + "\n")
    print(steps.table(found["steps"]))
    print("\n".join(compared(list(rows.values()))))


if __name__ == "__main__":
    main()
