"""A run that stops, by wish or by NaN, and what it leaves for the next one."""

import json
import re

import numpy as np
import pytest

from swat_jax import checkpoint, scoring, train
from swat_jax.errors import RunError, UsageError
from tests.runs import assert_same_bits, digits, final_arrays, newest_step

pytestmark = pytest.mark.newest


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_max_steps_stops_and_more_of_them_go_on_with_the_same_bits(tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    often = {"log__every_steps": 2}
    train.train_and_evaluate(digits(max_steps=24, **often), whole)
    first = train.train_and_evaluate(digits(max_steps=5, **often), halves)
    assert first["steps"] == 5
    assert [path.name for path in (halves / "checkpoints").iterdir()] == ["5"]
    early = final_arrays(halves)
    second = train.train_and_evaluate(digits(max_steps=24, **often), halves)  # into epoch 1
    assert second["steps"] == 24
    assert_same_bits(final_arrays(halves), final_arrays(whole))
    # Logs end where the first half did, and then go on every two steps; none comes twice.
    trained = [line["step"] for line in lines(halves) if line["kind"] == "train"]
    assert trained == sorted(set(trained))
    assert trained[:3] == [2, 4, 5]
    assert trained[-1] == 24
    # The seed alone decides: with another one nothing is the same.
    train.train_and_evaluate(digits(max_steps=5, seed=1, **often), tmp_path / "other")
    other = final_arrays(tmp_path / "other")
    kernels = [name for name in early if "kernel" in name]
    assert kernels
    assert not any(np.array_equal(early[name], other[name]) for name in kernels)


def test_what_goes_wrong_in_scoring_an_epoch_costs_no_training(tmp_path, monkeypatch):
    """At its start, and when the scores are in the log but not yet in the checkpoint."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    options = {"epochs": 3, "batch_size": 256, "log__every_steps": 3}
    config = digits("erk90", data__holdout=0.2, checkpoint__select="best_holdout", **options)
    expected = train.train_and_evaluate(config, whole)
    assert expected["weight_sparsity"] == pytest.approx(0.9, abs=1e-3)
    scores = [line for line in lines(whole) if line["kind"] == "eval"]
    best = max(scores, key=lambda line: line["holdout_accuracy"])
    assert expected["steps"] == best["step"]
    assert expected["pruned_test_accuracy"] == best["test_accuracy"]

    advance, starts = train.Resident.advance, []

    def counted(self, state, done):
        starts.append(done)
        return advance(self, state, done)

    monkeypatch.setattr(train.Resident, "advance", counted)
    steps_per_epoch = 4  # of the 1,150 images that are not held out
    for owner, name in ((scoring, "evaluate"), (checkpoint.Checkpointer, "score")):
        with monkeypatch.context() as patch:
            # The second epoch's, or the first one of the run that goes on from there.
            patch.setattr(owner, name, failing(getattr(owner, name), starts, 2 * steps_per_epoch))
            with pytest.raises(UsageError, match=r"^test/7\.jpg: cannot be read$"):
                train.train_and_evaluate(config, broken)
        assert newest_step(broken) == 2 * steps_per_epoch
        assert not (broken / "result.json").exists()
    result = train.train_and_evaluate(config, broken)

    assert starts == list(range(3 * steps_per_epoch)), "an epoch was trained twice, or not at all"
    assert_same_bits(final_arrays(broken), final_arrays(whole))
    assert (broken / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    timed = {"seconds", "images_per_second"}
    assert {k: v for k, v in result.items() if k not in timed} == {
        k: v for k, v in expected.items() if k not in timed
    }


def test_whatever_may_be_the_best_is_saved(tmp_path):
    """Scores of an epoch that was not saved would choose nothing."""
    options = {"epochs": 3, "data__holdout": 0.2, "checkpoint__select": "best_holdout"}
    options |= {"batch_size": 256, "log__every_steps": 3, "checkpoint__keep": 9}
    options |= {"eval__every_epochs": 2, "checkpoint__every_epochs": 3}
    train.train_and_evaluate(digits("erk90", **options), tmp_path)
    scored = [line["step"] for line in lines(tmp_path) if line["kind"] == "eval"]
    assert scored == [8, 12]
    assert {int(path.name) for path in (tmp_path / "checkpoints").iterdir()} == {8, 12}


def failing(function, starts, done):
    def fails_at(*arguments, **options):
        if len(starts) >= done:
            raise UsageError("test/7.jpg: cannot be read")
        return function(*arguments, **options)

    return fails_at


def test_a_run_that_diverges_names_the_step_and_keeps_a_good_checkpoint(tmp_path):
    """Saved after every step, the update that makes weights NaN under a finite loss is seen too."""
    changes = {
        "optimizer__learning_rate": 1e6,
        "log__every_steps": 1,
        "checkpoint__every_steps": 1,
        "epochs": 2,
    }
    with pytest.raises(RunError) as caught:
        train.train_and_evaluate(digits("channel70", **changes), tmp_path)
    found = re.fullmatch(
        r"(the loss is nan at|the weights are not finite after) step (\d+); "
        r"the checkpoint of step (\d+) is kept; lower config\.optimizer\.learning_rate, .*",
        str(caught.value),
    )
    assert found, caught.value
    broken, kept = int(found[2]), int(found[3])
    assert kept == broken - 1 == newest_step(tmp_path)
    floats = [x for x in final_arrays(tmp_path).values() if np.issubdtype(x.dtype, np.floating)]
    assert floats
    assert all(np.isfinite(value).all() for value in floats)
    assert not (tmp_path / "result.json").exists()
    # Every step whose loss is finite has its line.
    trained = [line for line in lines(tmp_path) if line["kind"] == "train"]
    assert [line["step"] for line in trained][:kept] == list(range(1, broken))
    assert all(line["loss"] is not None for line in trained)
