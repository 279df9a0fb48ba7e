"""Rows of the table: run, cut off, moved to another place, finished there; figures and weights."""

import argparse
import fcntl
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from swat_jax import export, sparse_file

pytestmark = pytest.mark.newest

ROOT = pathlib.Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "reproduce.py"
NAME = "cifar10_resnet18_u90_small_seed3"
SMALL = (
    *("model.name=resnet8", "batch_size=16", "epochs=3", "precision=float32", "log.every_steps=2"),
    *("data.image_size=8", "eval.batch_size=16", "sparsity.threshold_every_steps=2"),
)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "cifar10.npz"
    arrays = {
        f"{split}_{kind}": made
        for split, count in (("train", 64), ("test", 20))
        for kind, made in (
            ("images", rng.integers(0, 256, (count, 8, 8, 3), np.uint8)),
            ("labels", rng.permutation(np.arange(count) % 10).astype(np.int64)),
        )
    }
    np.savez(path, **arrays)
    return path


def reproduce(place, *arguments):
    command = [sys.executable, str(SCRIPT), "--runs", str(place / "runs")]
    command += ["--output", str(place / "results"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.mark.timeout(300)
def test_a_row_is_cut_off_moved_and_finished(tmp_path, images, load):
    here, there = tmp_path / "here", tmp_path / "there"
    rows = ("--rows", "cifar10_resnet18:u90", "--seeds", 3, "--data", images)
    rows += ("--checkpoint_epochs", 1, "--label", "small", "--set", *SMALL)
    parts = tmp_path / "parts"

    first = reproduce(here, *rows, "--seconds", 0.01, "--pack", parts)
    assert first.returncode == 3, first.stdout + first.stderr
    assert "cut off" in first.stdout

    # The first epoch alone, as if time had been up then.
    script = load("reproduce")
    options = argparse.Namespace(
        runs=here / "runs", data=str(images), checkpoint_epochs=1, set=[*SMALL, "max_steps=4"]
    )
    row = script.Row("cifar10_resnet18", "u90", 3, "small")
    subprocess.run(script.command(row, options), cwd=ROOT, check=True, capture_output=True)
    (here / "runs" / NAME / "result.json").unlink()
    assert reproduce(here, "--pack", parts).returncode == 0
    # What has not come as far is replaced, and what has come further stays.
    for steps in (2, 9):
        mark = tmp_path / str(steps) / "runs" / NAME / "checkpoints" / str(steps)
        mark.mkdir(parents=True)
        assert reproduce(tmp_path / str(steps), "--unpack", parts).returncode == 0
        assert mark.exists() == (steps == 9)
    assert (tmp_path / "2" / "runs" / NAME / "checkpoints" / "4").exists()

    third = reproduce(there, "--unpack", parts, *rows)
    assert third.returncode == 0, third.stdout + third.stderr
    assert "resumed at step 4" in (there / "runs" / f"{NAME}.log").read_text()
    found = json.loads((there / "results" / f"{NAME}.json").read_text())
    assert (found["network"], found["method"], found["seed"]) == ("resnet8", "u90", 3)
    assert (found["steps"], len(found["epochs"])) == (12, 3)
    assert found["config"]["data"]["data_dir"] == "cifar10.npz"
    assert found["xla_flags"] == os.environ.get("XLA_FLAGS", "")
    assert 0 <= found["pruned_test_accuracy"] <= 1

    again = reproduce(there, *rows, "--pack", parts)
    assert (again.returncode, again.stdout.count("\n")) == (0, 1)  # the one part, and no row
    # Of a run that is done, only figures and weights travel.
    assert sum(path.stat().st_size for path in parts.iterdir()) < 2**20
    check_weights(there, found)

    (there / "results" / f"{NAME}.json").unlink()
    other = reproduce(there, *rows, "log.every_steps=3")
    assert other.returncode == 1
    assert "give another --label" in other.stdout


def test_a_row_that_another_process_trains_is_left_to_it(tmp_path, images):
    lock = tmp_path / "runs" / "cifar10_resnet18_u90_seed0.lock"
    lock.parent.mkdir()
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        twice = ("cifar10_resnet18:u90",) * 2
        result = reproduce(tmp_path, "--rows", *twice, "--data", images)
    assert result.returncode == 1
    assert result.stdout.count("another process trains it") == 1


def test_rows_are_spread_over_devices(load):
    script = load("reproduce")
    options = argparse.Namespace(devices=["0", "1", "2"])
    running = []
    for expected in ("0", "1", "2", "0"):
        assert script.free_device(running, options) == expected
        running.append(argparse.Namespace(device=expected))
    assert script.free_device([running[0], running[2]], options) == "1"
    assert script.free_device([], argparse.Namespace(devices=[])) is None


def test_a_row_has_its_part_of_the_gpu(tmp_path, load, monkeypatch):
    script = load("reproduce")
    sleep = "import time; time.sleep({})"
    seconds = {0: 0.5, 1: 1.5, 2: 1.0}
    monkeypatch.setattr(
        script, "command",
        lambda row, options: [sys.executable, "-S", "-c", sleep.format(seconds[row.seed])],
    )  # fmt: skip
    options = argparse.Namespace(
        runs=tmp_path, output=tmp_path, set=[], devices=["0", "1"], jobs=3, seconds=None,
        poll_seconds=0.02,
    )  # fmt: skip
    rows = [script.Row("config", "u90", seed) for seed in seconds]
    script.add_gpu_seconds(tmp_path, rows[1], 10.0)  # of an earlier start
    assert script.run_all(rows, options) == 1  # they leave no figures
    # Rows 0 and 2 share a GPU for half a second, of which each has half.
    found = [script.gpu_seconds(tmp_path, row) for row in rows]
    assert found[1] >= 11.5  # a GPU of its own
    assert found[0] + found[2] >= 1.0
    # Whatever starting a process takes, who runs twice as long has had more.
    assert found[0] < found[2] < found[0] + found[2]
    assert script.gpu_seconds(tmp_path, script.Row("config", "u90", 9)) is None


def test_the_flags_of_a_run_are_those_of_all_its_starts(tmp_path, load):
    script = load("reproduce")
    row = script.Row("config", "u90", 0)
    assert script.xla_flags(tmp_path, row) is None
    for given, expected in (("", ""), ("", ""), ("--a", "none, then --a"), ("", "none, then --a")):
        script.keep_flags(tmp_path, row, given)
        assert script.xla_flags(tmp_path, row) == expected


def test_equal_parts_of_a_gpu_are_counted_also_of_runs_that_are_cut_off(
    tmp_path, load, monkeypatch
):
    script, now = load("reproduce"), [100.0]
    monkeypatch.setattr(script.time, "monotonic", lambda: now[0])
    wait = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(script, "command", lambda row, options: wait)
    options = argparse.Namespace(runs=tmp_path, set=[])
    rows = [script.Row("config", "u90", seed) for seed in range(3)]
    running = [
        script.Running(row, device, options) for row, device in zip(rows, "001", strict=True)
    ]
    now[0] += 4
    script.count(running)
    now[0] += 1
    script.stop(running)
    assert [script.gpu_seconds(tmp_path, row) for row in rows] == [2.5, 2.5, 5.0]


def test_a_row_sees_its_device_only(tmp_path, load, monkeypatch):
    script = load("reproduce")
    say = "import os; print(os.environ.get('CUDA_VISIBLE_DEVICES'))"
    monkeypatch.setattr(script, "command", lambda row, options: [sys.executable, "-c", say])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    options = argparse.Namespace(runs=tmp_path, set=[])
    for device, expected in (("3", "3"), (None, "None")):
        one = script.Running(script.Row("config", "u90", 0, f"on{device}"), device, options)
        assert one.process.wait() == 0
        one.end()
        assert one.last_lines() == expected


def check_weights(place, found):
    held = sparse_file.read(place / "runs" / "weights" / f"{NAME}.safetensors")
    arrays, sparse, _ = export.of_run(place / "runs" / NAME)
    assert held.arrays.keys() == arrays.keys()
    for path, array in arrays.items():
        np.testing.assert_array_equal(held.arrays[path], array)
    zeros = sum(np.count_nonzero(arrays[path] == 0) for path in sparse)
    size = sum(arrays[path].size for path in arrays if path.endswith("/kernel"))
    assert zeros / size == pytest.approx(found["weight_sparsity"], abs=1e-6)
    assert held.sparse == sparse
    assert held.facts["method"] == "u90"


def test_a_row_that_fails_is_told_with_what_it_said(tmp_path, images):
    rows = ("--rows", "cifar10_resnet18:u90", "--data", images, "--label", "large")
    result = reproduce(tmp_path, *rows, "--set", "batch_size=999")
    assert result.returncode == 1
    assert "cifar10_resnet18_u90_large_seed0: failed" in result.stdout
    assert "error: config." in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --rows, --pack or --unpack"),
        (["--rows", "cifar10_resnet18"], "--rows must be CONFIG:METHOD"),
        (["--rows", "cifar10_resnet18:u90"], "--rows needs --data"),
        (["--rows", "a:b", "--data", "x", "--set", "epochs=1"], "--set and --label belong"),
    ],
)
def test_what_is_asked_for_must_be_whole(tmp_path, arguments, message):
    result = reproduce(tmp_path, *arguments)
    assert result.returncode == 2
    assert message in result.stderr


def test_parts_are_small_and_damage_is_noticed(tmp_path, load):
    parts = load("parts")
    source = tmp_path / "file"
    source.write_bytes(np.random.default_rng(0).bytes(50_000))
    found = parts.pack({"a/b": source}, tmp_path / "parts", most_bytes=20_000)
    assert [path.stat().st_size <= 20_000 for path in found] == [True] * len(found)
    assert len(found) > 2
    parts.unpack(tmp_path / "parts", tmp_path / "to")
    assert (tmp_path / "to" / "a" / "b").read_bytes() == source.read_bytes()
    last = found[-1].read_bytes()
    found[-1].write_bytes(b"x" + last[1:])
    with pytest.raises(SystemExit, match="damaged"):
        parts.unpack(tmp_path / "parts", tmp_path / "to")
    found[-1].unlink()
    with pytest.raises(SystemExit, match=r"holds \d of \d parts"):
        parts.unpack(tmp_path / "parts", tmp_path / "to")
