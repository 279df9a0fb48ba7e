"""Checkpoints come back bit for bit, whatever happened while they were written."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from swat_jax import checkpoint
from swat_jax.checkpoint import Checkpointer
from swat_jax.errors import RunError, UsageError
from swat_jax.same_run import check_same_run

CONFIG = {"seed": 0, "data": {"mean": (0.5, 0.25), "workers": 2}}


def open_checkpoints(directory, **kwargs):
    return Checkpointer(directory, **{"config": CONFIG, **kwargs})


def host_state(step):
    """Every kind of value that training keeps; a function of the step alone."""
    draw = np.random.default_rng(step)
    floats = draw.normal(size=(64, 33)).astype(np.float32)
    floats[0, :6] = [np.nan, -np.nan, np.inf, -np.inf, -0.0, 1e-45]
    return {
        "params": {
            "stem": {"kernel": floats},
            # Numbers for keys, as the lists of an NNX network have.
            "blocks": {n: {"kernel": draw.normal(size=(9, n + 1))} for n in range(12)},
        },
        "half": {
            "bfloat16": draw.normal(size=7).astype(ml_dtypes.bfloat16),
            "float16": draw.normal(size=7).astype(np.float16),
            "negative_zeros": -np.zeros(5, np.float32),
        },
        "counts": {"weight_keep": np.uint32(2**32 - 1 - step), "step": np.int32(step)},
        "flags": np.array([True, False]),
        "empty": {},
    }


def device_state(step):
    return jax.tree.map(jnp.asarray, host_state(step))


def assert_same_bits(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), e in zip(
        jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        a, e = np.asarray(a), np.asarray(e)
        assert (a.dtype, a.shape) == (e.dtype, e.shape), path
        assert a.tobytes() == e.tobytes(), path


@pytest.fixture(scope="module")
def optimizer_state():
    weights = {"conv": {"kernel": jnp.ones((2, 3))}}
    transform = optax.chain(optax.trace(0.9), optax.scale_by_learning_rate(lambda step: 0.1))
    _, state = transform.update(weights, transform.init(weights))
    return state


def test_round_trip_is_bit_for_bit(tmp_path, optimizer_state):
    state = {
        **device_state(3),
        "optimizer": optimizer_state,
        "rng": jax.random.key_data(jax.random.key(5)),
    }
    position = {"epoch": 2, "step_in_epoch": 17}
    with open_checkpoints(tmp_path / "deep" / "checkpoints") as checkpoints:
        assert checkpoints.restore(state) is None
        assert not (tmp_path / "deep").exists()
        assert checkpoints.save(300, state, position)
    # Another process would come with shapes only.
    template = jax.eval_shape(lambda: state)
    with open_checkpoints(tmp_path / "deep" / "checkpoints") as checkpoints:
        restored = checkpoints.restore(template)
    assert restored is not None
    assert_same_bits(restored.state, state)
    assert restored.position == position
    assert (restored.step, restored.metrics, restored.refreshed) == (300, {}, ())


def test_keeps_the_newest(tmp_path):
    with open_checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (5, 9, 10, 100):
            checkpoints.save(step, {"x": jnp.float32(step)}, {})
        assert checkpoints.steps() == [10, 100]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "100"]
        restored = checkpoints.restore({"x": jnp.float32(0)})
    assert restored is not None
    assert (restored.step, float(restored.state["x"])) == (100, 100.0)


def test_a_step_is_saved_once(tmp_path):
    with open_checkpoints(tmp_path) as checkpoints:
        assert checkpoints.save(1, {"x": jnp.float32(1)}, {"first": True})
        assert not checkpoints.save(1, {"x": jnp.float32(2)}, {})
        restored = checkpoints.restore({"x": jnp.float32(0)})
    assert restored is not None
    assert (float(restored.state["x"]), restored.position) == (1.0, {"first": True})


def test_scores_come_after_the_checkpoint(tmp_path, monkeypatch):
    state = {"x": jnp.float32(1)}
    with open_checkpoints(tmp_path) as checkpoints:
        assert not checkpoints.score(1, {}, {"loss": 0.5})
        assert not list(tmp_path.iterdir())
        checkpoints.save(1, state, {"seconds": 1})
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", no_space)
            with pytest.raises(RunError, match=r"cannot write .*: No space left .* is intact"):
                checkpoints.score(1, {"seconds": 2}, {"loss": 0.5})
        without = checkpoints.restore(state)
        assert checkpoints.score(1, {"seconds": 2}, {"loss": jnp.float32(0.5)})
        scored = checkpoints.restore(state)
        (tmp_path / "1" / "scores.json").write_text("{")
        with pytest.raises(RunError, match=r"cannot read the checkpoint .*/1: JSONDecodeError"):
            checkpoints.restore(state)
    assert without is not None
    assert scored is not None
    assert (without.position, without.metrics) == ({"seconds": 1}, {})
    assert (scored.position, scored.metrics) == ({"seconds": 2}, {"loss": 0.5})
    assert_same_bits(scored.state, state)


def no_space(_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_best_by_a_metric_stays(tmp_path):
    accuracies = {1: 0.5, 2: 0.9, 3: None, 4: float("nan"), 5: 0.9, 6: 0.7}
    with open_checkpoints(tmp_path, best_metric="holdout_accuracy") as checkpoints:
        assert checkpoints.restore({"x": jnp.float32(0)}, best=True) is None
        for step, accuracy in accuracies.items():
            checkpoints.save(step, {"x": jnp.float32(step)}, {})
            if accuracy is not None:
                # Until it is scored, the best one so far and the newest are there.
                assert checkpoints.steps() == sorted({min(max(step - 1, 1), 2), step})
                checkpoints.score(step, {}, {"holdout_accuracy": accuracy, "loss": 1.0})
        assert checkpoints.steps() == [2, 6]
        best = checkpoints.restore({"x": jnp.float32(0)}, best=True)
        last = checkpoints.restore({"x": jnp.float32(0)})
    assert best is not None
    assert last is not None
    assert (best.step, best.metrics["holdout_accuracy"]) == (2, 0.9)
    assert last.step == 6


def on_mesh(devices, spec):
    mesh = Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, spec)


@pytest.mark.parametrize(("before", "after"), [(4, 1), (1, 4), (4, 2), (2, 4)])
def test_restores_onto_another_number_of_devices(tmp_path, fake_devices, before, after):
    values = device_state(1)["params"]
    sharded = np.arange(24, dtype=np.float32).reshape(8, 3)
    replicated = on_mesh(fake_devices[:before], PartitionSpec())
    split = on_mesh(fake_devices[:before], PartitionSpec("data"))
    state = {"params": jax.device_put(values, replicated), "x": jax.device_put(sharded, split)}
    template = jax.tree.map(
        lambda leaf, spec: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=on_mesh(fake_devices[:after], spec)
        ),
        state,
        {"params": jax.tree.map(lambda _: PartitionSpec(), values), "x": PartitionSpec("data")},
    )
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        restored = checkpoints.restore(template)
    assert restored is not None
    assert_same_bits(restored.state, {"params": values, "x": sharded})
    for leaf, wanted in zip(
        jax.tree.leaves(restored.state), jax.tree.leaves(template), strict=True
    ):
        assert leaf.sharding == wanted.sharding


def test_thresholds_of_another_number_of_devices_are_refreshed(tmp_path, fake_devices):
    def state_on(count, fill):
        split = on_mesh(fake_devices[:count], PartitionSpec("data"))
        whole = on_mesh(fake_devices[:count], PartitionSpec())
        return {
            "params": {"w": jax.device_put(jnp.full(3, fill), whole)},
            "thresholds": {
                "conv": {"activation": jax.device_put(jnp.full((count, 1), fill), split)}
            },
        }

    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state_on(4, 1.0), {})
        same = checkpoints.restore(state_on(4, 0.0), refresh=("thresholds",))
        other = checkpoints.restore(state_on(2, 0.0), refresh=("thresholds",))
        with pytest.raises(UsageError, match=r"thresholds/conv/activation is float32\[2,1\], was"):
            checkpoints.restore(state_on(2, 0.0))
    assert same is not None
    assert other is not None
    assert same.refreshed == ()
    assert_same_bits(same.state, state_on(4, 1.0))
    assert other.refreshed == ("thresholds",)
    assert_same_bits(
        other.state, {**state_on(2, 1.0), "thresholds": state_on(2, 0.0)["thresholds"]}
    )


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ({"w": np.zeros((3, 2), np.float32)}, r"w is float32\[3,2\], was float32\[2,3\]"),
        ({"w": np.zeros((2, 3), np.float16)}, r"w is float16\[2,3\], was float32\[2,3\]"),
        ({}, r"w is absent, was float32\[2,3\]"),
        ({"w": np.zeros((2, 3), np.float32), "b": np.zeros(1)}, r"b is float64\[1\], was absent"),
    ],
)
def test_another_network_is_refused(tmp_path, template, message):
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"w": jnp.zeros((2, 3))}, {})
        with pytest.raises(UsageError, match=message):
            checkpoints.restore(template)


def test_another_config_is_refused(tmp_path):
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"w": jnp.zeros(3)}, {})
    with (
        open_checkpoints(tmp_path, config={**CONFIG, "seed": 1}) as checkpoints,
        pytest.raises(
            UsageError, match=r"checkpoint .*/1 is of another run: config\.seed is 1, was 0"
        ),
    ):
        checkpoints.restore({"w": jnp.zeros(3)})


def test_check_same_run_names_every_difference():
    saved = {
        "seed": 0,
        "optimizer": {"learning_rate": 0.1, "schedule": {"milestones": (50, 100)}},
        "gone": None,
        "log": {"every_steps": 50},
        "data": {"data_dir": "/a", "name": "cifar10", "workers": 0},
        "devices": None,
    }
    config = {
        "seed": 0,
        "optimizer": {"learning_rate": 0.2, "schedule": {"milestones": [50, 120]}},
        "new": True,
        "log": {"every_steps": 1},
        "data": {"data_dir": "/b", "name": "cifar100", "workers": 8},
        "devices": 4,
        "checkpoint": {"keep": 3},
    }
    with pytest.raises(UsageError) as caught:
        check_same_run(saved, config, where="the checkpoint in w")
    assert str(caught.value) == (
        "the checkpoint in w is of another run: "
        "config.data.name is 'cifar100', was 'cifar10'; "
        "config.gone is absent, was None; "
        "config.new is True, was absent; "
        "config.optimizer.learning_rate is 0.2, was 0.1; "
        "config.optimizer.schedule.milestones is [50, 120], was [50, 100]; "
        "use another --workdir, or the values that were"
    )
    check_same_run(saved, saved)
    # A tuple is a list once it has been through JSON; that is no difference.
    check_same_run(json.loads(json.dumps(saved)), saved)


def test_keep_must_be_positive(tmp_path):
    with pytest.raises(UsageError, match=r"config\.checkpoint\.keep is 0; keep at least 1"):
        open_checkpoints(tmp_path, keep=0)


def test_damage_is_reported_in_one_line(tmp_path):
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"w": jnp.zeros(3)}, {})
        shutil.rmtree(tmp_path / "1" / "state")
        with pytest.raises(
            RunError, match=r"cannot read the checkpoint .*/1: .*delete that"
        ) as caught:
            checkpoints.restore({"w": jnp.zeros(3)})
    assert "\n" not in str(caught.value)


def test_leftovers_are_ignored_and_swept(tmp_path):
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"w": jnp.zeros(3)}, {})
        for leftover in ("7.orbax-checkpoint-tmp", "7.orbax-checkpoint-tmp-3", "trash-0"):
            shutil.copytree(tmp_path / "1", tmp_path / leftover)
        assert checkpoints.steps() == [1]
        checkpoints.save(2, {"w": jnp.zeros(3)}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["2"]


def run_saver(directory, *arguments, **popen):
    """This file as a program; its output is what `__main__` prints."""
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "tests.test_checkpoint", str(directory), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
        **popen,
    )


def save_forever(directory):
    """Saves as fast as it can and says so after each; goes on from what it finds."""
    with open_checkpoints(directory) as checkpoints:
        restored = checkpoints.restore(device_state(0))
        step = restored.step if restored else 0
        while True:
            step += 1
            checkpoints.save(step, device_state(step), {"step": step})
            print(step, flush=True)


def test_survives_kill_dash_nine_at_any_moment(tmp_path):
    draw = random.Random(0)
    last, unfinished = 0, 0
    for kill in range(5):
        with run_saver(tmp_path) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            said = [int(process.stdout.readline())]  # from here on it only saves
            time.sleep(draw.uniform(0, 0.3))
            process.kill()
            said += [int(line) for line in process.stdout.read().splitlines()]
            assert process.stderr.read() == ""
        assert said == list(range(last + 1, last + 1 + len(said))), "did not go on from the newest"
        unfinished += any("-" in path.name for path in tmp_path.iterdir())

        with open_checkpoints(tmp_path) as checkpoints:
            restored = checkpoints.restore(device_state(0))
        assert restored is not None
        # Complete without being announced is fine, announced without being complete is not.
        assert restored.step in (said[-1], said[-1] + 1), kill
        assert restored.position == {"step": restored.step}
        assert_same_bits(restored.state, device_state(restored.step))
        last = restored.step
    assert unfinished, "no kill came in the middle of a save: this test showed nothing"


def save_without_room(directory, limit):
    """What the file system refuses: any file longer than `limit` bytes."""
    import resource

    with open_checkpoints(directory) as checkpoints:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
        try:
            checkpoints.save(2, device_state(2), {})
        except RunError as error:
            print(error)


@pytest.mark.parametrize("limit", [3000, 100])
def test_write_error_leaves_earlier_checkpoints(tmp_path, limit):
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, device_state(1), {})
    with run_saver(tmp_path, str(limit)) as process:
        output, errors = process.communicate()
    assert output, errors
    assert output == (
        f"cannot save the checkpoint of step 2 in {tmp_path}: File too large; "
        "earlier checkpoints are intact: make room there and run again\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    with open_checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(device_state(0))
        assert restored is not None
        assert_same_bits(restored.state, device_state(1))
        assert checkpoints.save(2, device_state(2), {})


def test_full_disk_is_noticed_beforehand(tmp_path, monkeypatch):
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"w": jnp.zeros(2**18)}, {})
        usage = shutil.disk_usage(tmp_path)._replace(free=2**19)
        monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage)
        with pytest.raises(RunError, match=r"it needs 1\.0 MiB and 0\.5 MiB are free; earlier"):
            checkpoints.save(2, {"w": jnp.zeros(2**18)}, {})
        assert checkpoints.steps() == [1]


def test_unwritable_place_is_a_run_error(tmp_path):
    (tmp_path / "file").write_text("not a directory")
    with (
        open_checkpoints(tmp_path / "file" / "checkpoints") as checkpoints,
        pytest.raises(RunError, match=r"step 1 in .*/file/checkpoints: Not a directory"),
    ):
        checkpoints.save(1, {"w": jnp.zeros(3)}, {})


if __name__ == "__main__":
    if len(sys.argv) > 2:
        save_without_room(*sys.argv[1:])
    else:
        save_forever(sys.argv[1])
