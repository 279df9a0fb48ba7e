"""Reads `--config FILE[:METHOD]` and `--config.KEY=VALUE`; every mistake becomes a `UsageError`."""

import importlib.util
import pathlib
import types
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from swat_jax import command_line, recipe
from swat_jax.errors import UsageError, did_you_mean

EXAMPLE = "configs/digits.py:u90"


class Parser(command_line.Parser):
    """The flags of a program that takes a config: `--config` and `--config.KEY=VALUE` among them.

    Args:
      doc: see `command_line.Parser`.

    Example:
      >>> options = Parser("Trains.").parse_args(["--config=configs/digits.py", "--config.seed=4"])
      >>> options.config.seed
      4
    """

    def __init__(self, doc: str | None) -> None:
        super().__init__(doc)
        self.add_argument("--config", nargs="?", const="")

    def knows(self, flag: str) -> bool:
        return flag.startswith(("--config.", "--noconfig.")) or super().knows(flag)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As argparse's; `config` becomes the config with its overrides, None without `--config`.

        Raises:
          UsageError: unknown flag, method or config key, a value of the wrong type, a config file
            that is missing, broken or incomplete, or an argument that is no flag.
        """
        options, rest = super().parse_known_args(args, namespace)
        if options.config == "":
            self.error(f"--config: needs a file, such as {EXAMPLE}")
        config = None if options.config is None else load(options.config)
        _override(config, rest)
        options.config = config
        return options, []


def require(config: ConfigDict | None) -> ConfigDict:
    """The config, where one was given.

    Raises:
      UsageError: `--config` is missing.
    """
    if config is None:
        raise UsageError(f"--config is missing: give a file, such as {EXAMPLE}")
    return config


def _override(config: ConfigDict | None, arguments: Sequence[str]) -> None:
    """Applies `--config.KEY=VALUE`, each value in the type of its key."""
    values = flags.FlagValues()
    command = ["", *arguments]
    if config is not None:
        _check_keys(config, arguments)
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=command)
    try:
        positional = values(command)[1:]
    except flags.UnrecognizedFlagError as error:
        known = f"--{error.flagname}"
        missing = config is None and error.flagname.startswith(("config.", "noconfig."))
        raise UsageError(
            f"{known}: --config is missing" if missing else f"unknown flag {known}"
        ) from error
    except (flags.Error, TypeError, ValueError) as error:
        raise UsageError(str(error)) from error
    if positional:
        raise UsageError(f"unexpected argument {positional[0]!r}: flags start with --")


def load(text: str) -> ConfigDict:
    """The config that `FILE[:METHOD]` stands for.

    Args:
      text: path of a config file and, after a colon, the method; without one, the file's default.

    Raises:
      UsageError: the file is missing, broken or incomplete, or knows no such method.
    """
    path, colon, method = text.partition(":")
    module = load_module(pathlib.Path(path))
    try:
        config = module.get_config(method) if colon else module.get_config()
    except UsageError:
        raise
    except Exception as error:  # a config file is Python: it can fail in any way
        raise UsageError(_failed(path, error)) from error
    if not isinstance(config, ConfigDict):
        given = type(config).__name__
        raise UsageError(f"config: {path}: get_config must return a ConfigDict, got {given}")
    recipe.check_keys(config, path)
    return config


def load_module(path: pathlib.Path) -> types.ModuleType:
    """Imports a config file by its path; `sys.modules` stays as it is.

    Args:
      path: a Python file with `get_config`.

    Raises:
      UsageError: the file is missing, fails on import or defines no `get_config`.
    """
    if not path.is_file():
        raise UsageError(
            f"config: no file {str(path)!r}{_near_file(path)}; --list prints the ones there are"
        )
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UsageError(f"config: {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UsageError(_failed(path, error)) from error
    if not callable(getattr(module, "get_config", None)):
        raise UsageError(f"config: {path} defines no get_config(method)")
    return module


def _failed(path: pathlib.Path | str, error: Exception) -> str:
    return f"config: {path} failed: {type(error).__name__}: {'; '.join(str(error).split(chr(10)))}"


def _near_file(path: pathlib.Path) -> str:
    """Which config files there are with a name like that of a missing one."""
    folders = (path.parent, pathlib.Path("configs"))
    files = [file for folder in dict.fromkeys(folders) for file in sorted(folder.glob("*.py"))]
    return did_you_mean(path.stem, {file.stem: file.as_posix() for file in reversed(files)})


def _check_keys(config: ConfigDict, arguments: Sequence[str]) -> None:
    """Refuses `--config.KEY` where the config has no KEY, and says which it has."""
    for argument in arguments:
        flag = argument.partition("=")[0].lstrip("-").removeprefix("no")
        if not flag.startswith("config."):
            continue
        if flag == "config.sparsity.method":
            # It names what the other keys of the section say; alone it would only mislabel the run.
            raise UsageError(f"--{flag}: name the method after the file: --config FILE:METHOD")
        section: Any = config
        seen = "config"
        for key in flag.split(".")[1:]:
            if not isinstance(section, ConfigDict):
                raise UsageError(f"--{flag}: {seen} is a value and has no keys")
            if key not in section:
                near = recipe.near_key(f"{seen}.{key}") or f"; {seen} has: {_keys(section)}"
                raise UsageError(f"unknown key {seen}.{key}{near}")
            seen += f".{key}"
            section = section[key]


def _keys(section: ConfigDict) -> str:
    return ", ".join(sorted(section.keys()))
