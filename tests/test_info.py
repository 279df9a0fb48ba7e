"""`python -m swat_jax.info`: what it prints, and its exit code."""

import json

import pytest

from swat_jax import info, kernels, native, self_test


def boom():
    raise RuntimeError("no such kernel\nand a second line")


@pytest.fixture(autouse=True)
def quick_tests(monkeypatch):
    """Two self-tests that pass, in place of those of the ops."""
    tests = {"first": lambda: "", "second": lambda: ""}
    monkeypatch.setattr(self_test, "SELF_TESTS", tests)
    return tests


def test_json(capsys):
    assert info.main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {
        *("versions", "devices", "driver", "library", "backend", "backend_reason", "self_tests")
    }
    assert found["versions"].keys() == {"python", "swat-jax", "jax", "jaxlib", "flax"}
    assert found["devices"][0].startswith("cpu:0")
    assert found["library"].keys() >= {"available", "reason", "path"}
    assert found["backend"] == kernels.backend()
    assert found["self_tests"] == {"first": "", "second": ""}


def test_text(capsys, monkeypatch):
    status = native.Status(True, "it is loaded", None, {"cuda": "13.0", "architectures": "90a"})
    monkeypatch.setattr(native, "load", lambda: status)
    assert info.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:5]] == ["python", *info.PACKAGES]
    assert "kernels    it is loaded (CUDA 13.0, for 90a)" in lines
    assert lines[-2:] == ["self-test  first  ok", "self-test  second ok"]


def test_an_op_that_differs(capsys, quick_tests):
    quick_tests["second"] = lambda: "differs at 3"
    assert info.main([]) == 1
    assert "self-test  second differs at 3" in capsys.readouterr().out


def test_an_op_that_fails_does_not_end_the_others(capsys, quick_tests):
    quick_tests["first"] = boom
    assert info.main([]) == 1
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "self-test  first  RuntimeError: no such kernel",
        "self-test  second ok",
    ]


def test_why_this_backend(monkeypatch):
    monkeypatch.delenv("SWAT_JAX_BACKEND", raising=False)
    assert "JAX computes on cpu" in info.report()["backend_reason"]
    monkeypatch.setenv("SWAT_JAX_BACKEND", "xla")
    assert info.report()["backend_reason"] == "SWAT_JAX_BACKEND=xla"


def test_driver(monkeypatch, tmp_path):
    monkeypatch.setattr(info, "DRIVER", tmp_path / "version")
    assert info.report()["driver"] is None
    info.DRIVER.write_text("NVRM version: UNIX x86_64 Kernel Module  580.65.06  Sun\nGCC 12.2.0")
    assert info.report()["driver"] == "580.65.06"


@pytest.mark.parametrize(
    "variable", ["SWAT_JAX_BACKEND", native.VARIABLE], ids=["backend", "library"]
)
def test_a_wrong_environment(variable, monkeypatch, capsys):
    # A library that this process has registered stays, whatever the variable says later.
    monkeypatch.setattr(native, "_registered", None)
    monkeypatch.setenv(variable, "nowhere")
    assert info.main([]) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith(f"error: {variable} ")
    assert "'nowhere'" in errors
    assert errors.count("\n") == 1


def test_a_wrong_flag(capsys):
    assert info.main(["--nosuch"]) == 2
    assert "--nosuch" in capsys.readouterr().err
