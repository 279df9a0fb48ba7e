"""The devices and processes that train together: one mesh, whose axis ``data`` splits a batch."""

from __future__ import annotations

import functools

import jax
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from swat_jax.errors import UsageError

AXIS = "data"


def make_mesh(devices: int | None = None) -> Mesh:
    """A mesh with one axis, ``data``, over the first ``devices`` devices (None: all).

    Raises:
      UsageError: if there are not as many.
    """
    try:
        available = jax.devices()
    except RuntimeError as error:
        reason = "; ".join(str(error).splitlines())
        raise UsageError(
            f"JAX has no device here, check the environment variable JAX_PLATFORMS: {reason}"
        ) from error
    count = len(available) if devices is None else devices
    if not 1 <= count <= len(available):
        raise UsageError(
            f"config.devices must be between 1 and the {len(available)} devices here, got {devices}"
        )
    return jax.make_mesh((count,), (AXIS,), axis_types=(AxisType.Auto,), devices=available[:count])


def join_processes() -> None:
    """Makes this process one of several that train together, before a device is used.

    Raises:
      UsageError: if JAX cannot find out who the others are.
    """
    try:
        jax.distributed.initialize()
    except (RuntimeError, ValueError) as error:
        raise UsageError(
            f"--distributed: {error} Start it under Slurm or Open MPI, one process per GPU, or in "
            "Kubernetes, one per host, or leave the flag out"
        ) from error


def connect(mesh: Mesh) -> None:
    """Connects the processes of a run, while all of them are at the same point.

    Gloo, the transport between CPUs, gives up when a process comes to the first sum over a set of
    devices 30 seconds before another one, as it does with a program that only the first finds in
    its compilation cache. Once they are connected, they wait. The two sets are those of the mesh
    and of JAX's own checks.
    """
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("swat_jax.connect")
        add = functools.partial(lax.psum, axis_name=AXIS)
        run = jax.shard_map(add, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
        jax.block_until_ready(jax.jit(run)(np.float32(1)))
