"""Wrong commands, configs, data and workdirs, through the command line.

Each ends in one line that names what is wrong, what was given and what to do; exit code 2, or 1
where the run itself had to stop; and what was on the disk before is still there, byte for byte.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from swat_jax import checkpoint, data, data_parallel, main, metrics, train, training_setup
from tests.data.configs import encode, random_images
from tests.runs import ROOT, digits

DIGITS = "--config=configs/digits.py"
CIFAR = "--config=configs/cifar10_resnet18.py"

# Flags that are wrong whatever the data are -> what the message says.
WRONG_CONFIG = {
    "batch_size=0": ["config.batch_size", "0", ">= 1"],
    "batch_size=63": ["config.batch_size", "63", "divisible by the 4 devices", "config.devices"],
    "batch_size=1.5": ["--config.batch_size=1.5", "int"],
    "checkpoint.every_steps=-1": ["config.checkpoint.every_steps", "-1", ">= 0"],
    "checkpoint.keep=0": ["config.checkpoint.keep", "0", ">= 1"],
    "checkpoint.select=best": ["config.checkpoint.select", "'best'", "'last' or 'best_holdout'"],
    "checkpoint.select=best_holdout": ["config.checkpoint.select", "config.data.holdout above 0"],
    "data.on_device=perhaps": ["--config.data.on_device=perhaps"],
    "devices=0": ["config.devices", "got 0", ">= 1"],
    "devices=9": ["config.devices", "got 9", "between 1 and the 4 devices"],
    "epochs=0": ["config.epochs", "got 0", ">= 1"],
    "eval.batch_size=0": ["config.eval.batch_size", "got 0", ">= 1"],
    "eval.every_epochs=0": ["config.eval.every_epochs", "got 0", ">= 1"],
    "label_smoothing=1.5": ["config.label_smoothing", "1.5", "[0, 1)"],
    "label_smoothing=nan": ["config.label_smoothing", "nan", "[0, 1)"],
    "log.every_steps=0": ["config.log.every_steps", "got 0", ">= 1"],
    "max_steps=0": ["config.max_steps", "got 0", ">= 1"],
    "model.dropout_rate=0.5": ["config.model.dropout_rate", "resnet8 has no dropout", "unset"],
    "model.name=resnet9": ["config.model.name", "'resnet9'", "known: resnet8, vgg11"],
    "model.name=wrn16_8 model.dropout_rate=1": ["config.model.dropout_rate", "1.0", "[0, 1)"],
    "nosuch=1": ["unknown key config.nosuch", "config has: batch_size"],
    "optimizer.learning_rate=-1": ["config.optimizer.learning_rate", "-1.0", "above 0"],
    "optimizer.learning_rate=nan": ["config.optimizer.learning_rate", "nan", "above 0"],
    "optimizer.momentum=0 optimizer.nesterov=True": ["config.optimizer.nesterov", "momentum"],
    "optimizer.momentum=1.5": ["config.optimizer.momentum", "1.5", "below 1"],
    "optimizer.schedule.name=cos": ["config.optimizer.schedule.name", "'cos'", "cosine"],
    "optimizer.schedule.name=step optimizer.schedule.milestones=(5,3)": [
        *("config.optimizer.schedule.milestones", "(5, 3)", "rising"),
    ],
    "optimizer.schedule.warmup_epochs=20": ["warmup_epochs is 20", "20 epochs", "below 20"],
    "optimizer.weight_decay=-1": ["config.optimizer.weight_decay", "-1.0", "at least 0"],
    "precision=float16": ["config.precision", "'float16'", "float32, bfloat16"],
    "sparsity.activation=nan": ["config.sparsity.activation", "nan", "[0, 1)"],
    "sparsity.distribution=dense": ["config.sparsity.weight", "0.9", "FILE:dense"],
    "sparsity.distribution=erk": ["first_layer_dense must be False", "erk", "True"],
    "sparsity.distribution=momentum": ["first_layer_dense must be False", "momentum", "True"],
    "sparsity.distribution=zipf": ["config.sparsity.distribution", "'zipf'", "uniform, erk"],
    "sparsity.exact_epochs=-1": ["config.sparsity.exact_epochs", "-1", ">= 0"],
    "sparsity.granularity=row": ["config.sparsity.granularity", "'row'", "channel, filter"],
    "sparsity.method=m90": ["--config.sparsity.method", "--config FILE:METHOD"],
    "sparsity.threshold_every_steps=0": ["config.sparsity.threshold_every_steps", "got 0", ">= 1"],
    "sparsity.weight=-0.1": ["config.sparsity.weight", "-0.1", "[0, 1)"],
    "sparsity.weight=1.0": ["config.sparsity.weight", "1.0", "[0, 1)", "keep nothing"],
    "sparsity.weight=x": ["--config.sparsity.weight=x", "float"],
    "steps_per_dispatch=0": ["config.steps_per_dispatch", "got 0", ">= 1"],
}

# Flags that are wrong for the digits.
WRONG_FOR_DATA = {
    "batch_size=2000": ["config.batch_size", "2000", "at most the 1437 training images"],
    "data.augmentation=blur": ["config.data.augmentation", "'blur'", "none, crop_flip, shift"],
    "data.holdout=0.99": ["config.batch_size", "64", "14 training images"],
    "data.holdout=1.5": ["config.data.holdout", "1.5", "[0, 1)"],
    "data.image_size=16": ["config.data.image_size", "got 16", "8x8"],
    "data.mean=(0.1,0.2)": ["config.data.mean", "(0.1, 0.2)", "1 number (grey images) or 3"],
    "data.source=imagenet": ["config.data.source", "'imagenet'", "digits, tfds, folder, npz"],
    "data.source=npz": ["config.data.data_dir", "'npz'", "--config.data.data_dir=PATH"],
    "data.std=(0.0,)": ["config.data.std", "(0.0,)", "positive"],
    "data.workers=-1": ["config.data.workers", "-1", "at least 0"],
    "model.name=vgg16": ["8x8", "at least 32x32", "config.data.image_size", "resnet8"],
    "seed=-1": ["config.seed", "-1", ">= 0"],
}


def overrides(text):
    return [f"--config.{part}" for part in text.split()]


def contents(folder):
    """All that is below a folder: the bytes of files, None for folders."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def refusal(capsys, tmp_path, monkeypatch):
    """Runs a command that must be refused; returns its message."""
    for feed in ("Resident", "Stream"):
        monkeypatch.setattr(getattr(train, feed), "advance", lambda *_: pytest.fail("it trains"))

    def run(*arguments, code=2, says=()):
        before = contents(tmp_path)
        returned = main.main(list(map(str, arguments)))
        output, errors = capsys.readouterr()
        assert returned == code, errors
        assert output == ""
        assert errors.startswith("error: ")
        assert errors.count("\n") == 1, errors
        for part in says:
            assert part in errors
        assert contents(tmp_path) == before
        return errors

    return run


