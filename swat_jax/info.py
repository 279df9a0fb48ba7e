r"""What is installed, which backend is active and why, and if its ops are right.

Examples:
  python -m swat_jax.info
  python -m swat_jax.info --json
  SWAT_JAX_BACKEND=xla python -m swat_jax.info

Every op that has a kernel is run against its jax.numpy twin on the default
device; exit code 1 where one differs. With the backend "xla" the op is its
twin, and that comparison tells little.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from swat_jax import command_line, kernels, native, self_test

PACKAGES = ("swat-jax", "jax", "jaxlib", "flax")
DRIVER = Path("/proc/driver/nvidia/version")


def report() -> dict[str, Any]:
    """All that is printed, ready for JSON; `self_tests` maps ops to what differed, "" if nothing.

    Raises:
      UsageError: an environment variable asks for what is not there.
    """
    backend = kernels.backend()
    library = native.load()
    return {
        "versions": {"python": platform.python_version(), **{p: _version(p) for p in PACKAGES}},
        "devices": [f"{d.platform}:{d.id} {d.device_kind}" for d in jax.local_devices()],
        "driver": _driver(),
        "library": {
            "available": library.available,
            "reason": library.reason,
            "path": None if library.path is None else str(library.path),
            **library.build_info,
        },
        "backend": backend,
        "backend_reason": _why(library),
        "self_tests": {name: _run(name) for name in self_test.SELF_TESTS},
    }


def render(found: dict[str, Any]) -> str:
    """The report as text, one fact a line."""
    library = found["library"]
    kernels_line = library["reason"]
    if "cuda" in library:
        kernels_line += f" (CUDA {library['cuda']}, for {library['architectures']})"
    lines = [f"{name:10} {version}" for name, version in found["versions"].items()]
    lines += [f"{'device':10} {device}" for device in found["devices"]]
    lines += [
        f"{'driver':10} {found['driver'] or 'no NVIDIA driver'}",
        f"{'kernels':10} {kernels_line}",
        f"{'backend':10} {found['backend']}: {found['backend_reason']}",
    ]
    tests = found["self_tests"]
    width = max(map(len, tests), default=0)
    for name, difference in tests.items():
        told = command_line.colored(
            difference or "ok", "red" if difference else "green", sys.stdout
        )
        lines.append(f"{'self-test':10} {name:{width}} {told}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return command_line.run(command_line.Parser(__doc__), _report, argv)


def _report(_: Any) -> command_line.Answer:
    found = report()
    differs = any(found["self_tests"].values())
    code = command_line.FAILED if differs else command_line.DONE
    return command_line.Answer(found, render(found), code)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _driver() -> str | None:
    try:
        found = re.search(r"\d+\.\d+(\.\d+)?", DRIVER.read_text())
    except OSError:
        return None
    return found.group() if found else None


def _why(library: native.Status) -> str:
    """Why `kernels.backend` chose what it did; the order is its own."""
    asked = os.environ.get("SWAT_JAX_BACKEND")
    if asked:
        return f"SWAT_JAX_BACKEND={asked}"
    if jax.default_backend() != "gpu":
        return f"JAX computes on {jax.default_backend()}, the kernels need an NVIDIA GPU"
    return library.reason


def _run(name: str) -> str:
    try:
        return self_test.SELF_TESTS[name]()
    except Exception as error:  # whatever goes wrong, the other ops are tested too
        message = str(error).strip().partition("\n")[0]
        return f"{type(error).__name__}: {message}"


if __name__ == "__main__":
    sys.exit(main())
