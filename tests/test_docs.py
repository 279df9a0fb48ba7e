"""Every block of code in the documentation runs, but for those that say why they cannot here."""

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


def run_shell(code, folder):
    """As a reader would, but on a CPU and with the package that is tested."""
    path = [str(pathlib.Path(sys.executable).parent), os.environ["PATH"]]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "PATH": os.pathsep.join(path),
    }
    told = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", code],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert told.returncode == 0, f"{code}\n{told.stdout[-2000:]}\n{told.stderr[-2000:]}"


@pytest.mark.newest
@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", PAGES)
def test_blocks_run(page, tmp_path, monkeypatch):
    """Those of a page one after the other, in one folder and one namespace."""
    monkeypatch.chdir(tmp_path)
    for name in ("configs", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    names = {"__name__": "page"}
    found = blocks(page)
    assert found
    for block in found:
        if block.reason is not None:
            continue
        if block.language == "python":
            code = compile("\n" * block.line + block.code, str(ROOT / page), "exec")
            exec(code, names)
        elif block.language in ("sh", "bash") and page not in PYTHON_ONLY:
            run_shell(block.code, tmp_path)
        else:
            assert block.language in ("text", "sh"), f"{page}: who runs {block.language}?"


def test_what_is_not_executed_says_why():
    skipped = [block for page in PAGES for block in blocks(page) if block.reason is not None]
    assert skipped
    assert all(block.language == "sh" and len(block.reason) > 10 for block in skipped)


def test_fences_are_all_found():
    """A block that the expression above does not see would not be run."""
    for page in PAGES:
        fences = (ROOT / page).read_text(encoding="utf-8").count("```")
        assert fences == 2 * len(blocks(page)), page