@pytest.mark.parametrize("flags", WRONG_CONFIG)
def test_config_is_refused_before_data_are_opened(flags, refusal, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "load", lambda *_, **__: pytest.fail("data are opened"))
    workdir = f"--workdir={tmp_path / 'run'}"
    refusal(DIGITS, workdir, *overrides(flags), says=WRONG_CONFIG[flags])


@pytest.mark.parametrize("flags", WRONG_FOR_DATA)
def test_config_that_does_not_fit_the_data_is_refused(flags, refusal, tmp_path):
    workdir = f"--workdir={tmp_path / 'run'}"
    refusal(DIGITS, workdir, *overrides(flags), says=WRONG_FOR_DATA[flags])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], ["--config is missing", "configs/digits.py:u90"]),
        (["--workdir=RUN"], ["--config is missing"]),
        ([DIGITS], ["--workdir is missing", "give a folder"]),
        ([DIGITS, "--workdir="], ["--workdir is missing"]),
        ([f"{DIGITS}:u900", "--workdir=RUN"], ["method", "'u900'", "below 100"]),
        ([f"{DIGITS}:x90", "--workdir=RUN"], ["method", "'x90'", "'dense', or one of u, erk, m"]),
        (
            [f"{DIGITS}:m90", "--workdir=RUN", "--config.sparsity.granularity=channel"],
            ["config.sparsity.granularity", "'channel'", "unstructured with the distribution mom"],
        ),
        (["--config=configs/nosuch.py", "--workdir=RUN"], ["configs/nosuch.py", "--list"]),
        ([DIGITS, "--workdir=RUN", "u90"], ["unexpected argument 'u90'", "--"]),
        ([DIGITS, "--wrkdir=RUN"], ["wrkdir"]),
        ([DIGITS, "--workdir=RUN", "--distributed"], ["--distributed", "coordinator"]),
    ],
)
def test_command_line(arguments, says, refusal, tmp_path, monkeypatch):
    if "--distributed" in arguments:  # as JAX does where nothing says who the others are

        def initialize():
            raise ValueError("coordinator_address should be defined.")

        monkeypatch.setattr(main.jax.distributed, "initialize", initialize)
    refusal(*(text.replace("RUN", str(tmp_path / "run")) for text in arguments), says=says)


