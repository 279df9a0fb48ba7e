"""Sweeps over many convs: processes compile at once and measure in turn, and a file grows."""

import itertools
import json
import os
import pathlib
import sys

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
    assert second[1]["error"] == "no answer in 1 s"
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
    assert any("Error" in line for line in failed["stderr"])
    (refused,) = two["refused"]
    assert refused["name"] == "3x3 3->8 @4"
    assert refused["reason"] == "3 input and 8 output channels are not both multiples of 8"
    assert "1x1 16->8 @4" in capsys.readouterr().err


def test_a_run_that_is_cut_off_goes_on_where_it_was(small, tmp_path, capsys):
    output, op = tmp_path / "found.json", ("--op", "input_gradient", "--dtype", "float32")
    cut = small(output, *op, "--seconds", "0")
    assert len(told(cut)) == 2
    # What failed is tried again; what is about other convs stays.
    failed = [{**row, "stride": 2} for row in cut["refused"]]
    failed.append({**cut["refused"][0], "window": [3, 3], "channels": [8, 8]})
    output.write_text(json.dumps({**cut, "failed": failed}))
    whole = small(output, *op)
    assert whole["failed"] == failed[:1]
    assert whole["convs"][:2] == cut["convs"]
    assert [row[0] for row in told(whole)] == ["1x1 8->16 @4"] * 2 + ["3x3 8->8 @4"] * 2
    assert whole["copy_gb_per_s"] == cut["copy_gb_per_s"]
    assert [row["name"] for row in whole["refused"]] == ["3x3 3->8 @4"]
    assert "1 convs, 1 are in the file" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]

    before = output.read_text()
    with pytest.raises(SystemExit, match=r"settings is .* give another --output"):
        small(output, *op, "--tiles")
    with pytest.raises(SystemExit, match="op is input_gradient there, and forward here"):
        small(output, "--op", "forward", "--dtype", "float32")
    assert output.read_text() == before
    output.write_text(before.replace('"jax": "', '"jax": "0.'))
    with pytest.raises(SystemExit, match="versions is"):
        small(output, *op)
