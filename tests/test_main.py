"""The command line where all is well: help, the list of runs, a short run and the same again."""

import json

import pytest

from swat_jax import main

RUN = (
    *("--config=configs/digits.py:u90", "--config.max_steps=22", "--config.devices=1"),
    "--config.eval.batch_size=180",
)


def test_help(capsys):
    assert main.main(["--help"]) == 0
    output, errors = capsys.readouterr()
    assert errors == ""
    for part in ("--config FILE[:METHOD]", "--workdir", "--list", "--distributed", "Exit code"):
        assert part in output


def test_list(capsys):
    assert main.main(["--list"]) == 0
    output, errors = capsys.readouterr()
    assert errors == ""
    heading, *rows = output.splitlines()
    assert heading.split() == ["dataset", "network", "method", "command"]
    assert sum("python -m swat_jax.main --config configs/" in row for row in rows) == len(rows)


def test_list_as_json(capsys):
    assert main.main(["--list", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert all({"config", "dataset", "network", "method"} <= row.keys() for row in rows)
    found = {(row["dataset"], row["network"], row["method"]) for row in rows}
    assert len(found) == len(rows) > 70
    assert {
        ("digits", "resnet8", "u90"),
        ("cifar100", "wrn16_8", "m95"),
        ("cifar10", "resnet18", "channel70"),
        ("imagenet", "imagenet_wrn50_2", "u80"),
    } <= found


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return tmp_path_factory.mktemp("main") / "deep" / "run"


def test_a_run_prints_its_tables_and_the_same_command_scores_it_again(workdir, capsys):
    assert main.main([*RUN, f"--workdir={workdir}"]) == 0
    output, errors = capsys.readouterr()
    for layer in ("stem", "stage1/0/conv1", "stage3/0/shortcut", "classifier"):
        assert layer in output
    for part in ("Sparsity by layer", "hard-pruned", "training FLOP reduction", "u90"):
        assert part in output
    assert "epoch 1/1  step 22/22" in errors
    first = json.loads((workdir / "result.json").read_text())
    assert f"{first['pruned_test_accuracy']:.2%}".replace("%", " %") in output
    names = ("config.json", "metrics.jsonl", "result.json")
    files = {name: (workdir / name).read_bytes() for name in names}

    assert main.main([*RUN, f"--workdir={workdir}"]) == 0
    repeated, errors = capsys.readouterr()
    assert "resumed at step 22" in errors
    assert "step 22/22" not in errors  # it does not train
    assert {name: (workdir / name).read_bytes() for name in files} == files
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["22"]
    assert repeated == output


def test_a_run_as_json_and_in_silence(workdir, capsys):
    assert main.main([*RUN, f"--workdir={workdir}", "--json"]) == 0
    output, errors = capsys.readouterr()
    assert json.loads(output) == json.loads((workdir / "result.json").read_text())
    assert "resumed at step 22" in errors
    assert main.main([*RUN, f"--workdir={workdir}", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


def test_what_a_flag_made_of_the_method_is_in_the_heading(tmp_path, capsys):
    flags = ("--config.max_steps=1", "--config.sparsity.weight=0.8")
    assert main.main([*RUN, *flags, f"--workdir={tmp_path}"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert "u (weight 80, activation 90)" in lines
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["method"] == "u (weight 80, activation 90)"
    assert result["weight_sparsity"] == pytest.approx(0.8, abs=2e-3)


def test_ctrl_c_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(main.train, "train_and_evaluate", interrupted)
    assert main.main([*RUN, f"--workdir={tmp_path}"]) == 130
    output, errors = capsys.readouterr()
    assert (output, errors.count("\n")) == ("", 1)
    assert "the same command resumes the run" in errors


def test_a_full_device_is_one_line(tmp_path, capsys, monkeypatch):
    def exhausted(*_):
        raise main.jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating 9")

    monkeypatch.setattr(main.train, "train_and_evaluate", exhausted)
    assert main.main([*RUN, f"--workdir={tmp_path}"]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("error: the device has too little memory (RESOURCE_EXHAUSTED")
    assert errors.endswith("lower config.batch_size\n")
    assert errors.count("\n") == 1


def test_other_errors_of_jax_are_not_hidden(tmp_path, monkeypatch):
    def broken(*_):
        raise main.jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(main.train, "train_and_evaluate", broken)
    with pytest.raises(main.jax.errors.JaxRuntimeError, match="something else"):
        main.main([*RUN, f"--workdir={tmp_path}"])
