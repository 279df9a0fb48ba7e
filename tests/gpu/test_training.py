"""Training on the GPU: learns, repeats itself bit for bit, and survives being killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

ROOT = Path(__file__).parents[2]
OPTIONS = [
    "--config.epochs=6",
    "--config.checkpoint.every_steps=5",
    "--config.deterministic=True",
    "--config.precision=bfloat16",
    "--config.sparsity.threshold_every_steps=3",
]


# This process may hold most of the GPU's memory: the training takes what it needs as it goes.
_SHARED_GPU = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


def command(workdir, *more):
    config = ["--config", "configs/digits.py:u90", "--workdir", str(workdir)]
    return [sys.executable, "-m", "swat_jax.main", *config, *OPTIONS, *more]


def environment():
    # Without the fake CPU devices and the CPU that the other tests ask for.
    return {**os.environ, "JAX_PLATFORMS": "cuda", "XLA_FLAGS": "", **_SHARED_GPU}


def run(workdir, *more):
    done = subprocess.run(
        command(workdir, *more), cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads((workdir / "result.json").read_text())


def final_arrays(workdir):
    """Every array of the last checkpoint, by name."""
    reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    path = workdir / "checkpoints" / str(newest_step(workdir)) / "state"
    structure = reader.metadata(path).item_metadata.tree
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), structure)
    tree = reader.restore(path, ocp.args.PyTreeRestore(restore_args=as_numpy))
    return {jax.tree_util.keystr(name): leaf for name, leaf in jax.tree.leaves_with_path(tree)}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, run(workdir)


def same_bits(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert len(ours) > 20
    for name, value in ours.items():
        assert value.tobytes() == theirs[name].tobytes(), name


def test_learns_on_the_gpu(uninterrupted):
    _, result = uninterrupted
    assert "gpu" in result["device"]
    assert result["pruned_test_accuracy"] > 0.8


def test_the_same_seed_gives_the_same_bits(uninterrupted, tmp_path):
    run(tmp_path)
    same_bits(final_arrays(tmp_path), final_arrays(uninterrupted[0]))


def test_killed_again_and_again_it_ends_with_the_same_bits(uninterrupted, tmp_path):
    random = np.random.default_rng(0)
    kills = 0
    for _ in range(4):
        process = subprocess.Popen(
            command(tmp_path),
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        before = newest_step(tmp_path)
        while process.poll() is None and newest_step(tmp_path) <= before:
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.5))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills
    run(tmp_path)
    same_bits(final_arrays(tmp_path), final_arrays(uninterrupted[0]))


def newest_step(workdir):
    """Of the complete checkpoints; looks only, since a run may be saving."""
    folder = workdir / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return max((int(name) for name in names if name.isdecimal()), default=0)
