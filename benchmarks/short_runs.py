r"""Short real runs: does the loss fall, for every method, on both data paths?

    python benchmarks/short_runs.py --data_dir DATA --output docs/results/short_runs.json
    python benchmarks/short_runs.py --data_dir cifar10.npz --source npz --network resnet18 \
        --batch_size 128 --precision bfloat16 --output docs/results/short_runs_gpu.json

Trains a network on CIFAR-10 for a few hundred steps with dense, SWAT-U, ERK and M at 90 % and
channel 70, once with the data on the device and once through Grain. On one path every method sees
the same batches. Prints the mean training loss of the first and of the last 20 steps, their ratio,
the accuracy after hard pruning, and images per second.
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


def run(method: str, path: str, options: argparse.Namespace, workdir: pathlib.Path) -> dict:
    command = [
        *(sys.executable, "-m", "swat_jax.main", "--workdir", str(workdir)),
        *("--config", f"configs/cifar10_resnet18.py:{method}"),
        f"--config.data.source={options.source}",
        f"--config.data.data_dir={options.data_dir}",
        f"--config.data.on_device={PATHS[path]}",
        f"--config.max_steps={options.steps}",
        f"--config.log.every_steps={WINDOW}",
        f"--config.model.name={options.network}",
        f"--config.batch_size={options.batch_size}",
        f"--config.precision={options.precision}",
        f"--config.optimizer.learning_rate={options.learning_rate}",
    ]
    if options.steps_per_dispatch:
        command.append(f"--config.steps_per_dispatch={options.steps_per_dispatch}")
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    losses = [line["loss"] for line in map(json.loads, lines) if line["kind"] == "train"]
    result = json.loads((workdir / "result.json").read_text())
    kept = ("pruned_test_accuracy", "weight_sparsity", "activation_sparsity", "images_per_second")
    return {
        "method": method,
        "path": path,
        "network": options.network,
        "batch_size": options.batch_size,
        "steps": options.steps,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "ratio": losses[-1] / losses[0],
        **{key: result[key] for key in kept},
        "device": result["device"],
        "versions": result["versions"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Short real runs on CIFAR-10.")
    parser.add_argument("--data_dir", required=True, help="TFDS directory, or .npz file")
    parser.add_argument("--source", default="tfds", choices=("tfds", "npz"))
    parser.add_argument("--network", default="resnet8")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--learning_rate", type=float, default=0.05)
    parser.add_argument("--steps", type=int, default=780)
    parser.add_argument("--steps_per_dispatch", type=int, help="0: as the config chooses")
    parser.add_argument("--output", help="JSON file to write")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for path in PATHS:
            for method in METHODS:
                workdir = pathlib.Path(folder) / f"{method}_{path}"
                rows.append(run(method, path, options, workdir))
                if options.output:
                    found = {"date": datetime.date.today().isoformat(), "runs": rows}
                    pathlib.Path(options.output).write_text(json.dumps(found, indent=2) + "\n")
    print("method     path      first    last  ratio   pruned   im/s")
    for row in rows:
        losses = f"{row['first_loss']:7.3f} {row['last_loss']:7.3f} {row['ratio']:6.2f}"
        scores = f"{row['pruned_test_accuracy']:8.2%} {row['images_per_second']:6.0f}"
        print(f"{row['method']:10} {row['path']:7} {losses} {scores}")


if __name__ == "__main__":
    main()
