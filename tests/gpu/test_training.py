"""Training on the GPU: learns, repeats itself bit for bit, and survives being killed."""

import signal
import time

import numpy as np
import pytest

from tests.runs import assert_same_bits, final_arrays, finish, newest_step, spawn

FLAGS = [
    "u90",
    "--config.epochs=6",
    "--config.checkpoint.every_steps=5",
    "--config.deterministic=True",
    "--config.precision=bfloat16",
    "--config.sparsity.threshold_every_steps=3",
]
# Without the fake CPU devices and the CPU that the other tests ask for. This process may hold most
# of the GPU's memory, so the training takes what it needs as it goes.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cuda",
    "XLA_FLAGS": "",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
}


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """With a cache of programs: seven processes would compile the same ones."""
    cache = tmp_path_factory.mktemp("cache")
    return ENVIRONMENT | {"JAX_COMPILATION_CACHE_DIR": str(cache)}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, environment):
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, finish(workdir, *FLAGS, env=environment)


def test_learns_on_the_gpu(uninterrupted):
    _, result = uninterrupted
    assert "gpu" in result["device"]
    assert result["pruned_test_accuracy"] > 0.8


def test_the_same_seed_gives_the_same_bits(uninterrupted, tmp_path):
    # Compiled anew: the choice of algorithms must not matter.
    finish(tmp_path, *FLAGS, env=ENVIRONMENT)
    assert_same_bits(final_arrays(tmp_path), final_arrays(uninterrupted[0]))


def test_killed_again_and_again_it_ends_with_the_same_bits(uninterrupted, environment, tmp_path):
    random = np.random.default_rng(0)
    kills = 0
    for _ in range(4):
        process = spawn(tmp_path, *FLAGS, env=environment)
        before = newest_step(tmp_path)
        while process.poll() is None and newest_step(tmp_path) <= before:
            time.sleep(0.005)
        time.sleep(random.uniform(0, 0.3))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills
    finish(tmp_path, *FLAGS, env=environment)
    assert_same_bits(final_arrays(tmp_path), final_arrays(uninterrupted[0]))
