"""A run that is killed at any moment ends with the bits of one that never was."""

import contextlib
import json
import shutil
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
    finish_as_two_processes,
    newest_step,
    spawn,
)

pytestmark = pytest.mark.newest

RUNS = {"stream": ("u90", STREAM), "momentum": ("m90", OFTEN_SAVED | {"devices": 2})}
# Processes start in half the time when the many small programs of a start are cached too.
CACHE_ALL = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


@pytest.fixture(scope="module", params=list(RUNS))
def run(request, tmp_path_factory):
    """Flags, and the workdir and result of the run that never was killed."""
    method, changes = RUNS[request.param]
    options = {"devices": 1, **changes}
    flags = [f"--config.{key.replace('__', '.')}={value}" for key, value in options.items()]
    whole = tmp_path_factory.mktemp(request.param)
    result = train.train_and_evaluate(digits(method, **options, checkpoint__keep=9), whole)
    return [method, *flags], whole, result


def test_killed_again_and_again_it_ends_with_the_same_bits(run, tmp_path):
    flags, whole, expected = run
    broken = tmp_path
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

    assert_same_run(broken, result, whole, expected)


@pytest.mark.parametrize("run", ["momentum"], indirect=True)
def test_two_processes_go_on_with_a_run_and_end_with_its_bits(run, tmp_path):
    """One device each in place of two in one process, joined by gloo.

    The mean of two numbers is the same whoever adds them up; with more devices the order differs.
    """
    flags, whole, expected = run
    steps = [path.name for path in (whole / "checkpoints").iterdir()]
    later = shutil.ignore_patterns("result.json", *(step for step in steps if int(step) > 16))
    shutil.copytree(whole, tmp_path / "pair", ignore=later)
    result = finish_as_two_processes(tmp_path / "pair", *flags, env=CACHE_ALL)
    assert [path.name for path in (tmp_path / "pair" / "checkpoints").iterdir()] == ["22"]
    assert_same_run(tmp_path / "pair", result, whole, expected)


def assert_same_run(ours, result, theirs, expected):
    """The same bits in the last checkpoint; the same metrics and result, but for what is timed."""
    assert_same_bits(final_arrays(ours), final_arrays(theirs))
    assert lines(ours) == lines(theirs)
    assert result.keys() == expected.keys()
    for key in result.keys() - {"seconds", "images_per_second"}:
        assert result[key] == expected[key], key


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