def test_list_outside_the_repository(refusal, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refusal("--list", says=["no config files in 'configs'", "run from the project's root"])


def test_unknown_backend(refusal, tmp_path, monkeypatch):
    monkeypatch.setenv("SWAT_JAX_BACKEND", "nonsense")
    refusal(DIGITS, f"--workdir={tmp_path}", says=["SWAT_JAX_BACKEND", "'nonsense'", "xla"])


def test_config_file_with_an_unknown_key(refusal, tmp_path):
    text = (ROOT / "configs/digits.py").read_text()
    (tmp_path / "mine.py").write_text(text.replace("config.epochs = 20", "config.epoch = 20"))
    refusal(
        f"--config={tmp_path / 'mine.py'}", f"--workdir={tmp_path / 'run'}", says=["config.epoch"]
    )


# Data.


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], ["config.data.data_dir", "'tfds' needs it", "--config.data.data_dir=PATH"]),
        (["--config.data.data_dir=TMP/no"], ["config.data.data_dir", "nothing at 'TMP/no'"]),
        (
            ["--config.data.data_dir=TMP"],
            ["cifar10 is not prepared in TMP", "python -m swat_jax.data.prepare cifar10"],
        ),
        (
            ["--config.data.source=folder", "--config.data.data_dir=TMP"],
            ["config.data.data_dir", "TMP", "one folder of images per class"],
        ),
    ],
)
def test_data_that_are_not_there(flags, says, refusal, tmp_path):
    place = [text.replace("TMP", str(tmp_path)) for text in [*flags, *says]]
    refusal(CIFAR, f"--workdir={tmp_path / 'run'}", *place[: len(flags)], says=place[len(flags) :])


IMAGES = np.zeros((40, 8, 8, 1), np.uint8)
LABELS = np.arange(40) % 10


@pytest.mark.parametrize(
    ("replaced", "says"),
    [
        ({"train_images": IMAGES / 255}, ["train_images must be uint8", "float64"]),
        ({"train_images": IMAGES[0]}, ["train_labels must be (8,)", "(40,)"]),
        ({"train_images": IMAGES[..., [0, 0]]}, ["train_images must be (N, height, width", "2)"]),
        ({"train_labels": LABELS[1:]}, ["train_labels must be (40,)", "(39,)"]),
        ({"train_labels": LABELS / 2}, ["train_labels must be integers", "float64"]),
        ({"train_labels": LABELS - 1}, ["train_labels must count from 0", "-1"]),
        ({"train_labels": LABELS * 2}, ["no training image has label 1", "without gaps"]),
        ({"test_labels": LABELS + 1}, ["test labels go up to 10", "only to 9"]),
        ({"test_images": IMAGES[:, 1:]}, ["(8, 8, 1)", "(7, 8, 1)", "must be equal"]),
        ({"test_images": None}, ["must hold train_images", "it holds"]),
        ("garbage", ["cannot read"]),
    ],
)
def test_npz_file_with_the_wrong_arrays(replaced, says, refusal, tmp_path):
    path = tmp_path / "set.npz"
    if replaced == "garbage":
        path.write_bytes(b"PK\x03\x04 and no more")
    else:
        names = ("train_images", "train_labels", "test_images", "test_labels")
        arrays = dict(zip(names, (IMAGES, LABELS, IMAGES, LABELS), strict=True)) | replaced
        np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    refusal(
        *(DIGITS, f"--workdir={tmp_path / 'run'}", "--config.batch_size=8"),
        *("--config.data.source=npz", f"--config.data.data_dir={path}"),
        says=["config.data.data_dir", str(path), *says],
    )


