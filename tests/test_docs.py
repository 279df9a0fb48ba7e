"""Every block of code in the documentation runs, but for those that say why they cannot here."""

import json
import os
import pathlib
import re
import subprocess
import sys
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).parents[1]
# Pages that are made by scripts hold commands, and no blocks of code.
PAGES = sorted(
    page.relative_to(ROOT).as_posix()
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    if "```" in page.read_text(encoding="utf-8") and "transcripts" not in page.parts
)
# README's commands install, compile and train at full length: .ci/run has those that matter.
PYTHON_ONLY = ("README.md",)
BLOCK = re.compile(
    r"^(?:<!-- not executed: (?P<reason>.+?) -->\n)?```(?P<language>\w+)[^\n]*\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    code: str
    line: int
    reason: str | None


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        Block(
            found["language"],
            found["code"],
            text[: found.start("code")].count("\n"),
            found["reason"],
        )
        for found in BLOCK.finditer(text)
    ]


# One process for a page, in which nothing is imported that the page does not import.
DRIVER = """
import json, sys
names = {"__name__": "page"}
for line in sys.stdin:
    page, start, code = json.loads(line)
    exec(compile("\\n" * start + code, page, "exec"), names)
    print("done", file=sys.__stdout__, flush=True)
"""


def environment():
    """A reader's, but on a CPU and with the package that is tested."""
    path = [str(pathlib.Path(sys.executable).parent), os.environ["PATH"]]
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "PATH": os.pathsep.join(path),
    }


class Interpreter:
    """Runs the blocks of a page, one after the other."""

    def __init__(self, folder):
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER], cwd=folder, env=environment(),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, page, block):
        self.process.stdin.write(json.dumps([page, block.line, block.code]) + "\n")
        self.process.stdin.flush()
        # What the block prints comes first.
        assert "done\n" in iter(self.process.stdout.readline, ""), self.process.stderr.read()

    def close(self):
        self.process.communicate(timeout=60)


def run_shell(code, folder):
    told = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", code],
        cwd=folder, env=environment(), capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert told.returncode == 0, f"{code}\n{told.stdout[-2000:]}\n{told.stderr[-2000:]}"


@pytest.mark.newest
@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", PAGES)
def test_blocks_run(page, tmp_path):
    """Those of a page one after the other, in one folder and one namespace."""
    for name in ("configs", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    found = blocks(page)
    assert found
    interpreter = Interpreter(tmp_path)
    for block in found:
        if block.reason is not None:
            continue
        if block.language == "python":
            interpreter.run(page, block)
        elif block.language in ("sh", "bash") and page not in PYTHON_ONLY:
            run_shell(block.code, tmp_path)
        else:
            assert block.language in ("text", "sh"), f"{page}: who runs {block.language}?"
    interpreter.close()


def test_what_is_not_executed_says_why():
    skipped = [block for page in PAGES for block in blocks(page) if block.reason is not None]
    assert skipped
    assert all(block.language == "sh" and len(block.reason) > 10 for block in skipped)


def test_fences_are_all_found():
    """A block that the expression above does not see would not be run."""
    for page in PAGES:
        fences = (ROOT / page).read_text(encoding="utf-8").count("```")
        assert fences == 2 * len(blocks(page)), page
