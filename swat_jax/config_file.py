"""Reads `--config FILE[:METHOD]` and `--config.KEY=VALUE`; every mistake becomes a `UsageError`."""

import importlib.util
import pathlib
import types
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from swat_jax import recipe
from swat_jax.errors import UsageError


def parse_flags(flag_values: flags.FlagValues, argv: Sequence[str]) -> ConfigDict | None:
    """Parses a command line: the program's own flags, `--config` and its overrides.

    Args:
      flag_values: where the program's own flags are defined already.
      argv: command line, program name first.

    Returns:
      The config with its overrides applied, or None where `--config` was not given.

    Raises:
      UsageError: unknown flag, method or config key, a value of the wrong type, a config file that
        is missing, broken or incomplete, or an argument that is no flag.
    """
    file, arguments = _take_config(argv)
    config = None if file is None else load(file)
    if config is not None:
        _check_overrides(config, arguments)
        config_flags.DEFINE_config_dict(
            "config", config, flag_values=flag_values, sys_argv=arguments
        )
    try:
        positional = flag_values(arguments)[1:]
    except (flags.Error, TypeError, ValueError) as error:
        raise UsageError("; ".join(str(error).split("\n"))) from error
    if positional:
        raise UsageError(f"unexpected argument {positional[0]!r}: flags start with --")
    return config


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
        raise UsageError(f"config: no file {str(path)!r}; --list prints the ones there are")
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


def _take_config(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """Splits `--config FILE` or `--config=FILE` off the command line."""
    file, rest = None, []
    arguments = iter(argv)
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name not in ("--config", "-config"):
            rest.append(argument)
            continue
        file = value if equals else next(arguments, "")
        if not file or file.startswith("-"):
            raise UsageError("--config: needs a file, such as configs/digits.py:u90")
    return file, rest


def _check_overrides(config: ConfigDict, arguments: Sequence[str]) -> None:
    """Refuses `--config.KEY` where the config has no KEY, and names the keys that it has."""
    for argument in arguments:
        flag = argument.partition("=")[0].lstrip("-")
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
                raise UsageError(f"--{flag}: {seen} has no key {key!r}; it has: {_keys(section)}")
            seen += f".{key}"
            section = section[key]


def _keys(section: ConfigDict) -> str:
    return ", ".join(sorted(section.keys()))
