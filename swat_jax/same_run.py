"""Whether a run may go on from what is saved: their configs are compared, key by key."""

from collections.abc import Mapping
from typing import Any

from swat_jax.errors import UsageError
from swat_jax.jsonable import plain

# What may differ between a run and the run that it goes on from: these keys, and all below them.
FREE_KEYS = (
    "checkpoint",
    "data.data_dir",
    "data.workers",
    "devices",
    "eval",
    "log",
    "max_steps",
    "sparsity.algorithms",
    "steps_per_dispatch",
)


def check_same_run(
    saved: Mapping[str, Any], config: Mapping[str, Any], *, where: str = "the checkpoint"
) -> None:
    """Refuses to go on with a run under another config.

    Args:
      saved: the config that was stored, a nested dict.
      config: the config of this run, a nested dict; `FREE_KEYS` may differ.
      where: what the message calls the place that `saved` comes from.

    Raises:
      UsageError: names every key that differs, with both values.

    Example:
      >>> check_same_run({"seed": 0, "log": {"every_steps": 5}}, {"seed": 0, "log": {}})
      >>> check_same_run({"seed": 0}, {"seed": 1})  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      ...
      swat_jax.errors.UsageError: the checkpoint is of another run: config.seed is 1, was 0; ...
    """
    before, now = _flat(plain(saved)), _flat(plain(config))
    differences = [
        f"config.{key} is {_show(now, key)}, was {_show(before, key)}"
        for key in sorted({**before, **now})
        if not any(key == free or key.startswith(f"{free}.") for free in FREE_KEYS)
        and (key in before, before.get(key)) != (key in now, now.get(key))
    ]
    if differences:
        raise UsageError(
            f"{where} is of another run: {'; '.join(differences)}; "
            "use another --workdir, or the values that were"
        )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _show(flat: Mapping[str, Any], key: str) -> str:
    return repr(flat[key]) if key in flat else "absent"
