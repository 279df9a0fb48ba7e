"""The kernels without JAX: on two streams at once, and under compute-sanitizer.

Built here with nvcc, unless SWAT_JAX_CHECK_KERNELS says where the program lies. The sanitizer is
that of CUDA, or the one that SWAT_JAX_COMPUTE_SANITIZER names, such as a newer one:
`pip install nvidia-cuda-sanitizer-api`.
"""

import os
import pathlib
import re
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[2]
CUDA_SANITIZER = "/usr/local/cuda/bin/compute-sanitizer"
# That of CUDA 13.0 (2025.3) sees races where warps wait for each other by `bar.arrive`, as in the
# weight gradient; this one does not.
RACECHECK_SINCE = (2026, 4)


def architecture():
    """Hopper's own instructions need the a, which nvcc does not add by itself."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    told = subprocess.run(query, capture_output=True, text=True, check=True)
    return "sm_90a" if told.stdout.split()[0] == "9.0" else "native"


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if given := os.environ.get("SWAT_JAX_CHECK_KERNELS"):
        return given
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    path = tmp_path_factory.mktemp("build") / "check_kernels"
    # Few blocks pack in many rounds, as a large tensor does, and thresholds are guessed at, too.
    options = ["-std=c++17", "-O3", f"-arch={architecture()}"]
    options += ["-DSWAT_JAX_MOST_BLOCKS=3", "-DSWAT_JAX_LEAST_GUESSED=40000"]
    options += ["-I", "ops", "-isystem", "ops/third_party"]
    command = [nvcc, *options, "tests/gpu/check_kernels.cu", "-o", str(path)]
    subprocess.run(command, cwd=ROOT, check=True)
    return str(path)


def test_two_streams_at_once(program):
    result = subprocess.run([program, "40", "10"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.timeout(600)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_compute_sanitizer(program, tool):
    named = os.environ.get("SWAT_JAX_COMPUTE_SANITIZER")
    sanitizer = named or shutil.which("compute-sanitizer") or CUDA_SANITIZER
    if not named and not pathlib.Path(sanitizer).exists():
        pytest.skip("no compute-sanitizer")
    told = subprocess.run([sanitizer, "--version"], capture_output=True, text=True, check=True)
    version = re.search(r"Version ([0-9]+)\.([0-9]+)", told.stdout)
    assert version, told.stdout
    if tool == "racecheck" and (int(version[1]), int(version[2])) < RACECHECK_SINCE:
        pytest.skip("this compute-sanitizer sees races at bar.arrive where there are none")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", program, "4", "1"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]
    assert "all kernels ok" in result.stdout
    unit = "hazards" if tool == "racecheck" else "errors"
    assert f"SUMMARY: 0 {unit}" in result.stdout
