"""Executes notebooks, and writes them back with their outputs and nothing else that changes.

    python notebooks/execute.py                              # all of them, on a CPU
    python notebooks/execute.py notebooks/quickstart.ipynb
    JAX_PLATFORMS=cuda python notebooks/execute.py           # at the larger sizes

Figures that depend on the machine change with it: look at them before they are committed.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
# What is kept of a notebook's metadata: any Python 3.
METADATA: dict[str, Any] = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def executed(path: Path, timeout: float = 600) -> Any:
    """A notebook with the outputs of a run in an empty folder.

    The package is that of this repository. JAX sees a CPU unless `JAX_PLATFORMS` says otherwise.

    Args:
      path: the notebook; it stays as it is.
      timeout: seconds that a cell may take.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell fails.
      nbclient.exceptions.CellTimeoutError: one takes too long.
    """
    notebook = nbformat.read(path, as_version=4)
    search = [str(FOLDER.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"JAX_PLATFORMS": "cpu", **os.environ, "PYTHONPATH": os.pathsep.join(search)}
    # Such as the devices that tests make up.
    environment.pop("XLA_FLAGS", None)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            timeout=timeout,
            kernel_name="python3",
            resources={"metadata": {"path": folder}},
            record_timing=False,
            coalesce_streams=True,
        )
        client.execute(env=environment)
    return cleaned(notebook)


def cleaned(notebook: Any) -> Any:
    """The notebook without what says when and where it was run; changed in place."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        cell.metadata = {key: cell.metadata[key] for key in ("tags",) if key in cell.metadata}
        for output in cell.get("outputs", ()):
            output.pop("execution_count", None)
            if output.output_type in ("display_data", "execute_result"):
                output.metadata = {}
    return notebook


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Executes notebooks and writes their outputs.")
    parser.add_argument("notebooks", nargs="*", type=Path, help="by default all of this folder")
    for path in parser.parse_args().notebooks or sorted(FOLDER.glob("*.ipynb")):
        start = time.monotonic()
        notebook = executed(path)
        nbformat.validate(notebook)
        nbformat.write(notebook, path)
        print(f"{path}: {time.monotonic() - start:.0f} s, {path.stat().st_size // 1024} KiB")


if __name__ == "__main__":
    main()
