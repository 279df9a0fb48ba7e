"""Metrics files after kills and resumes, event files read byte by byte, and what is on screen."""

import contextlib
import json
import os
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from swat_jax import metrics
from swat_jax.errors import RunError
from swat_jax.metrics import LayerRow, MetricsWriter, Progress, write_json


def read_lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def read_events(workdir):
    """TFRecord framing: length (8 bytes), its checksum (4), the event, its checksum (4)."""
    parse = event_pb2.Event.FromString
    events = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            events.append(parse(data[12 : 12 + length]))
            data = data[16 + length :]
    return events


def read_scalars(workdir):
    return [
        (event.step, value.tag, value.simple_value)
        for event in read_events(workdir)
        for value in event.summary.value
    ]


def test_lines_and_events_agree(tmp_path):
    workdir = tmp_path / "deep" / "run"
    with MetricsWriter(workdir) as writer:
        writer.write(10, {"loss": 0.5, "accuracy": np.float32(0.25)})
        assert len(read_lines(workdir)) == 1, "a killed run would lose this line"
        writer.write(20, {"accuracy": jnp.bfloat16(0.75)}, kind="eval")
    assert read_lines(workdir) == [
        {"step": 10, "kind": "train", "loss": 0.5, "accuracy": 0.25},
        {"step": 20, "kind": "eval", "accuracy": 0.75},
    ]
    assert read_scalars(workdir) == [
        (10, "train/loss", 0.5),
        (10, "train/accuracy", 0.25),
        (20, "eval/accuracy", 0.75),
    ]


def test_not_finite_is_null(tmp_path, caplog):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": float("nan"), "rate": float("inf"), "accuracy": 0.5})
    (line,) = read_lines(tmp_path)
    assert line == {"step": 1, "kind": "train", "loss": None, "rate": None, "accuracy": 0.5}
    assert read_scalars(tmp_path) == [(1, "train/accuracy", 0.5)]
    assert not caplog.records