@pytest.mark.parametrize("on_device", [True, False])
def test_an_unreadable_image_among_good_ones(on_device, tmp_path, capsys):
    good = encode(random_images(1)[0], ".png")
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            folder = tmp_path / "set" / split / name
            folder.mkdir(parents=True)
            for number in range(4):
                (folder / f"{number}.png").write_bytes(good)
    bad = tmp_path / "set/train/dog/2.png"
    bad.write_bytes(good[:20])
    code = main.main(
        [
            *(DIGITS, f"--workdir={tmp_path / 'run'}", "--config.devices=1"),
            *("--config.data.source=folder", f"--config.data.data_dir={tmp_path / 'set'}"),
            *("--config.data.mean=(0.5,0.5,0.5)", "--config.data.std=(0.2,0.2,0.2)"),
            *("--config.batch_size=8", f"--config.data.on_device={on_device}"),
        ]
    )
    output, errors = capsys.readouterr()
    *said, error = errors.splitlines()
    # Images that are read while training are missed after its start.
    assert (code, output, len(said)) == (2, "", 0 if on_device else 1)
    assert error.startswith(f"error: {bad}: ")
    assert "replace" in error
    assert not (tmp_path / "run/checkpoints").exists()


# Workdirs.


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """The workdir of a run with two checkpoints, as training leaves it."""
    workdir = tmp_path_factory.mktemp("started") / "run"
    config = digits("dense", checkpoint__keep=2)
    _, make_state = training_setup.make_trainer(
        config, data.load(config).info, data_parallel.make_mesh(1)
    )
    state = make_state()
    metrics.write_json(workdir / "config.json", config.to_dict())
    (workdir / "metrics.jsonl").write_text('{"step": 1, "kind": "train", "loss": 2.5}\n')
    folder = workdir / "checkpoints"
    with checkpoint.Checkpointer(folder, keep=2, config=config.to_dict()) as checkpoints:
        for number in (0, 1):
            state["step"] = state["step"] + number
            position = {"data": {"training images": 1437, "classes": 10}, "report": {}}
            checkpoints.save(number, state, position)
    return workdir


@pytest.fixture
def run(started, tmp_path):
    """A copy of it that may be broken."""
    return Path(shutil.copytree(started, tmp_path / "run"))


SAME = (f"{DIGITS}:dense", "--config.devices=1", "--config.checkpoint.keep=2")


def test_workdir_of_another_run(run, refusal):
    refusal(
        *(*SAME, f"--workdir={run}", "--config.seed=3", "--config.batch_size=32"),
        says=[str(run), "config.seed is 3, was 0", "config.batch_size is 32, was 64"],
    )


def test_checkpoint_of_another_run(run, refusal):
    (run / "config.json").unlink()
    refusal(
        *(*SAME, f"--workdir={run}", "--config.seed=3"),
        says=[f"{run}/checkpoints/1", "config.seed is 3, was 0", "use another --workdir"],
    )


@pytest.mark.parametrize("text", ["", '{"seed": 0', "[1]", "\0\xff"])
def test_broken_config_json(text, run, refusal):
    (run / "config.json").write_text(text, encoding="latin-1")
    remedy = "another --workdir, or delete that file: the checkpoints hold the config too\n"
    refusal(*SAME, f"--workdir={run}", says=[f"{run}/config.json", remedy])


def test_a_config_json_that_no_checkpoint_repeats_is_not_to_be_deleted(run, refusal):
    (run / "config.json").write_text("")
    shutil.rmtree(run / "checkpoints")
    refusal(*SAME, f"--workdir={run}", says=[f"{run}/config.json", "use another --workdir\n"])


def test_other_data_than_those_of_the_checkpoint(run, refusal):
    """The path to the data may change, and with it what is there."""
    scores = {"position": {"data": {"training images": 999, "classes": 10}}, "metrics": {}}
    (run / "checkpoints" / "1" / "scores.json").write_text(json.dumps(scores))
    says = ["config.data", f"{run}/checkpoints", "training images: 1437, were 999", "--workdir"]
    refusal(*SAME, f"--workdir={run}", says=says)


def test_what_is_left_of_a_run_is_not_overwritten(run, refusal):
    """Without its config and its checkpoints nobody can go on from it."""
    (run / "config.json").unlink()
    shutil.rmtree(run / "checkpoints")
    says = [f"--workdir: {run} holds metrics.jsonl,", "use another --workdir"]
    refusal(*SAME, f"--workdir={run}", says=says)


