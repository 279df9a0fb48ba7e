"""The library of kernels is found, checked and registered, or refused with one clear line.

The libraries here are small ones in C, so that neither nvcc nor a GPU is needed.
"""

import json
import re
import shutil
import subprocess
import threading
from collections import Counter
from pathlib import Path

import jax
import pytest

from swat_jax import native
from swat_jax.errors import UsageError

OPS = Path(__file__).parents[1] / "ops"
INFO = {"version": "0.1.0", "cuda": "13.0", "architectures": "90a-real"}
INFO_TEXT = json.dumps(INFO)
COMPILER = shutil.which("cc")


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """A process that has loaded nothing yet; yields what is registered, and how often."""
    calls = Counter()

    def register(name, fn, platform="cpu"):
        assert platform == "CUDA"
        assert "PyCapsule" in type(fn).__name__
        calls[name] += 1

    monkeypatch.setattr(jax.ffi, "register_ffi_target", register)
    monkeypatch.setattr(native, "_registered", None)
    monkeypatch.setattr(native, "_refused", {})
    monkeypatch.delenv(native.VARIABLE, raising=False)
    return calls


@pytest.fixture
def library(tmp_path, monkeypatch):
    """Compiles a library, and makes it the one to load."""
    if COMPILER is None:
        pytest.skip("no C compiler (cc)")

    def compile_it(minor=0, names=native.HANDLERS, info=INFO_TEXT, file="lib.so"):
        functions = [f"void *swat_jax_{name}(void *frame) {{ return 0; }}" for name in names]
        functions.append(f"int swat_jax_ffi_api_minor(void) {{ return {minor}; }}")
        if info is not None:
            text = json.dumps(info)  # quotes it as C does
            functions.append(f"const char *swat_jax_build_info(void) {{ return {text}; }}")
        source, path = tmp_path / f"{file}.c", tmp_path / file
        source.write_text("\n".join(functions))
        subprocess.run([COMPILER, "-shared", "-fPIC", "-o", path, source], check=True)
        monkeypatch.setenv(native.VARIABLE, str(path))
        return path

    return compile_it


def assert_refused(status, *parts):
    assert not status.available
    assert "\n" not in status.reason
    for part in (*parts, "nvcc"):
        assert part in status.reason


def test_absent(monkeypatch, registered):
    monkeypatch.setattr(native, "_places", lambda: iter([Path("/nowhere", native.LIBRARY)]))
    status = native.load()
    assert_refused(status, "not built")
    assert status.path is None
    assert not registered


def test_a_good_one_is_registered_once(library, registered):
    path = library(minor=native.jaxlib_ffi_minor())
    status = native.load()
    assert status == native.Status(True, f"{path} is loaded", path, INFO)
    assert native.load() is status
    assert registered == {f"swat_jax_{name}": 1 for name in native.HANDLERS}


def test_threads_register_once(library, registered):
    library()
    found = []
    threads = [threading.Thread(target=lambda: found.append(native.load())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert all(status is found[0] and status.available for status in found)
    assert set(registered.values()) == {1}


def test_one_that_is_too_new_is_refused_before_anything_is_registered(library, registered):
    offered = native.jaxlib_ffi_minor() or 0
    library(minor=offered + 1)
    status = native.load()
    assert_refused(status, f"0.{offered + 1}", f"this jaxlib has 0.{offered}")
    assert status.build_info == INFO
    assert not registered


def test_jaxlib_without_headers(library, registered, monkeypatch, tmp_path):
    library()
    monkeypatch.setattr(jax.ffi, "include_dir", lambda: str(tmp_path))
    assert native.jaxlib_ffi_minor() is None
    assert_refused(native.load(), "headers")
    assert not registered


def test_no_library_at_all(tmp_path, monkeypatch, registered):
    path = tmp_path / "library.so"
    path.write_text("hello")
    monkeypatch.setenv(native.VARIABLE, str(path))
    status = native.load()
    assert_refused(status, str(path), "cannot be used")
    assert status.path == path
    assert status.reason.count(str(path)) == 1
    assert native.load() is status  # not opened again
    assert not registered


@pytest.mark.parametrize(
    "wrong",
    [
        {"names": native.HANDLERS[1:]},
        {"info": None},
        {"info": "no json"},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_somebody_elses_library(wrong, library, registered):
    library(**wrong)
    assert_refused(native.load(), "not a swat_jax library of this version")
    assert not registered


def test_after_a_refusal_another_library_is_loaded(library):
    library(minor=99, file="new.so")
    assert not native.load().available
    library(file="old.so")
    assert native.load().available


def test_a_path_without_a_file_is_the_users_mistake(tmp_path, monkeypatch):
    for path in (tmp_path / "absent.so", tmp_path):
        monkeypatch.setenv(native.VARIABLE, str(path))
        with pytest.raises(UsageError, match=f"{native.VARIABLE}.*{path}"):
            native.load()


def test_headers_are_not_newer_than_jaxlib():
    header = (OPS / "third_party/xla/ffi/api/c_api.h").read_text()
    built_with = int(re.findall(r"^#define XLA_FFI_API_MINOR (\d+)", header, re.MULTILINE)[0])
    assert built_with <= native.jaxlib_ffi_minor()


def test_handlers_are_those_of_the_sources():
    defined = [
        name
        for path in OPS.glob("*.cu")
        for name in re.findall(r"^XLA_FFI_DEFINE_HANDLER_SYMBOL\((\w+)", path.read_text(), re.M)
    ]
    assert sorted(defined) == sorted(f"swat_jax_{name}" for name in native.HANDLERS)
