"""Short runs on the digits for the tests of training: how to start one, and what it left."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from swat_jax import config_file, native

ROOT = Path(__file__).parents[1]
needs_library = pytest.mark.skipif(not native.load().available, reason=native.load().reason)
# 22 steps; the checkpoints of steps 4, 8, 11, 12, 16, 20 and 22 follow one another closely.
OFTEN_SAVED = {
    "batch_size": 128,
    "epochs": 2,
    "checkpoint__every_steps": 4,
    "log__every_steps": 3,
    "sparsity__threshold_every_steps": 3,
}
STREAM = OFTEN_SAVED | {"data__on_device": False}


def digits(method="u90", **overrides):
    """The digits config; `batch_size=...`, or `data__on_device=...` for a nested key."""
    config = config_file.load(f"{ROOT}/configs/digits.py:{method}")
    config.devices = 1
    for key, value in overrides.items():
        section = config
        *parents, last = key.split("__")
        for part in parents:
            section = section[part]
        section[last] = value
    return config


def command(workdir, method="u90", *flags):
    config = ["--config", f"configs/digits.py:{method}", "--workdir", str(workdir)]
    return [sys.executable, "-m", "swat_jax.main", *config, *flags]


def spawn(workdir, method, *flags, env=None):
    """Starts a training process that prints nothing."""
    return subprocess.Popen(
        command(workdir, method, *flags),
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def finish(workdir, method, *flags, env=None):
    """Runs a training process to its end; returns its result."""
    done = subprocess.run(
        command(workdir, method, *flags),
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((workdir / "result.json").read_text())


def finish_as_two_processes(workdir, method, *flags, env=None):
    """The same by two processes with a device each, started as Slurm would and joined by gloo.

    XLA takes a thread per CPU, or per device if these are more, and from JAX 0.12 on cuts sums into
    as many parts; the two therefore have as many threads as one process with all devices.
    """
    threads = int(os.environ.get("NPROC") or len(os.sched_getaffinity(0)))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    common = {
        **(env or {}),
        "JAX_COORDINATOR_ADDRESS": address,
        "SLURM_JOB_ID": "1",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NODELIST": "localhost",
        "NPROC": str(max(threads, jax.device_count("cpu"))),
        "XLA_FLAGS": re.sub(r"(device_count)=\d+", r"\1=1", os.environ["XLA_FLAGS"]),
    }
    numbers = [{"SLURM_PROCID": str(n), "SLURM_LOCALID": str(n)} for n in range(2)]
    processes = [
        spawn(workdir, method, "--distributed", *flags, env=common | own) for own in numbers
    ]
    try:
        assert [process.wait() for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return json.loads((workdir / "result.json").read_text())


def newest_step(workdir):
    """Of the complete checkpoints; looks only, since a run may be saving."""
    folder = workdir / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return max((int(name) for name in names if name.isdecimal()), default=0)


def final_arrays(workdir):
    """Every array of the last checkpoint, by name."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        path = workdir / "checkpoints" / str(newest_step(workdir)) / "state"
        structure = reader.metadata(path).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), structure)
        tree = reader.restore(path, ocp.args.PyTreeRestore(restore_args=as_numpy))
    return {jax.tree_util.keystr(name): leaf for name, leaf in jax.tree.leaves_with_path(tree)}


def assert_same_bits(ours, theirs):
    """Equal names, types, shapes and bits."""
    assert ours.keys() == theirs.keys()
    assert len(ours) > 20
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype, name
        assert value.shape == theirs[name].shape, name
        assert value.tobytes() == theirs[name].tobytes(), name
