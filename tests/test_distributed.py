"""Two processes that train together, connected by gloo, against one process with two devices.

With two devices a mean is the same whoever adds up, so all of it agrees bit for bit; with more the
order of the sums differs.
"""

import json
import os
import re
import shutil
import socket

from swat_jax import train
from tests.runs import assert_same_bits, digits, final_arrays, newest_step, spawn

OPTIONS = {
    "max_steps": 7,
    "checkpoint__every_steps": 3,
    "checkpoint__keep": 3,
    "log__every_steps": 3,
    "sparsity__threshold_every_steps": 5,
}


def start(workdir):
    """Two processes with a device each, as Slurm would start them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    common = {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "SLURM_JOB_ID": "1",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NODELIST": "localhost",
        "XLA_FLAGS": re.sub(r"(device_count)=\d+", r"\1=1", os.environ["XLA_FLAGS"]),
    }
    flags = [f"--config.{key.replace('__', '.')}={value}" for key, value in OPTIONS.items()]
    numbers = [{"SLURM_PROCID": str(n), "SLURM_LOCALID": str(n)} for n in range(2)]
    return [spawn(workdir, "u90", "--distributed", *flags, env=common | own) for own in numbers]


def test_two_processes_go_on_with_a_run_and_end_with_its_bits(tmp_path):
    whole, pair = tmp_path / "whole", tmp_path / "pair"
    expected = train.train_and_evaluate(digits("u90", devices=2, **OPTIONS), whole)
    shutil.copytree(whole, pair, ignore=shutil.ignore_patterns("6", "7", "result.json"))
    assert newest_step(pair) == 3  # as if it had been killed there; the thresholds go on too

    processes = start(pair)
    try:
        assert [process.wait(timeout=200) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
            process.wait()

    assert sorted(path.name for path in (pair / "checkpoints").iterdir()) == ["3", "6", "7"]
    assert_same_bits(final_arrays(pair), final_arrays(whole))
    assert (pair / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    result = json.loads((pair / "result.json").read_text())
    assert result["device"] == "2 x cpu (cpu)"
    timed = {"seconds", "images_per_second"}
    assert {k: v for k, v in result.items() if k not in timed} == {
        k: v for k, v in expected.items() if k not in timed
    }
