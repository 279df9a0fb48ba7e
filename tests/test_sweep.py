"""Sweeps over many convs: processes compile at once and measure in turn, and a file grows."""

import itertools
import json
import os
import pathlib
import shutil
import sys
import types

import pytest

pytestmark = pytest.mark.newest

BENCHMARKS = str(pathlib.Path(__file__).parents[1] / "benchmarks")
# Works for as long as it is told, and says when it had the turn.
CHILD = """
import os, sys, time
import rounds, turn

class Slow:
    def __init__(self, seconds):
        self.seconds = seconds

    def compile(self):
        start = time.monotonic()
        time.sleep(self.seconds)
        self.when = [start, time.monotonic()]

turns = turn.Turn(sys.argv[1])

def prepare(task):
    print("noise", task)
    if task["ends"] == "compiling":
        raise ValueError("cannot compile " + task["name"])
    if task["ends"] == "hangs":
        time.sleep(60)
    trying, other = Slow(0.1), Slow(task["seconds"])
    turns.compile([trying], [other])

    def measure():
        if task["ends"] == "measuring":
            os._exit(3)
        time.sleep(0.05)
        return {"name": task["name"], "trying": trying.when, "other": other.when}

    return measure

rounds.serve(prepare)
"""


def overlap(one, other):
    return max(one[0], other[0]) < min(one[1], other[1])


def apart(intervals):
    return not any(overlap(*pair) for pair in itertools.combinations(intervals, 2))


@pytest.fixture
def team(load, tmp_path):
    rounds, worker = load("rounds"), load("worker")
    environment = {**os.environ, "PYTHONPATH": BENCHMARKS}
    workers = []

    def start(number):
        command = [sys.executable, "-c", CHILD, str(tmp_path / "lock")]
        log = tmp_path / f"{number}.log"
        workers.append(worker.Worker(f"process {number}", command, environment, log, 30))
        return workers[-1]

    team = rounds.Processes(start, 3)
    team.workers = workers
    yield team
    team.close()


def tasks(*ends, seconds=(0.3, 0.2, 0.1)):
    return [
        {"name": f"task{number}", "ends": end, "seconds": seconds[number]}
        for number, end in enumerate(ends)
    ]


def test_all_compile_at_once_and_measure_in_turn(team):
    answers = team.round(tasks("", "")) + team.round(tasks("", "", "")) + team.round(tasks("", ""))
    names = [one["found"]["name"] for one in answers]
    assert names == ["task0", "task1", "task0", "task1", "task2", "task0", "task1"]
    compiling, measuring = ([one[key] for one in answers] for key in ("compiling", "measuring"))
    assert apart(measuring)
    for alone in measuring:
        assert not any(overlap(alone, other) for other in compiling)
    assert overlap(*compiling[-2:])
    # One process at a time tries algorithms; what tries none is compiled beside it.
    trying, others = ([one["found"][key] for one in answers] for key in ("trying", "other"))
    assert apart(trying)
    assert any(overlap(a, b) for a in trying for b in others)
    assert len(team.workers) == 3


def test_a_process_that_ends_or_hangs_is_the_failure_of_its_task_alone(team, capsys):
    first = team.round(tasks("compiling", "", "measuring"))
    assert [one.get("found", {}).get("name") for one in first] == [None, "task1", None]
    assert first[0]["error"] == "ValueError: cannot compile task0"
    assert first[0]["stderr"][-1] == "ValueError: cannot compile task0"
    assert first[2]["error"] == "exit code 3"
    team.workers[1].timeout = 1
    second = team.round(tasks("", "hangs", ""))
    assert [one.get("found", {}).get("name") for one in second] == ["task0", None, "task2"]
    assert second[1]["error"] == "no answer in 3 s"  # one for each that may try before it
    assert team.round(tasks("", ""))[1]["found"]["name"] == "task1"
    assert [one.name[-1] for one in team.workers] == ["0", "1", "2", "0", "2", "1"]
    assert "process 0: ValueError" in capsys.readouterr().err


