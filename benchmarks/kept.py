"""What layers keep for their backward passes, for every network whose steps are measured.

    python benchmarks/kept.py --output docs/results/kept.json

Counted by `swat_jax.kept_bytes`, without a GPU. Weights and momentum, which both ways to train have
in float32, are added, so that the ratio is what a peak cannot go below.
"""

import argparse
import datetime
import json
import pathlib
from typing import Any

import jax
from steps import NETWORKS

from swat_jax import config_file, flops

METHODS = ("dense", "u80", "u90")
MIB = 2**20


def count(network: str) -> list[dict[str, Any]]:
    """A row for every method."""
    name, batch = network.split(":")
    rows = []
    for method in METHODS:
        config: Any = config_file.load(f"configs/{name}.py:{method}")
        config.precision = "bfloat16"
        kept = flops.bytes_report(config, int(batch))["dense" if method == "dense" else "swat"]
        weights = {layer.path: layer.weights for layer in flops.config_table(config)}
        rows.append({
            "network": name,
            "batch": int(batch),
            "method": method,
            "activations_mib": kept["activations"] / MIB,
            "weights_mib": kept["weights"] / MIB,
            "state_mib": 2 * 4 * sum(weights.values()) / MIB,
        })  # fmt: skip
    for row in rows:
        row["memory_ratio"] = total(row) / total(rows[0])
    return rows


def total(row: dict[str, Any]) -> float:
    return row["activations_mib"] + row["weights_mib"] + row["state_mib"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Bytes that layers keep.")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), help="CONFIG:BATCH ...")
    parser.add_argument("--output", help="JSON file to write")
    options = parser.parse_args()
    rows = [row for network in options.networks for row in count(network)]
    found = {
        "date": datetime.date.today().isoformat(),
        "versions": {"jax": jax.__version__},
        "precision": "bfloat16",
        "kept": rows,
    }
    if options.output:
        pathlib.Path(options.output).write_text(json.dumps(found, indent=2) + "\n")
    print(
        f"{'network':22} {'batch':>5} {'method':6} {'kept MiB':>9} {'and state':>9} {'of dense':>8}"
    )
    for row in rows:
        kept = row["activations_mib"] + row["weights_mib"]
        print(f"{row['network']:22} {row['batch']:5} {row['method']:6} {kept:9.0f} "
              f"{total(row):9.0f} {row['memory_ratio']:8.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
