"""Imports go down only: the layout of the package, read from its source.

A new module has to be placed in `LEVELS`; a module may import what stands in a lower level, and
modules of its own folder as long as they make no circle.
"""

import ast
import graphlib
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "swat_jax"

# From the bottom to the top; a folder stands for all that is in it.
LEVELS = (
    {"errors", "files", "jsonable", "abstract_call"},
    {"command_line", "patterns", "same_run", "orbax_errors"},
    {
        "sparse_file",
        "sparsity",
        "method",
        "recipe",
        "optimizer",
        "checkpoint",
        "metrics",
        "data",
        "native",
    },
    {"batch_norm", "max_pool", "dropout_bits", "convolution", "activations"},
    {"sparse_convolution"},
    {"sparse_conv_direct", "vector_convolution"},
    {"kernels", "config_file", "timing"},
    {"candidates", "self_test"},
    {"algorithms", "layer_state"},
    {"functional", "algorithm_table", "layer_base"},
    {"layers", "linen", "dropout"},
    {"norm_relu", "surgery"},
    {"models", "fusion"},
    {"layer_table"},
    {"build"},
    {"dispatch"},
    {"kept_bytes"},
    {"flops", "listing", "model_summary"},
    {"network", "data_parallel"},
    {"pruning"},
    {"step", "budgets"},
    {"feed", "training_setup"},
    {"scoring"},
    {"train", "trial"},
    {"tune"},
    {"main", "info", "report_figures", "export"},
    {"report", "evaluate", "predict"},
)
HEIGHT = {unit: height for height, units in enumerate(LEVELS) for unit in units}

# What only one file or folder may use, and why it would be missed elsewhere.
ONLY_IN = {
    "custom_vjp": ("swat_jax.functional", "gradient rules have one place"),
    "custom_jvp": ("swat_jax.functional", "gradient rules have one place"),
    "ffi_call": ("swat_jax.kernels.custom_call", "every native op has its jnp twin beside it"),
    "register_ffi_target": ("swat_jax.native", "a refused registration ends the backend"),
}
NOT_AT_ALL = ("tensorflow", "torch", "clu", "tests", "configs", "benchmarks")


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(module: str) -> set[str]:
    """Absolute names of all that is imported, anywhere in the file, TYPE_CHECKING blocks too."""
    found = set()
    for node in ast.walk(ast.parse(SOURCES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: write imports in full, not relative ones"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found.add(name if name in SOURCES else str(node.module))
    return found


def own_imports(module: str) -> set[str]:
    return {name for name in imports_of(module) if name.split(".")[0] == "swat_jax"}


def unit_of(module: str) -> str:
    return module.split(".")[1]


INNER = [module for module in SOURCES if module != "swat_jax"]


def test_there_is_something_to_check():
    assert {"swat_jax.errors", "swat_jax.sparsity.top_k"} <= set(SOURCES)
    assert own_imports("swat_jax.optimizer") == {"swat_jax.errors"}


@pytest.mark.parametrize("module", INNER)
def test_imports_go_down(module):
    assert unit_of(module) in HEIGHT, f"give {module} a place in LEVELS"
    for imported in own_imports(module):
        assert imported != "swat_jax", f"{module} imports the package's own front door"
        assert imported in SOURCES, f"{module} imports {imported}, which is no module"
        if unit_of(imported) != unit_of(module):
            assert HEIGHT[unit_of(imported)] < HEIGHT[unit_of(module)], (
                f"{module} imports {imported}, which is not below it"
            )


def test_the_list_in_the_readme_goes_down():
    text = (PACKAGE.parent / "README.md").read_text(encoding="utf-8")
    table = text[text.index("| to change | look at |") : text.index("Imports go down that list")]
    units = re.findall(r"`swat_jax/(\w+)", table)
    assert len(units) >= 9
    heights = [HEIGHT[unit] for unit in units]
    assert heights == sorted(heights, reverse=True), units


def test_no_circles():
    graph = {module: own_imports(module) - {module} for module in INNER}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) >= len(INNER)


def test_networks_are_built_without_the_command_line():
    """What takes a network from Python needs neither flags nor the recipes of the paper."""
    reached, waiting = set(), ["swat_jax.build"]
    while waiting:
        module = waiting.pop()
        reached.add(module)
        waiting += own_imports(module) - reached
    assert "swat_jax.layers" in reached
    assert not reached & {"swat_jax.config_file", "swat_jax.recipe", "swat_jax.flops"}
    imported = set().union(*map(imports_of, reached))
    assert not {name for name in imported if name.split(".")[0] in ("absl", "ml_collections")}


@pytest.mark.parametrize("module", SOURCES)
def test_what_has_its_own_place_stays_there(module):
    for imported in imports_of(module):
        assert imported.split(".")[0] not in NOT_AT_ALL, f"{module} imports {imported}"
    for node in ast.walk(ast.parse(SOURCES[module].read_text())):
        name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", None)
        home, why = ONLY_IN.get(str(name), (module, ""))
        assert f"{module}.".startswith(f"{home}."), (
            f"{module} uses {name}, which belongs in {home}: {why}"
        )


def test_every_handler_of_the_library_is_called_and_no_other():
    (handlers,) = (
        ast.literal_eval(node.value)
        for node in ast.parse(SOURCES["swat_jax.native"].read_text()).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "HANDLERS"
    )
    calls = [
        node
        for module in INNER
        if unit_of(module) == "kernels"
        for node in ast.walk(ast.parse(SOURCES[module].read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "custom_call.call"
    ]
    assert {ast.literal_eval(call.args[0]) for call in calls} == set(handlers)


def test_the_front_door_only_names_what_is_behind_it():
    """But for the type checker, and for what is imported when it is used."""
    tree = ast.parse(SOURCES["swat_jax"].read_text())
    late = [node for node in tree.body if isinstance(node, ast.If | ast.FunctionDef)]
    names = [
        node.name if isinstance(node, ast.FunctionDef) else ast.unparse(node.test) for node in late
    ]
    assert names == ["TYPE_CHECKING", "__getattr__"]
    kinds = {type(node) for node in tree.body if node not in late}
    assert kinds <= {ast.Expr, ast.Import, ast.ImportFrom, ast.Assign}, (
        "swat_jax/__init__.py does work"
    )