@pytest.fixture
def small(load, monkeypatch):
    """Runs `sparse_conv.py` on three small convs, the last of which is none."""
    script, convs = load("sparse_conv"), load("convs")
    size = {"network": "vgg16", "batch": 2, "size": (4, 4), "result": (4, 4), "stride": 1}
    found = [
        convs.Problem(window=(1, 1), channels=(8, 16), layers=3, **size),
        convs.Problem(window=(3, 3), channels=(8, 8), **size),
        convs.Problem(window=(3, 3), channels=(3, 8), **size),
        convs.Problem(window=(1, 1), channels=(16, 8), **size | {"result": (3, 3)}),
    ]

    def run(output, *arguments, problems=3):
        monkeypatch.setattr(script, "problems", lambda *_: found[:problems])
        script.main(["--output", str(output), "--sparsity", "0.75", "0.9", *arguments])
        return json.loads(output.read_text())

    return run


def told(found):
    """What rows say, but for times and errors."""
    keys = ("name", "layers", "sparsity", "operations", "products", "bytes", "cut")
    return [[row.get(key) for key in keys] for row in found["convs"]]


def test_several_processes_measure_what_one_does(small, tmp_path, capsys):
    one = small(tmp_path / "one.json")
    output = tmp_path / "two.json"
    two = small(output, "--jobs", "2", problems=4)
    assert told(one) == told(two)
    assert [row[0] for row in told(two)] == ["1x1 8->16 @4"] * 2 + ["3x3 8->8 @4"] * 2
    assert [row["layers"] for row in two["convs"]] == [3, 3, 1, 1]
    for row in two["convs"]:
        times = [row[f"{name}_ms"] for name in ("dense", "unpack", "sparse", "nothing", "floor")]
        assert min(times) > 0
        assert row["error"] < 2**-7
    floors = two["copy_gb_per_s"] * 1e6, two["product_tflop_per_s"] * 1e9
    row = two["convs"][0]
    expected = max(row["bytes"] / floors[0], row["operations"] / floors[1])
    assert row["floor_ms"] == pytest.approx(expected)

    both, none = two["rounds"]
    assert [took["name"] for took in both] == ["1x1 8->16 @4", "3x3 8->8 @4"]
    assert none == []
    first, second = both
    for measuring in (first["measuring"], second["measuring"]):
        assert not any(overlap(measuring, took["compiling"]) for took in both)
    assert not overlap(first["measuring"], second["measuring"])

    (failed,) = two["failed"]
    assert (failed["name"], failed["result"]) == ("1x1 16->8 @4", [3, 3])
    assert "Error" in failed["error"]
    assert "stderr" not in failed  # which names places on a machine
    (refused,) = two["refused"]
    assert refused["name"] == "3x3 3->8 @4"
    assert refused["reason"] == "3 input and 8 output channels are not both multiples of 8"
    assert "1x1 16->8 @4" in capsys.readouterr().err


def test_a_run_that_is_cut_off_goes_on_where_it_was(small, tmp_path, capsys):
    output, op = tmp_path / "found.json", ("--op", "input_gradient", "--dtype", "float32")
    cut = small(output, *op, "--seconds", "0")
    assert len(told(cut)) == 2
    assert cut["left"] == 1
    # What failed is tried again.
    failed = [{**cut["refused"][0], "window": [3, 3], "channels": [8, 8]}]
    output.write_text(json.dumps({**cut, "failed": failed, "date": "2020-02-02"}))
    whole = small(output, *op)
    assert whole["failed"] == []
    assert whole["left"] == 0
    assert whole["date"] > "2020-02-02"
    assert whole["convs"][:2] == cut["convs"]
    assert [row[0] for row in told(whole)] == ["1x1 8->16 @4"] * 2 + ["3x3 8->8 @4"] * 2
    assert whole["copy_gb_per_s"] == cut["copy_gb_per_s"]
    assert [row["name"] for row in whole["refused"]] == ["3x3 3->8 @4"]
    assert "1 convs, 1 are in the file" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]

    # Where nothing is left to measure, nothing is as if it were new.
    output.write_text(json.dumps({**whole, "date": "2020-02-02"}))
    assert small(output, *op)["date"] == "2020-02-02"

    before = output.read_text()
    with pytest.raises(SystemExit, match=r"settings is .* give another --output"):
        small(output, *op, "--first", "1")
    with pytest.raises(SystemExit, match=r"settings is .* give another --output"):
        small(output, *op, "--tiles")
    with pytest.raises(SystemExit, match="op is input_gradient there, and forward here"):
        small(output, "--op", "forward", "--dtype", "float32")
    assert output.read_text() == before
    output.write_text(before.replace('"jax": "', '"jax": "0.'))
    with pytest.raises(SystemExit, match="versions is"):
        small(output, *op)


