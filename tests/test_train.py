"""The whole loop on the digits, in this process."""

import json
import math

import numpy as np
import pytest

from swat_jax import train
from swat_jax.errors import UsageError
from tests.runs import STREAM, digits, final_arrays

RESULT_KEYS = {
    "test_accuracy",
    "pruned_test_accuracy",
    "dense_master_accuracy",
    "final_loss",
    "weight_sparsity",
    "activation_sparsity",
    "dropped_activations",
    "training_flop_reduction",
    "seconds",
    "images_per_second",
    "versions",
    "device",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    config = digits(max_steps=66)  # three epochs; the program is that of other tests
    return workdir, config, train.train_and_evaluate(config, workdir)


def test_learns_and_leaves_its_files(finished):
    workdir, config, result = finished
    assert result["final_loss"] < 1.0
    assert result.keys() >= RESULT_KEYS
    assert json.loads((workdir / "result.json").read_text()).keys() == result.keys()
    assert json.loads((workdir / "config.json").read_text())["max_steps"] == 66
    assert list((workdir / "tensorboard").iterdir())
    scores = json.loads((workdir / "checkpoints" / "66" / "scores.json").read_text())
    assert scores["position"]["data"]["training images"] == 1437  # by which a resume knows them
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if x["kind"] == "eval"] == [22, 44, 66]
    assert lines[-1]["test_accuracy"] == result["pruned_test_accuracy"]
    # Nine tenths of all but the first conv, which is 216 of 172,824 weights.
    assert result["weight_sparsity"] == pytest.approx(0.9 * (1 - 216 / 172824), abs=1e-4)
    assert 0 < result["training_flop_reduction"] < 100
    assert "sparsity" in train.layer_table(config, result).lower()


def test_a_finished_run_is_scored_again_and_not_trained(finished):
    workdir, config, result = finished
    names = ("result.json", "metrics.jsonl")
    before = [(workdir / name).read_bytes() for name in names]
    assert train.train_and_evaluate(config, workdir) == result
    assert [(workdir / name).read_bytes() for name in names] == before


def test_another_config_is_refused_by_name(finished):
    workdir, _, _ = finished
    before = (workdir / "result.json").read_bytes()
    with pytest.raises(UsageError, match=r"config\.optimizer\.momentum"):
        train.train_and_evaluate(digits(max_steps=66, optimizer__momentum=0.5), workdir)
    assert (workdir / "result.json").read_bytes() == before


def test_many_steps_in_one_dispatch_are_the_same_steps(tmp_path):
    """A loop may be compiled otherwise: 1e-4 of the largest weight after four steps."""
    results = []
    for count in (1, 4):
        config = digits(max_steps=4, steps_per_dispatch=count)
        train.train_and_evaluate(config, tmp_path / str(count))
        results.append(final_arrays(tmp_path / str(count)))
    for name, value in results[0].items():
        if "params" in name:
            scale = max(np.abs(value).max(), 1e-2)
            assert np.abs(value - results[1][name]).max() <= 1e-4 * scale, name


@pytest.mark.parametrize("method", ["dense", "filter50"])
def test_other_methods_train(method, tmp_path):
    """SWAT-M, channels and ERK are in test_resume.py and test_interruption.py."""
    result = train.train_and_evaluate(digits(method, max_steps=3), tmp_path)
    assert result["steps"] == 3
    assert math.isfinite(result["final_loss"])
    assert (result["weight_sparsity"] == 0) == (method == "dense")


@pytest.mark.newest
def test_other_devices_go_on_with_new_thresholds(tmp_path, fake_devices):
    options = dict(STREAM)  # with one device the programs of test_resume.py
    train.train_and_evaluate(digits(max_steps=4, devices=1, **options), tmp_path)
    first = {k: v for k, v in final_arrays(tmp_path).items() if "activation_threshold'" in k}
    result = train.train_and_evaluate(digits(max_steps=5, devices=4, **options), tmp_path)
    second = {k: v for k, v in final_arrays(tmp_path).items() if "activation_threshold'" in k}
    assert result["steps"] == 5
    assert first.keys() == second.keys()
    # Step 4 is no refresh step: the thresholds are there because the old ones did not fit.
    assert {v.shape for v in first.values()} == {(1,)}
    assert {v.shape for v in second.values()} == {(4,)}
    assert all(np.all(v > 0) for v in second.values())


@pytest.mark.newest
def test_the_best_checkpoint_may_be_of_other_devices(tmp_path, fake_devices):
    """It is found after all training: a checkpoint that did not fit would leave no score at all."""
    options = STREAM | {"data__holdout": 0.2, "checkpoint__select": "best_holdout"}
    options |= {"sparsity__threshold_every_steps": 5, "checkpoint__every_steps": 0}
    train.train_and_evaluate(digits(max_steps=8, devices=4, **options), tmp_path)
    scores = tmp_path / "checkpoints" / "8" / "scores.json"
    saved = json.loads(scores.read_text())
    saved["metrics"]["holdout_accuracy"] = 1.1  # no later one can be better
    scores.write_text(json.dumps(saved))
    result = train.train_and_evaluate(digits(max_steps=10, devices=2, **options), tmp_path)
    assert result["steps"] == 8
    assert result["pruned_test_accuracy"] == saved["metrics"]["test_accuracy"]
    thresholds = {k: v for k, v in final_arrays(tmp_path).items() if "activation_threshold'" in k}
    assert {v.shape for v in thresholds.values()} == {(2,)}, "of the newest checkpoint"


def test_values_that_found_no_room_are_told_with_the_scores():
    names = ("test_accuracy", "weight_sparsity", "activation_sparsity", "training_flop_reduction")
    scores = dict.fromkeys(names, 0.5)
    assert "no room" not in train._epoch_line(3, {**scores, "dropped_activations": 0.0})
    line = train._epoch_line(3, {**scores, "dropped_activations": 12.0})
    assert line.endswith("  12 values to be saved found no room")
