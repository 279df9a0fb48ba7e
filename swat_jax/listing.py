"""The table of `python -m swat_jax.main --list`: every config file, every method it lists."""

import pathlib

from swat_jax import config_file
from swat_jax.errors import UsageError

COLUMNS = ("dataset", "network", "method", "command")


def rows(config_dir: str | pathlib.Path = "configs") -> list[dict[str, str]]:
    """One row for each (config file, method of its `METHODS`).

    Every config is really made, so that a row that cannot be is noticed here.

    Args:
      config_dir: folder of the config files; every `*.py` in it counts.

    Returns:
      Dicts of `config` (the file), `dataset`, `network`, `method` and `command`, files in
      alphabetical order, methods as the file lists them.

    Raises:
      UsageError: no such folder, no config file in it, or a broken one.
    """
    folder = pathlib.Path(config_dir)
    paths = sorted(folder.glob("*.py"))
    if not paths:
        raise UsageError(f"no config files in {str(folder)!r}: run from the project's root folder")
    return [row for path in paths for row in _rows_of(path)]


def _rows_of(path: pathlib.Path) -> list[dict[str, str]]:
    module = config_file.load_module(path)
    methods = getattr(module, "METHODS", None)
    if not isinstance(methods, tuple) or not methods:
        raise UsageError(f"config: {path} lists no METHODS")
    result = []
    for method in methods:
        config = config_file.load(f"{path}:{method}")
        workdir = f"runs/{path.stem}_{method}"
        flags = f"--config {path.as_posix()}:{method} --workdir {workdir}"
        if config.data.source not in ("digits", "synthetic"):
            flags += " --config.data.data_dir DATA"
        result.append(
            {
                "config": path.as_posix(),
                "dataset": config.dataset,
                "network": config.model.name,
                "method": method,
                "command": f"python -m swat_jax.main {flags}",
            }
        )
    return result


def render(table: list[dict[str, str]]) -> str:
    """The rows as aligned text with a heading."""
    lines = [dict(zip(COLUMNS, COLUMNS, strict=True)), *table]
    widths = {column: max(len(line[column]) for line in lines) for column in COLUMNS}
    return "\n".join(
        "  ".join(line[column].ljust(widths[column]) for column in COLUMNS).rstrip()
        for line in lines
    )