def synthetic(op, ratios):
    """A file of a sweep: for each conv its network, and dense by sparse at each sparsity."""
    convs = []
    for number, (network, *found) in enumerate(ratios):
        for sparsity, ratio in zip((0.7, 0.8, 0.9, 0.95, 0.98), found, strict=True):
            convs.append(
                {
                    "network": network, "name": f"1x1 8->{8 * number} @4", "layers": number + 1,
                    "sparsity": sparsity, "sparse_ms": 2.0, "dense_ms": 2 * ratio,
                    "unpack_ms": 4 * ratio, "tf32_ms": ratio, "floor_ms": 0.5,
                    "floor_is": "bytes",
                }
            )  # fmt: skip
    refused = [
        {"network": "vgg16", "name": "3x3 3->64 @32", "reason": "3 channels"},
        {"network": "vgg16", "name": "3x3/2 8->64 @32", "reason": "strides"},
        {"network": "vgg16", "name": "1x1/2 8->64 @32", "reason": "strides"},
    ]
    failed = [{"network": "resnet18", "name": "1x1 9->9 @9", "error": "out of memory"}]
    return {
        "date": "2026-12-01", "device": "NVIDIA H200", "versions": {"jax": "1"}, "op": op,
        "dtype": "bfloat16" if op == "weight_gradient" else "float32", "copy_gb_per_s": 3600.0,
        "convs": convs, "refused": refused, "failed": failed, "left": 0,
    }  # fmt: skip


RATIOS = (
    ("vgg16", 0.25, 0.5, 1.25, 1.5, 2.5),
    ("vgg16", 0.25, 0.5, 0.75, 1.0, 1.004),
    ("resnet18", 1.125, 1.25, 1.5, 2.0, 2.5),
    ("imagenet_resnet50", 0.125, 0.25, 0.375, 0.5, 0.625),
)


@pytest.fixture
def pages(load, monkeypatch, tmp_path):
    """Runs `sparse_conv_page.py` on copies of the page and of what it is made of."""
    script, results = load("sparse_conv_page"), load("results")
    copy = tmp_path / script.PAGE.name
    copy.write_text(script.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    shutil.copytree(results.RESULTS, tmp_path / "results")
    for file in (tmp_path / "results").glob("sparse_conv_sweep_*"):
        file.unlink()
    monkeypatch.setattr(script, "PAGE", copy)
    monkeypatch.setattr(script, "SWEEP", tmp_path / script.SWEEP.name)
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["sparse_conv_page", *arguments])
        return script.main()

    return types.SimpleNamespace(run=run, page=copy, sweep=script.SWEEP, results=results.RESULTS)


def test_pages_without_sweeps_say_nothing_of_them(pages, capsys):
    pages.run()
    assert pages.run("--check") == 0
    text = pages.page.read_text()
    begin = text.index("<!-- benchmarks/sparse_conv_page.py writes sweep -->")
    assert text[begin:].splitlines()[1:5] == ["", "", "", "<!-- until here -->"]
    assert not pages.sweep.exists()
    assert "sparse_convolutions_sweep.md" not in text
    pages.sweep.write_text("of results that are gone")
    assert pages.run("--check") == 1
    assert "sparse_convolutions_sweep.md differs" in capsys.readouterr().out
    assert pages.run() == 0
    assert not pages.sweep.exists()


