"""What every test needs before JAX starts: the CPU with four fake devices, and a compilation cache.

The fake devices exist only if `XLA_FLAGS` says so before JAX initialises, and subprocesses (the
command line, the workers that are killed) must see the same ones: hence environment variables.
Whoever has a GPU runs `JAX_PLATFORMS=cuda,cpu pytest tests/gpu`.
"""

import gc
import importlib
import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

FAKE_DEVICES = 4
GPU_TESTS = Path(__file__).parent / "gpu"

if "jax" in sys.modules:
    raise RuntimeError(
        "JAX was imported before tests/conftest.py: the fake devices would not exist"
    )

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={FAKE_DEVICES}"
    ).strip()
# Most of the time goes into compiling programs that run once, much of it into optimising loops that
# are short here. What XLA fuses and in which order it sums is the same; GPU tests are not touched.
if (
    os.environ["JAX_PLATFORMS"] == "cpu"
    and "xla_backend_optimization_level" not in os.environ["XLA_FLAGS"]
):
    os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=1"
# Tracing makes many objects that live on, and collecting them over and over takes its time. Pytest
# collects at the end, so what was left open is still found.
gc.set_threshold(100_000, 50, 100)
# rich would take either for a terminal and draw into the output that tests read.
os.environ.pop("FORCE_COLOR", None)
os.environ.pop("TTY_COMPATIBLE", None)

# Compilation makes the first example slow, so no deadline; CI draws the same examples every time.
settings.register_profile("swat", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("swat")


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist, for `-n auto`
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """All tests run in several processes, files named on the command line in this one.

    A process takes up to 3 GB, hence no more than four; and a GPU has room for one alone.
    """
    if config.args_source != config.ArgsSource.TESTPATHS or os.environ["JAX_PLATFORMS"] != "cpu":
        return 0
    count = min(len(os.sched_getaffinity(0)), 4)
    return count if count > 1 else 0


def pytest_configure(config: pytest.Config) -> None:
    """Keeps compiled programs under pytest's cache, for reruns and subprocesses."""
    if hasattr(config, "cache") and config.cache is not None:
        folder = config.cache.mkdir("jax")
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def _gpu_missing() -> str:
    """Why the GPU tests cannot run; empty where they can."""
    import jax

    try:
        jax.devices("cuda")
    except RuntimeError as error:
        platforms = os.environ["JAX_PLATFORMS"]
        return f"no GPU that JAX can use ({str(error).splitlines()[0]}; JAX_PLATFORMS={platforms})"
    return ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks everything under tests/gpu, and skips it where there is no GPU."""
    gpu_items = [item for item in items if GPU_TESTS in item.path.parents]
    if not gpu_items:
        return
    reason = _gpu_missing()
    for item in gpu_items:
        item.add_marker(pytest.mark.gpu)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says aloud that the GPU tests did not run: without them green proves nothing about CUDA."""
    skipped = [
        report
        for report in terminalreporter.stats.get("skipped", [])
        if report.nodeid.startswith("tests/gpu/")
    ]
    if skipped:
        terminalreporter.section("GPU TESTS WERE SKIPPED", sep="!", red=True, bold=True)
        terminalreporter.line(
            f"{len(skipped)} tests under tests/gpu did not run: {skipped[0].longrepr[2]}"
        )


@pytest.fixture(scope="session")
def fake_devices() -> list:
    """The four CPU devices (`jax.Device`) that data-parallel tests spread over."""
    import jax

    devices = jax.devices("cpu")
    assert len(devices) >= FAKE_DEVICES, (
        f"{len(devices)} CPU devices; set XLA_FLAGS before JAX starts"
    )
    return devices[:FAKE_DEVICES]


@pytest.fixture
def load(monkeypatch):
    """Imports a benchmark as it is when it is run."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module
