"""The notebooks: what is committed is the result of one run, and another run gives the same.

`notebooks/execute.py` executes them and writes them back. Cells with the tag "stable" print what no
machine and no version changes: that is compared.
"""

import importlib
import re
import subprocess

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

from tests.runs import ROOT

FOLDER = ROOT / "notebooks"
NAMES = ("quickstart", "sparsity_explorer", "your_own_model")
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="notebooks/ is in the repository only")
LOCAL = re.compile(r"/(?:home|root|tmp|usr|opt|work|mnt|Users)/|[A-Z]:\\\\|site-packages")


def read(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def streams(cell, name="stdout"):
    found = [out.text for out in cell.outputs if out.output_type == "stream" and out.name == name]
    return "".join(found)


def pictures(cell):
    return sum("image/png" in out.get("data", {}) for out in cell.outputs)


def stable(notebook):
    return [
        streams(cell) for cell in code_cells(notebook) if "stable" in cell.metadata.get("tags", ())
    ]


@pytest.fixture
def execute(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("execute")


def test_they_are_these_and_small():
    paths = sorted(FOLDER.glob("*.ipynb"))
    assert tuple(path.stem for path in paths) == NAMES
    assert sum(path.stat().st_size for path in paths) < 1.5 * 2**20
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"(notebooks/{name}.ipynb)" in readme for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_committed_outputs_are_of_one_clean_run(name, execute):
    notebook = read(name)
    nbformat.validate(notebook)
    assert notebook == execute.cleaned(read(name))
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        kinds = {out.output_type for out in cell.outputs}
        assert kinds <= {"stream", "display_data"}, cell.source
        assert not streams(cell, "stderr"), cell.source
        shown = re.findall(r"^plt\.show\(\)", cell.source, re.MULTILINE)
        assert pictures(cell) == len(shown), cell.source
        # What prints at the top level has printed.
        if re.search(r"^print\(", cell.source, re.MULTILINE):
            assert streams(cell), cell.source
    assert sum(map(pictures, cells)) >= 2


@pytest.mark.parametrize("name", NAMES)
def test_no_local_paths(name):
    for cell in read(name).cells:
        texts = [cell.source, *[out.get("text", "") for out in cell.get("outputs", ())]]
        # Where the driver says that it is there is no place of somebody's machine.
        assert not any(LOCAL.search(text.replace("/proc/driver/nvidia/", "")) for text in texts)


def test_all_begin_alike():
    """With a text, with how swat_jax gets there, and with what computes."""
    for name in NAMES:
        notebook = read(name)
        assert notebook.cells[0].cell_type == "markdown"
        first, _, device = code_cells(notebook)[:3]
        assert first.source == code_cells(read(NAMES[0]))[0].source
        assert streams(first) == ""
        assert device.source == code_cells(read(NAMES[0]))[2].source
        assert "device:" in streams(device)


class Installation:
    """The first cell where swat_jax is not there: what it would run."""

    def __init__(self, monkeypatch, *, has_gpu, repository):
        self.commands, self.environments = [], []
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        monkeypatch.setattr("pathlib.Path.exists", lambda path: has_gpu)
        monkeypatch.setattr(subprocess, "run", self.run)
        source = code_cells(read(NAMES[0]))[0].source
        given = source.replace('REPOSITORY = ""', f"REPOSITORY = {repository!r}")
        assert repository == "" or given != source
        exec(given, {"__name__": "cell"})

    def run(self, command, check, env=None):
        assert check
        self.commands.append(command)
        self.environments.append(env)


@pytest.mark.parametrize("has_gpu", [False, True])
def test_installation(monkeypatch, has_gpu):
    done = Installation(monkeypatch, has_gpu=has_gpu, repository="https://host/swat_jax")
    clone, install = done.commands
    assert clone[:2] == ["git", "clone"]
    assert "https://host/swat_jax" in clone
    folder, extras = re.fullmatch(r"\./(\w+)\[([\w,]+)\]", install[-1]).groups()
    assert clone[-1] == folder
    known = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert all(f"\n{extra} = [" in known for extra in extras.split(","))
    assert ("cuda12" in extras) == has_gpu
    choice = {"SWAT_JAX_CUDA_ARCHITECTURES": "native"} if has_gpu else {"SWAT_JAX_NATIVE": "0"}
    assert choice.items() <= done.environments[1].items()


def test_installation_without_an_address(monkeypatch):
    with pytest.raises(ValueError, match="REPOSITORY"):
        Installation(monkeypatch, has_gpu=False, repository="")


@pytest.mark.newest
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", NAMES)
def test_another_run_gives_the_same(name, execute):
    committed = read(name)
    again = execute.executed(FOLDER / f"{name}.ipynb")
    assert any(stable(committed))
    assert stable(again) == stable(committed)
    for one, other in zip(code_cells(again), code_cells(committed), strict=True):
        assert pictures(one) == pictures(other), one.source
        assert bool(streams(one)) == bool(streams(other)), one.source
        assert "Warning" not in streams(one, "stderr")
    text = "".join(map(streams, code_cells(again)))
    accuracies = [float(one) for one in re.findall(r"(?<=pruned ).*?([\d.]+)% accuracy", text)]
    accuracies += [float(one) for one in re.findall(r"([\d.]+)% pruned", text)]
    # It has learned: of ten digits chance would be right about one in ten.
    assert all(accuracy > 90 for accuracy in accuracies)
    assert accuracies or name == "sparsity_explorer"


def test_a_failing_cell_is_told(tmp_path, execute):
    broken = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])
    nbformat.write(broken, tmp_path / "broken.ipynb")
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        execute.executed(tmp_path / "broken.ipynb")
