"""Dockerfile, which is not built here: what it copies is there, and its steps are those of .ci/run.

`.ci/run container` takes the steps themselves.
"""

import fnmatch
import re
import subprocess

import pytest

from tests.runs import ROOT

needs_file = pytest.mark.skipif(
    not (ROOT / "Dockerfile").is_file(), reason="Dockerfile is in the repository only"
)
STEPS = ROOT / ".ci/container_steps"


def instructions():
    """(instruction, rest), lines that go on joined, without comments."""
    text = (ROOT / "Dockerfile").read_text()
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


@needs_file
def test_what_is_copied_is_there_and_not_ignored():
    ignored, *allowed = [
        line
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if not line.startswith(("#", "**"))
    ]
    assert ignored == "*"
    copied = [
        source
        for name, rest in instructions()
        if name == "COPY" and "--from" not in rest
        for source in rest.split()[:-1]
    ]
    assert "swat_jax" in copied
    for source in copied:
        assert (ROOT / source).exists(), source
        assert f"!{source}" in allowed
    assert {line[1:] for line in allowed} == set(copied)


@needs_file
def test_what_is_built_is_what_pyproject_needs():
    """The readme and the licences of the wheel are among what is copied."""
    text = (ROOT / "pyproject.toml").read_text()
    names = re.search(r'^readme = "(.*)"', text, re.MULTILINE).groups()
    names += tuple(re.findall(r'"([^"]+)"', re.search(r"license-files = \[(.*)\]", text)[1]))
    allowed = (ROOT / ".dockerignore").read_text()
    for name in names:
        assert any(
            fnmatch.fnmatch(name, f"{line[1:]}*")
            for line in allowed.splitlines()
            if line.startswith("!")
        ), name


@needs_file
def test_it_is_built_with_a_compiler_and_run_without():
    found = instructions()
    stages = [rest for name, rest in found if name == "FROM"]
    assert len(stages) == 2
    assert re.fullmatch(r"nvidia/cuda:\S+-devel-\S+ AS build", stages[0])
    assert re.fullmatch(r"nvidia/cuda:\S+-base-\S+", stages[1])
    assert found[-1] == ("CMD", '["python", "-m", "swat_jax.info"]')
    steps = [rest for name, rest in found if name == "RUN" and "container_steps" in rest]
    assert [re.search(r"container_steps (\w+)", step)[1] for step in steps] == ["install", "check"]
    extra = re.search(r'"(\w+)\$\{CUDA%%\.\*\}"', steps[0])[1]
    version = dict(rest.split("=") for name, rest in found if name == "ARG" and "=" in rest)["CUDA"]
    assert f"{extra}{version.split('.')[0]} = [" in (ROOT / "pyproject.toml").read_text()


@needs_file
def test_ci_takes_the_same_steps():
    text = (ROOT / ".ci/run").read_text()
    for step in ("install", "check"):
        assert f"bash .ci/container_steps {step} " in text


@needs_file
@pytest.mark.parametrize("arguments", [[], ["build"], ["install"]])
def test_wrong_use_of_the_steps(arguments):
    done = subprocess.run(["bash", STEPS, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
