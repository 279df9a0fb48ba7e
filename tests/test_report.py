"""The page on the paper's table, from figures that are made up."""

import json
import pathlib
import subprocess
import sys

import pytest

from swat_jax import report
from swat_jax.errors import UsageError

pytestmark = pytest.mark.newest

CONFIG = {"epochs": 3, "precision": "bfloat16", "sparsity": {"distribution": "uniform"}}
MOMENTUM = {**CONFIG, "sparsity": {"distribution": "momentum"}}


def run(method="u90", seed=0, accuracy=0.92, network="vgg16", label="", **more):
    layers = {
        f"stage{i}/conv": {"weight_sparsity": 0.9, "activation_sparsity": 0.85} for i in range(3)
    }
    epochs = [{"step": 10 * (i + 1), "test_accuracy": accuracy * (i + 1) / 3} for i in range(3)]
    return {
        "network": network, "method": method, "seed": seed, "label": label, "settings": [],
        "gpu_seconds": 75.2, "dropped_activations": 0.0,
        "pruned_test_accuracy": accuracy, "weight_sparsity": 0.898, "activation_sparsity": 0.89,
        "training_flop_reduction": 91.2, "planned_training_flop_reduction": 89.7,
        "device": "1 x NVIDIA H200 (gpu)", "versions": {"jax": "0.11.2"}, "steps": 30,
        "config": CONFIG, "epochs": epochs, "layers": layers, **more,
    }  # fmt: skip


@pytest.fixture
def results(tmp_path):
    def fill(*runs):
        folder = tmp_path / "results" / "cifar10"
        folder.mkdir(parents=True, exist_ok=True)
        for number, one in enumerate(runs):
            (folder / f"{number}.json").write_text(json.dumps(one))
        return tmp_path / "results"

    return fill


def row_of(page, network, method):
    return next(
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in page.splitlines()
        if line.startswith(f"| {network} | {method} |")
    )


def test_every_row_of_the_table_is_there_run_or_not(results, tmp_path):
    found = report.write(
        results(
            run(),
            run(seed=1, accuracy=0.93),
            run("erk95", accuracy=0.9199),
            run("dense", xla_flags="--some --flags"),
            run("m95", gpu_seconds=None, config=MOMENTUM, dropped_activations=None),
        ),
        tmp_path / "page.md",
    )
    page = (tmp_path / "page.md").read_text()
    assert row_of(page, "vgg16", "u90") == [
        *("vgg16", "u90", "91.95", "92.50 +- 0.71", "+0.55", "", "89.8 %", "89.0 %", "89.7 %"),
        *("75", "2"),
    ]
    assert row_of(page, "vgg16", "m95")[8:] == ["91.2 %", "", "1"]
    assert row_of(page, "vgg16", "erk95")[3:5] == ["91.99", "-0.51 (missed)"]
    assert row_of(page, "vgg16", "dense")[2:5] == ["", "92.00", ""]
    assert "With `XLA_FLAGS=--some --flags`: vgg16 dense.\n" in page
    for network, methods in report.PAPER.items():
        for method in methods:
            if network != "vgg16":
                assert row_of(page, network, method)[3] == "not run"
    assert "5 runs, on 1 x NVIDIA H200 (gpu), jax 0.11.2, bfloat16." in page
    assert "found no room: at most 0 of a batch; runs of which it is not known: 1." in page
    names = {path.relative_to(tmp_path).as_posix() for path in found}
    pictures = {f"page/{name}.svg" for name in ("flops", "vgg16_accuracy", "vgg16_layers")}
    assert names == {"page.md", *pictures}
    assert all(f"]({name})" in page for name in pictures)


def test_the_same_figures_make_the_same_files_and_a_check_says_so(results, tmp_path, capsys):
    folder, page = results(run()), tmp_path / "page.md"
    assert report.write(folder, page, check=True)
    assert not page.exists()
    report.write(folder, page)
    assert report.write(folder, page, check=True) == []
    command = [str(folder), f"--output={page}", "--check", "--json"]
    assert report.main(command) == 0
    assert json.loads(capsys.readouterr().out) == {"stale": []}
    results(run(accuracy=0.5))
    assert page in report.write(folder, page, check=True)
    assert report.main(command) == 1
    assert str(page) in json.loads(capsys.readouterr().out)["stale"]


def test_other_settings_are_no_row(results, tmp_path):
    others = [
        run(label=f"period{period}", settings=[f"period={period}"], accuracy=accuracy)
        for period, accuracy in ((100, 0.94), (2, 0.93), (10, 0.95))
    ]
    missing = run("u80", label="other", settings=["label_smoothing=0.1"], accuracy=0.91)
    report.write(results(run(), *others, missing), tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert row_of(page, "vgg16", "u90")[3] == "92.00"
    assert page.split("## With other settings")[1].split("##")[0].strip().splitlines()[2:] == [
        "| vgg16 | u80 | `label_smoothing=0.1` | 91.00 |  |",
        "| vgg16 | u90 | `period=2` | 93.00 | 92.00 |",
        "| vgg16 | u90 | `period=10` | 95.00 | 92.00 |",
        "| vgg16 | u90 | `period=100` | 94.00 | 92.00 |",
    ]


def test_the_improved_recipe_has_a_column(results, tmp_path):
    better = {"label": "improved", "settings": ["label_smoothing=0.1"]}
    report.write(
        results(run(), run(accuracy=0.94, **better), run("m95", accuracy=0.95, **better)),
        tmp_path / "page.md",
    )
    page = (tmp_path / "page.md").read_text()
    assert row_of(page, "vgg16", "u90")[3:6] == ["92.00", "+0.05", "94.00"]
    assert row_of(page, "vgg16", "m95")[3:7] == ["not run", "", "95.00", ""]
    assert "| vgg16 | u90 | `label_smoothing=0.1` | 94.00 |" in page


def test_without_runs_nothing_is_claimed(results, tmp_path):
    report.write(results(), tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert "No row has been run at full length yet." in page
    assert "%" not in page.split("| network |")[1]


def test_a_file_that_is_no_run_is_named(results, tmp_path):
    folder = results({"network": "vgg16"})
    with pytest.raises(UsageError, match=r"0\.json is not the JSON file of a run"):
        report.write(folder, tmp_path / "page.md")
    with pytest.raises(UsageError, match="is no folder"):
        report.write(tmp_path / "none", tmp_path / "page.md")


def test_without_matplotlib_one_line_says_how_to_get_it(results, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code = report.main([str(results(run())), "--output", str(tmp_path / "page.md")])
    assert code == 2
    assert capsys.readouterr().err == (
        "error: pictures need matplotlib: pip install swat-jax[report]\n"
    )


def test_the_page_in_the_repository_is_up_to_date():
    root = pathlib.Path(__file__).parents[1]
    command = [sys.executable, "-m", "swat_jax.report", "docs/results"]
    done = subprocess.run(
        [*command, "--check"], cwd=root, capture_output=True, text=True, check=False
    )
    stale = [line for line in done.stdout.splitlines() if ".svg" not in line]
    # Pictures may differ from one version of matplotlib to the next.
    assert not stale, done.stdout + done.stderr