def test_a_resumed_run_repeats_nothing(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in (1, 2, 3, 4):
            writer.write(step, {"loss": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "kind": "tr')  # killed while writing
    with MetricsWriter(tmp_path) as writer:
        writer.truncate(2)
        assert [line["step"] for line in read_lines(tmp_path)] == [1, 2]
        for step in (3, 4):
            writer.write(step, {"loss": 10 * step})
    assert [(line["step"], line["loss"]) for line in read_lines(tmp_path)] == [
        (1, 1.0),
        (2, 2.0),
        (3, 30.0),
        (4, 40.0),
    ]
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl", "tensorboard"]
    # TensorBoard hides whatever an earlier file says from this step on.
    starts = [e.step for e in read_events(tmp_path) if e.session_log.status == e.session_log.START]
    assert starts == [3]


@pytest.mark.parametrize("scored", [True, False])
def test_scores_that_will_come_again_are_dropped(tmp_path, scored):
    with MetricsWriter(tmp_path) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"loss": 1.0})
            writer.write(step, {"accuracy": 0.5}, kind="eval")
        writer.truncate(2, scored=scored)
    kept = [(line["step"], line["kind"]) for line in read_lines(tmp_path)]
    scores_of_2 = [(2, "eval")] if scored else []
    assert kept == [(1, "train"), (1, "eval"), (2, "train"), *scores_of_2]


def test_truncate_of_a_new_run_is_harmless(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.truncate(0)
        writer.write(1, {"loss": 1.0})
    assert len(read_lines(tmp_path)) == 1


def test_write_json_takes_what_results_are_made_of(tmp_path):
    value = {
        "mean": (0.5, np.float32(0.25)),
        "count": np.int64(3),
        "flag": np.bool_(True),
        "jax": jnp.float32(1.5),
        "bfloat16": jnp.bfloat16(2.5),
        "nan": np.float64("nan"),
        "none": None,
        "path": tmp_path,
        "text": "\u00e9",
        7: [1, "two"],
    }
    write_json(tmp_path / "new" / "result.json", value)
    assert json.loads((tmp_path / "new" / "result.json").read_text()) == {
        "mean": [0.5, 0.25],
        "count": 3,
        "flag": True,
        "jax": 1.5,
        "bfloat16": 2.5,
        "nan": None,
        "none": None,
        "path": str(tmp_path),
        "text": "\u00e9",
        "7": [1, "two"],
    }
    with pytest.raises(TypeError, match="cannot write ndarray as JSON"):
        write_json(tmp_path / "result.json", {"x": np.ones(2)})
    with pytest.raises(TypeError, match="cannot write object as JSON"):
        write_json(tmp_path / "result.json", object())


def no_space(*args, **kwargs):
    raise OSError(28, "No space left on device")


def test_full_disk_is_one_line_and_spares_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    write_json(path, {"old": 1})
    writer = MetricsWriter(tmp_path)
    writer.write(1, {"loss": 1.0})
    monkeypatch.setattr(os, "fsync", no_space)
    for action in (lambda: write_json(path, {"new": 2}), lambda: writer.truncate(0)):
        with pytest.raises(RunError, match=r"cannot write .*: No space left on device; make room"):
            action()
    with pytest.raises(RunError, match=r"cannot write .*tensorboard: No space left on device"):
        writer.close()
    assert json.loads(path.read_text()) == {"old": 1}
    assert len(read_lines(tmp_path)) == 1


def test_unwritable_workdir_is_a_run_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot write .*/file/metrics\.jsonl: "):
        MetricsWriter(tmp_path / "file")


class Clock:
    """A clock that the test moves."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(metrics.time, "monotonic", lambda: self.now)


def test_plain_progress_is_rate_limited(tmp_path, monkeypatch):
    """The rate is what the loop says; the time that is left goes by the clock."""
    monkeypatch.setenv("FORCE_COLOR", "1")  # makes no terminal of a file
    clock = Clock(monkeypatch)
    with (
        (tmp_path / "log").open("w") as stream,
        Progress(100, 20, steps_per_epoch=40, stream=stream, interval=10) as progress,
    ):
        for step in range(22, 101, 2):
            progress.update(step, loss=2 - step / 100, accuracy=step / 100, rate=128.0 + step)
            clock.now += 1.0
        progress.message("saved [100]")
    assert (tmp_path / "log").read_text().splitlines() == [
        "epoch 1/3  step 22/100  loss 1.7800  accuracy 22.0%",
        "epoch 2/3  step 42/100  loss 1.5800  accuracy 42.0%  170 images/s  0:29 left",
        "epoch 2/3  step 62/100  loss 1.3800  accuracy 62.0%  190 images/s  0:19 left",
        "epoch 3/3  step 82/100  loss 1.1800  accuracy 82.0%  210 images/s  0:09 left",
        "epoch 3/3  step 100/100  loss 1.0000  accuracy 100.0%  228 images/s  0:00 left",
        "saved [100]",
    ]


def test_first_compilation_leaves_the_time_that_is_left(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    with (tmp_path / "log").open("w") as stream:
        progress = Progress(100, stream=stream, interval=0)
        for step in range(1, 41):
            progress.update(step, loss=0.0, accuracy=0.0, rate=20.0)
            clock.now += 60.0 if step == 1 else 0.5
    assert (tmp_path / "log").read_text().endswith("20 images/s  0:30 left\n")


def test_bar_on_a_terminal_fits_80_columns(monkeypatch):
    clock = Clock(monkeypatch)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    master, slave = os.openpty()
    with (
        os.fdopen(slave, "w", encoding="utf-8") as terminal,
        Progress(45_000, steps_per_epoch=500, stream=terminal) as progress,
    ):
        for step in (100, 200, 300):
            progress.update(step, loss=6.9, accuracy=0.001, rate=1024.0)
            clock.now += 25.0
        progress.message("a line above the bar")
    output = b""
    with contextlib.suppress(OSError), os.fdopen(master, "rb", buffering=0) as screen:
        while chunk := screen.read(4096):  # ends in an error, since nobody holds the other end
            output += chunk
    output = output.decode()
    assert "epoch 1/90  loss 6.9000  acc 0.1%  1,024 img/s  3:06:15 left" in output
    assert "\u2501" in output or "\u2578" in output, "no bar was drawn"
    assert "a line above the bar" in output
    assert "\u2026" not in output, "the line was cut"


def words(line):
    """The cells, however wide the columns are."""
    return " ".join(line.split())


def test_layer_table():
    text = metrics.layer_table(
        [
            LayerRow("stem", (3, 3, 3, 64), 0.0, 0.0, 0.0, None),
            LayerRow("stage1/0/conv1", (3, 3, 64, 64), 0.9, 0.9, 0.9, 0.93456),
        ]
    )
    title, head, rule, stem, conv, total = text.splitlines()
    assert title == "Sparsity by layer"
    assert head.split("  ")[1:2] == ["layer"]
    assert set(rule.strip()) == {"\u2500"}
    assert words(stem) == "stem 3x3x3x64 1,728 0.00 % 0.00 % 0.00 % -"
    assert words(conv) == "stage1/0/conv1 3x3x64x64 36,864 90.00 % 90.00 % 90.00 % 93.46 %"
    # By weights: 0.9 * 36864 / 38592; how large the activations are is not in the rows.
    assert words(total) == "all 38,592 85.97 % 85.97 % - -"


def test_final_table_has_a_column_for_each_run():
    text = metrics.final_table(
        {
            "u90": {
                "test_accuracy": 0.98,
                "final_loss": 0.1234,
                "training_flop_reduction": 89.84,
                "seconds": 3723.4,
            },
            "dense": {"test_accuracy": 0.9925, "images_per_second": 12345.6, "seconds": None},
        },
        title="Digits",
    )
    lines = text.splitlines()
    assert lines[0] == "Digits"
    assert lines[1].split() == ["u90", "dense"]
    assert [words(line) for line in lines[3:]] == [
        "test accuracy, masked 98.00 % 99.25 %",
        "final loss 0.1234 -",
        "training FLOP reduction 89.8 % -",
        "time 1:02:03 -",
        "images per second - 12,346",
    ]


@pytest.mark.parametrize(
    ("rate", "text"),
    [(12345.6, "12,346"), (10.4, "10"), (9.96, "10"), (7.44, "7.4"), (0.7406, "0.74")],
)
def test_a_low_rate_keeps_two_digits(rate, text):
    assert metrics.format_rate(rate) == text


def test_tables_do_not_wrap_or_read_markup():
    long = "[bold]" + "x" * 300
    assert long in metrics.table("t", ("a", "b"), [(long, "1")])


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.6, "1:00"), (760, "12:40"), (11229, "3:07:09"), (-3, "0:00")],
)
def test_format_seconds(seconds, text):
    assert metrics.format_seconds(seconds) == text