def test_pages_show_every_conv_of_a_sweep_and_who_wins(pages):
    for op in ("weight_gradient", "forward"):
        file = pages.results / f"sparse_conv_sweep_{op}_h200.json"
        file.write_text(json.dumps(synthetic(op, RATIOS)))
    assert pages.run("--check") == 1
    assert pages.run() == pages.run("--check") == 0
    text = pages.sweep.read_text()
    lines = text.splitlines()
    gradient, forward = (
        lines.index(f"## {title}")
        for title in (
            "The weight gradient from packed activations", "Forward with single weights",
        )
    )  # fmt: skip
    gradient, forward = lines[gradient:forward], lines[forward:]
    assert not [line for line in lines if "input's gradient" in line]
    assert [line for line in gradient if line.startswith("### ")] == [
        f"### The weight gradient from packed activations: {name}"
        for name in ("ResNet-50", "ResNet-18", "VGG-16")
    ]
    assert (
        "| conv | layers | cuDNN | unpack | here | floor | 70% | 80% | 90% | 95% | 98% |"
    ) in gradient
    # A ratio of 1 is no win, what is rounded to it may be one.
    (row,) = (line for line in gradient if "8->8 " in line)
    assert row == (
        "| 1x1 8->8 @4 | 2 | 1.500 | 3.000 | 2.000 | 0.500 b | 0.25 (0.50) | 0.50 (1.00) "
        "| 0.75 (**1.50**) | 1.00 (**2.00**) | **1.00** (**2.01**) |"
    )
    assert "| 1x1 8->24 @4 | 4 | 0.750 | 0.375 | 2.000 | 0.500 b |" in "\n".join(forward)
    counted = (
        "Weight gradient, bfloat16: the kernels are faster than cuDNN from dense activations in "
        "2 of 4 convs at 90% zeros, in 1 at 70% and in 3 at 98%; than unpacking and cuDNN in 3, "
        "1 and 4. Dense tensor cores (cuDNN from dense activations) win in 2 at 90% "
        "(1 of 1 of ResNet-50, 0 of 1 of ResNet-18, 1 of 2 of VGG-16), and in 1 at 98%. "
        "Convs that are not taken: 3. Convs that are not measured, since it failed: 1."
    )
    assert counted in gradient
    assert (
        "Dense tensor cores (cuDNN with TensorFloat-32) win in 4 at 90% (1 of 1 of ResNet-50, "
        "1 of 1 of ResNet-18, 2 of 2 of VGG-16), and in 2 at 98%."
    ) in "\n".join(forward)
    vgg = "Faster at 90%: 1 of 2 than cuDNN from dense activations and 2 of 2 than unpacking"
    assert vgg in "\n".join(gradient)
    assert "Not taken: 3x3/2 8->64 @32, 1x1/2 8->64 @32: strides." in gradient
    assert "Failed: 1x1 9->9 @9: out of memory." in gradient

    page = pages.page.read_text()
    assert "[each](sparse_convolutions_sweep.md)" in page
    assert "| weight gradient, bfloat16 | unpacking and cuDNN | 4 | 1 | 1 | 3 | 3 | 4 |" in page
    assert "| forward, float32 | cuDNN in true float32 | 4 | 1 | 1 | 2 | 2 | 3 |" in page
    assert counted in page


def test_files_that_say_nothing_are_not_shown_and_those_of_something_else_refused(pages):
    file = pages.results / "sparse_conv_sweep_forward_h200.json"
    found = synthetic("forward", RATIOS)
    file.write_text(json.dumps({**found, "convs": []}))
    assert pages.run() == 0
    assert not pages.sweep.exists()
    file.write_text(json.dumps({**found, "dtype": "bfloat16"}))
    with pytest.raises(SystemExit, match="is of forward in bfloat16, not forward, float32"):
        pages.run()
    convs = [row for row in found["convs"] if row["sparsity"] < 0.9]
    file.write_text(json.dumps({**found, "convs": convs}))
    with pytest.raises(SystemExit, match="nothing at a sparsity"):
        pages.run()
