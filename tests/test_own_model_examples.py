"""What the documentation shows for models of one's own does run."""

import doctest
import importlib
import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
MODULES = (
    "abstract_call", "budgets", "linen.layers", "linen.surgery", "model_summary", "patterns",
    "sparsity.per_layer", "surgery",
)  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    found = doctest.testmod(importlib.import_module(f"swat_jax.{name}"))
    assert found.attempted > 0
    assert found.failed == 0


def test_the_readme_on_your_own_model(capsys):
    text = README[README.index("**Your own model**") : README.index("**The functions**")]
    nnx_part, linen_part = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {}
    exec(compile(nnx_part, "README.md", "exec"), names)
    assert "3 conv and linear layers, 2 of them sparse" in capsys.readouterr().out
    assert names["loss"] > 0
    x = names["x"]
    assert (names["plain"](x) == names["model"](x)).all()
    exec(compile(linen_part, "README.md", "exec"), names)
    assert (names["same"] == names["y"]).all()
