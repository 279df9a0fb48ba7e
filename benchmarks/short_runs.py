"""Short real runs: does the loss fall, for every method, on both data paths?

    python benchmarks/short_runs.py --data_dir DATA --output docs/results/short_runs.json

Trains `resnet8` on CIFAR-10 for a few hundred steps, float32, with dense, SWAT-U, ERK and M at 90 %
and channel 70, once with the data on the device and once through Grain. On one path every method sees
the same batches. Prints the mean training loss of the first and of the last 20 steps and their ratio.
"""

import argparse
import datetime
import json
import pathlib
import subprocess
import sys
import tempfile

METHODS = ("dense", "u90", "erk90", "m90", "channel70")
PATHS = {"device": "True", "grain": "False"}
WINDOW = 20


def run(method: str, path: str, data_dir: str, steps: int, workdir: pathlib.Path) -> dict:
    command = [
        *(sys.executable, "-m", "swat_jax.main", "--workdir", str(workdir)),
        *("--config", f"configs/cifar10_resnet18.py:{method}"),
        f"--config.data.data_dir={data_dir}",
        f"--config.data.on_device={PATHS[path]}",
        f"--config.max_steps={steps}",
        f"--config.log.every_steps={WINDOW}",
        "--config.model.name=resnet8",
        "--config.batch_size=64",
        "--config.precision=float32",
        "--config.optimizer.learning_rate=0.05",
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    losses = [line["loss"] for line in map(json.loads, lines) if line["kind"] == "train"]
    result = json.loads((workdir / "result.json").read_text())
    kept = ("pruned_test_accuracy", "weight_sparsity", "activation_sparsity", "images_per_second")
    return {
        "method": method,
        "path": path,
        "steps": steps,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "ratio": losses[-1] / losses[0],
        **{key: result[key] for key in kept},
        "device": result["device"],
        "versions": result["versions"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", required=True, help="TFDS directory with cifar10")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--output", help="JSON file to write")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for path in PATHS:
            for method in METHODS:
                workdir = pathlib.Path(folder) / f"{method}_{path}"
                rows.append(run(method, path, options.data_dir, options.steps, workdir))
                if options.output:
                    found = {"date": datetime.date.today().isoformat(), "runs": rows}
                    pathlib.Path(options.output).write_text(json.dumps(found, indent=2) + "\n")
    print(
        f"{'method':10} {'path':7} {'first':>7} {'last':>7} {'ratio':>6} {'pruned':>8} {'img/s':>7}"
    )
    for row in rows:
        print(
            f"{row['method']:10} {row['path']:7} {row['first_loss']:7.3f} {row['last_loss']:7.3f}"
            f" {row['ratio']:6.2f} {row['pruned_test_accuracy']:8.2%} {row['images_per_second']:7.0f}"
        )


if __name__ == "__main__":
    main()
