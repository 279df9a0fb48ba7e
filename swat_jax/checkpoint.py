"""Checkpoints: orbax behind `save` and `restore`; `score` adds what is known later.

    <directory>/<step>/state/       the arrays (orbax, readable with orbax alone)
    <directory>/<step>/run/         JSON: step, data position, config, every array's type
    <directory>/<step>/scores.json  metrics, and the data position as of then; once it was scored

A checkpoint is written under another name and renamed when it is complete, and one that is no
longer kept is renamed before it is deleted. So whatever carries a plain number for a name is
complete, at whatever moment a run was killed; everything else is swept away by the next save.

Saving is synchronous: when `save` returns, the checkpoint is there. It costs some 20 ms and about
1 ms for each array, more for hundreds of megabytes.
"""

import contextlib
import dataclasses
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from swat_jax.errors import RunError, UsageError
from swat_jax.files import replace_text
from swat_jax.jsonable import plain
from swat_jax.orbax_errors import one_line, quiet_orbax, refused_by_disk
from swat_jax.same_run import check_same_run

_TRASH = "trash-"
_SCORES = "scores.json"


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint that was read.

    Attributes:
      state: the arrays, in the template's structure and on its devices.
      position: what `save`, or later `score`, was given: where to go on in the data.
      step: the step at which it was saved.
      metrics: what `score` was given, or empty.
      refreshed: the top-level entries of the state that did not fit and stayed the template's own.
    """

    state: dict[str, Any]
    position: dict[str, Any]
    step: int
    metrics: dict[str, float]
    refreshed: tuple[str, ...] = ()


def complete_steps(directory: Path) -> list[int]:
    """The steps of all complete checkpoints in a folder, rising; none where there is no folder."""
    try:
        names = [path.name for path in directory.iterdir() if path.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(int(name) for name in names if name.isdecimal())


class Checkpointer:
    """The checkpoints of one run.

    Args:
      directory: where they lie; made by the first `save`.
      keep: how many of the newest stay, at least 1.
      config: the run's config as a plain nested dict. It is stored in every checkpoint, and
        `restore` refuses a checkpoint of another one.
      best_metric: the name of a metric, the greater the better. Among the checkpoints that were
        scored with it, the best one stays too, the earliest of equals.

    Raises:
      UsageError: `keep` is below 1.

    Example:
      >>> import numpy as np
      >>> state = {"step": np.int32(7)}
      >>> with Checkpointer(Path("run/checkpoints").absolute(), config={"seed": 0}) as checkpoints:
      ...     assert checkpoints.restore(state) is None  # a new run
      ...     saved = checkpoints.save(7, state, {"epoch": 3, "step_in_epoch": 0})
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        config: Mapping[str, Any],
        keep: int = 1,
        best_metric: str | None = None,
    ) -> None:
        if keep < 1:
            raise UsageError(f"config.checkpoint.keep is {keep}; keep at least 1 checkpoint")
        self.directory = Path(directory).absolute()
        self._config = plain(config)
        self._keep = keep
        self._best_metric = best_metric
        self._orbax = ocp.Checkpointer(
            ocp.CompositeCheckpointHandler(
                state=ocp.PyTreeCheckpointHandler(), run=ocp.JsonCheckpointHandler()
            )
        )

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets orbax's threads go."""
        self._orbax.close()

    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, rising."""
        return complete_steps(self.directory)

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        position: Mapping[str, Any],
    ) -> bool:
        """Writes a checkpoint and deletes those that are no longer kept.

        Args:
          step: its number; also the order of age.
          state: nested dict (any pytree below the top level) of arrays, on one device or sharded
            over a mesh.
          position: JSON values that say where to go on in the data.

        Returns:
          False where a checkpoint of this step is there already: it stays as it is, since a run
          has one state at one step.

        Raises:
          RunError: the disk is full or cannot be written. Earlier checkpoints are untouched.
          ValueError: an array has no elements; orbax cannot save one.
        """
        if step in self.steps():
            return False
        run = {
            "step": int(step),
            "position": plain(position),
            "metrics": {},
            "config": self._config,
            "arrays": _array_types(state),
        }
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave(dict(state)), run=ocp.args.JsonSave(run)
        )
        try:
            if jax.process_index() == 0:
                self.directory.mkdir(parents=True, exist_ok=True)
                self._sweep()
                self._check_room(step, state)
            with quiet_orbax():
                self._orbax.save(self.directory / str(step), args=args)
        except Exception as error:
            reason = refused_by_disk(error)
            if reason is None:
                raise
            # What was written so far is in the way of whatever else needs the disk.
            self._sweep()
            raise RunError(
                f"cannot save the checkpoint of step {step} in {self.directory}: {reason}; "
                "earlier checkpoints are intact: make room there and run again"
            ) from error
        self._delete_old()
        return True

    def score(self, step: int, position: Mapping[str, Any], metrics: Mapping[str, float]) -> bool:
        """Adds to a checkpoint what is known only after it was saved.

        Deletes the checkpoints that are no longer kept, now that it may be the best.

        Args:
          step: that of the checkpoint.
          position: in place of what `save` was given.
          metrics: name -> number.

        Returns:
          False where there is no checkpoint of this step.

        Raises:
          RunError: the disk is full or cannot be written. The checkpoint stays without scores.
        """
        if step not in self.steps():
            return False
        if jax.process_index() == 0:
            numbers = {name: float(value) for name, value in metrics.items()}
            text = json.dumps({"position": plain(position), "metrics": numbers})
            path = self.directory / str(step) / _SCORES
            try:
                replace_text(path, text)
            except OSError as error:
                raise RunError(
                    f"cannot write {path}: {error.strerror or error}; the checkpoint itself is "
                    "intact: make room there and run again"
                ) from error
        self._delete_old()
        return True

    def restore(
        self, template: Mapping[str, Any], *, best: bool = False, refresh: Sequence[str] = ()
    ) -> Restored | None:
        """Reads the newest complete checkpoint.

        Args:
          template: nested dict of arrays or `jax.ShapeDtypeStruct`s like the state that was saved.
            Each array is read onto the template's sharding, which may span other devices than
            when it was saved; a template leaf without a sharding means the first device.
          best: read the best checkpoint by `best_metric` in place of the newest.
          refresh: top-level entries of the state that may have other shapes than were saved, such
            as activation thresholds on another number of devices. One that does is not read:
            the template's stays, and `refreshed` names it.

        Returns:
          The checkpoint, or None where there is none.

        Raises:
          UsageError: it belongs to another config, or its arrays have other names, shapes or types
            than the template.
          RunError: it cannot be read.
        """
        runs = self._best_runs() if best else None
        steps = self.steps() if runs is None else [step for _, step in runs]
        if not steps:
            return None
        path = self.directory / str(steps[-1])
        run = self._read_run(path)
        check_same_run(run["config"], self._config, where=f"the checkpoint {path}")

        saved, wanted = run["arrays"], _array_types(template)
        refreshed = tuple(name for name in refresh if _below(saved, name) != _below(wanted, name))
        parts = {name: value for name, value in template.items() if name not in refreshed}
        unread = [name for name in {**saved, **wanted} if name.split("/")[0] in refreshed]
        differences = [
            f"{name} is {wanted.get(name, 'absent')}, was {saved.get(name, 'absent')}"
            for name in {**saved, **wanted}
            if name not in unread and saved.get(name) != wanted.get(name)
        ]
        if differences:
            raise UsageError(
                f"the checkpoint {path} does not fit this network: {_some(differences)}; "
                "use another --workdir"
            )
        abstract = jax.tree.map(_abstract, parts)
        args = ocp.args.PyTreeRestore(
            item=abstract,
            restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
            partial_restore=True,
        )
        state = self._read(path, state=args)["state"] if parts else {}
        return Restored(
            state={**template, **state},
            position=run["position"],
            step=run["step"],
            metrics=run["metrics"],
            refreshed=refreshed,
        )

    def _read_run(self, path: Path) -> dict[str, Any]:
        run = self._read(path, run=ocp.args.JsonRestore())["run"]
        try:
            return run | json.loads((path / _SCORES).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return run
        except (OSError, ValueError) as error:
            raise _unreadable(path, error) from error

    def _read(self, path: Path, **items: ocp.args.CheckpointArgs) -> Any:
        try:
            with quiet_orbax():
                return self._orbax.restore(path, args=ocp.args.Composite(**items))
        except Exception as error:
            raise _unreadable(path, error) from error

    def _best_runs(self) -> list[tuple[float, int]]:
        """(metric, step) of the checkpoints that have the metric, the best one last."""
        found = []
        for step in self.steps():
            value = self._read_run(self.directory / str(step))["metrics"].get(self._best_metric)
            if value is not None:
                found.append((-math.inf if math.isnan(value) else value, step))
        return sorted(found, key=lambda run: (run[0], -run[1]))

    def _delete_old(self) -> None:
        if jax.process_index() == 0:
            kept = self.steps()[-self._keep :]
            if self._best_metric is not None:
                kept += [step for _, step in self._best_runs()[-1:]]
            for step in self.steps():
                if step not in kept:
                    trash = self.directory / f"{_TRASH}{step}"
                    (self.directory / str(step)).rename(trash)
                    shutil.rmtree(trash, ignore_errors=True)
        if jax.process_count() > 1:  # nobody may list the directory while it changes
            multihost_utils.sync_global_devices("swat_jax.checkpoint.delete")

    def _check_room(self, step: int, state: Mapping[str, Any]) -> None:
        """A full disk is noticed before anything is written to it, where it can be."""
        needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            raise RunError(
                f"cannot save the checkpoint of step {step} in {self.directory}: it needs "
                f"{needed / 2**20:.1f} MiB and {free / 2**20:.1f} MiB are free; "
                "earlier checkpoints are intact: make room there and run again"
            )

    def _sweep(self) -> None:
        """Removes what a killed or failed run left: half a checkpoint, half a deletion."""
        with contextlib.suppress(OSError):
            for path in self.directory.iterdir():
                if path.name.startswith(_TRASH) or ".orbax-checkpoint-tmp" in path.name:
                    shutil.rmtree(path, ignore_errors=True)


def _unreadable(path: Path, error: Exception) -> RunError:
    return RunError(
        f"cannot read the checkpoint {path}: {one_line(error)}; "
        "delete that folder to go on from an earlier one"
    )


def _array_types(state: Mapping[str, Any]) -> dict[str, str]:
    """`stem/kernel` -> `float32[3,3,3,64]` for every array."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
        )
        for path, leaf in jax.tree.leaves_with_path(state)
    }


def _below(types: Mapping[str, str], name: str) -> dict[str, str]:
    return {path: kind for path, kind in types.items() if path.split("/")[0] == name}


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _some(texts: Sequence[str], limit: int = 8) -> str:
    rest = f"; and {len(texts) - limit} more" if len(texts) > limit else ""
    return "; ".join(texts[:limit]) + rest
