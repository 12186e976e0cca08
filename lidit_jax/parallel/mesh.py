"""The device mesh: `data` (across slices), `fsdp`, `tensor`."""

from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh

from lidit_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices; one size may be -1 and is filled in.

    Raises:
      UserError: if the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = fill_in(sizes, len(devices))
    return Mesh(mesh_utils.create_device_mesh(shape, devices), AXES)


def fill_in(sizes: Mapping[str, int], num_devices: int) -> tuple[int, int, int]:
    """The sizes in the order of `AXES`, with -1 replaced by what is left of the devices."""
    shape = [sizes.get(axis, 1) for axis in AXES]
    wanted = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, shape, strict=True))
    if shape.count(-1) > 1 or any(size < 1 and size != -1 for size in shape):
        raise UserError(f"mesh ({wanted}): sizes are positive and at most one of them is -1")
    known = int(np.prod([size for size in shape if size != -1]))
    if -1 in shape and num_devices % known == 0:
        shape[shape.index(-1)] = num_devices // known
    if int(np.prod(shape)) != num_devices:
        raise UserError(f"mesh ({wanted}) does not fit {num_devices} devices: the sizes must multiply to that")
    return tuple(shape)