@pytest.mark.parametrize("below", ["", "/deep/run"])
def test_workdir_is_a_file(below, refusal, tmp_path):
    (tmp_path / "file").write_text("precious")
    workdir = f"{tmp_path}/file{below}"
    refusal(DIGITS, f"--workdir={workdir}", says=["--workdir must be a folder", workdir])


def test_workdir_cannot_be_written(refusal, tmp_path, monkeypatch):
    folder = tmp_path / "sealed"
    folder.mkdir(mode=0o555)
    if os.geteuid() == 0:  # who may write everywhere
        allowed = os.access
        monkeypatch.setattr(os, "access", lambda path, mode: path != folder and allowed(path, mode))
    for workdir in (folder, folder / "new" / "run"):
        refusal(
            DIGITS, f"--workdir={workdir}", says=[f"--workdir {workdir} cannot be written", "perm"]
        )


def test_metrics_file_cannot_be_written(run, refusal):
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()
    refusal(*SAME, f"--workdir={run}", code=1, says=[f"cannot write {run}/metrics.jsonl", "direct"])


def break_run(folder):
    (folder / "run" / "metadata").write_text("{")


def break_arrays(folder):
    for path in (folder / "state").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(path.read_bytes()[:100])


def lose_arrays(folder):
    shutil.rmtree(folder / "state")


def lose_all(folder):
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize("damage", [break_run, break_arrays, lose_arrays, lose_all])
def test_damaged_checkpoint(damage, run, refusal):
    newest = run / "checkpoints" / "1"
    damage(newest)
    refusal(
        *(*SAME, f"--workdir={run}"),
        code=1,
        says=[
            f"cannot read the checkpoint {newest}",
            "delete that folder to go on",
        ],
    )


def stopped(capsys, *arguments):
    """Runs a command that stops while it trains; returns the error."""
    code = main.main([*SAME, *map(str, arguments)])
    output, errors = capsys.readouterr()
    assert (code, output) == (1, "")
    *progress, last = errors.splitlines()
    assert not [line for line in progress if "rror" in line]
    assert last.startswith("error: ")
    return last


@pytest.mark.parametrize("half", [False, True])
def test_full_disk(half, run, capsys, monkeypatch):
    """Noticed before the checkpoint is written or, with others writing there, in its middle."""
    before = contents(run / "checkpoints")
    free = shutil.disk_usage(run)._replace(free=1000)
    if half:

        def save(path, **_):
            partial = path.with_name(f"{path.name}.orbax-checkpoint-tmp")
            partial.mkdir()
            (partial / "half").write_bytes(b"0")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(checkpoint.ocp.Checkpointer, "save", lambda _, path, **rest: save(path))
    else:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    # What half a checkpoint of a killed run looks like does not disturb.
    (run / "checkpoints" / "9.orbax-checkpoint-tmp-1").mkdir()
    message = stopped(capsys, f"--workdir={run}", "--config.checkpoint.every_steps=1")
    assert f"cannot save the checkpoint of step 2 in {run}/checkpoints" in message
    assert ("No space left" if half else "0.0 MiB are free") in message
    assert "earlier checkpoints are intact: make room there and run again" in message
    assert contents(run / "checkpoints") == before


def test_loss_that_is_not_finite(tmp_path, capsys):
    rate = "--config.optimizer.learning_rate=1e30"
    workdir = f"--workdir={tmp_path / 'run'}"
    message = stopped(capsys, workdir, rate, "--config.log.every_steps=1")
    assert "the loss is nan at step" in message
    assert "no checkpoint was saved; lower config.optimizer.learning_rate" in message


@pytest.mark.parametrize(
    ("arguments", "environment", "says"),
    [
        (["--config.sparsity.weight=1.0"], {}, "config.sparsity.weight must be"),
        ([], {"JAX_PLATFORMS": "nonsense"}, "JAX has no device here, check the environment var"),
    ],
)
def test_as_a_program(arguments, environment, says, tmp_path):
    before = time.monotonic()
    done = subprocess.run(
        [
            *(sys.executable, "-m", "swat_jax.main", DIGITS, f"--workdir={tmp_path / 'run'}"),
            *arguments,
        ],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {says}")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
    # Two to three seconds where nothing else runs: the imports.
    assert time.monotonic() - before < 30
