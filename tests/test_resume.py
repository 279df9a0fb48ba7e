"""A run that is killed at any moment ends with the bits of one that never was."""

import contextlib
import json
import signal
import time

import numpy as np
import pytest

from swat_jax import train
from tests.runs import (
    OFTEN_SAVED,
    STREAM,
    assert_same_bits,
    digits,
    final_arrays,
    finish,
    newest_step,
    spawn,
)

RUNS = {"stream": ("u90", STREAM), "momentum": ("m90", OFTEN_SAVED | {"devices": 2})}
# Processes start in half the time when the many small programs of a start are cached too.
CACHE_ALL = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


@pytest.mark.parametrize(("method", "changes"), RUNS.values(), ids=RUNS)
def test_killed_again_and_again_it_ends_with_the_same_bits(method, changes, tmp_path):
    options = {"devices": 1, **changes}
    changes = {key.replace("__", "."): value for key, value in options.items()}
    flags = [method, *(f"--config.{key}={value}" for key, value in changes.items())]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    expected = train.train_and_evaluate(digits(method, **options), whole)
    assert expected["steps"] == 22
    assert expected["final_loss"] < 1.8, "it does not learn"
    assert expected["weight_sparsity"] == pytest.approx(0.9, abs=2e-3)
    random = np.random.default_rng(0)
    kills = []
    for moment in ("saving", "any", "saving"):
        process = spawn(broken, *flags, env=CACHE_ALL)
        before = newest_step(broken)
        while process.poll() is None and newest_step(broken) <= before:
            time.sleep(0.002)
        if moment == "any":
            time.sleep(random.uniform(0, 0.3))
        while moment == "saving" and process.poll() is None and not half_saved(broken):
            time.sleep(0.002)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()
        if process.returncode == -signal.SIGKILL:
            kills.append((newest_step(broken), half_saved(broken)))
    assert any(half for _, half in kills), f"no kill fell into a save: {kills}"
    assert not (broken / "result.json").exists(), f"nothing was left to do: {kills}"
    result = finish(broken, *flags, env=CACHE_ALL)

    assert_same_bits(final_arrays(broken), final_arrays(whole))
    for key in ("pruned_test_accuracy", "test_accuracy", "final_loss", "weight_sparsity"):
        assert result[key] == expected[key]
    assert lines(broken) == lines(whole)


def half_saved(workdir):
    """The step that is being saved, or was when the run was killed; None where there is none."""
    with contextlib.suppress(FileNotFoundError):  # renamed while we looked
        for path in (workdir / "checkpoints").iterdir():
            if ".orbax-checkpoint-tmp" in path.name:
                return path.name.split(".")[0]
    return None


def lines(workdir):
    """The metrics but for what depends on time; every step once and in order."""
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in found if line["kind"] == "eval"]
    steps = [line["step"] for line in found if line["kind"] == "train"]
    assert steps == sorted(set(steps))
    return steps, evaluations
