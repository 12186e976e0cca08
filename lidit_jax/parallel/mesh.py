"""The device mesh and its axes: `data` (the only one that spans slices), `fsdp` and `tensor`."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh

from lidit_jax.errors import UserError
from lidit_jax.ranges import between, check_ranges

AXES = ("data", "fsdp", "tensor")

_Devices = Annotated[int, between(-1, 2**20)]


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The `mesh` section of a config: the number of devices along each axis, which `resolve_sizes` completes.

    Attributes:
      data: devices along the axis `data`; -1 takes the rest of the devices, as for the others.
      fsdp: devices along the axis `fsdp`.
      tensor: devices along the axis `tensor`.
    """

    data: _Devices = 1
    fsdp: _Devices = 1
    tensor: _Devices = 1

    def __post_init__(self):
        check_ranges(self, "mesh.")


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a mesh over all devices.

    Slices are joined by the data-centre network alone, so they are laid out along `data`: only gradients are reduced
    between slices.

    Args:
      sizes: axis name -> number of devices along it; an absent axis has 1, and one axis may be -1 to take the rest.
      devices: devices of the mesh; default: all that JAX sees.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or the number of slices does not divide `data`.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = resolve_sizes(sizes, len(devices))
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        # Allow a mesh axis to take up a part of an axis of the slice's torus.
        return Mesh(mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True), AXES)
    if shape[0] % slices:
        raise UserError(
            f"mesh data={shape[0]} is not a multiple of the {slices} slices: use --config.mesh.data={slices} and "
            "--config.mesh.fsdp=-1"
        )
    within = (shape[0] // slices, *shape[1:])
    across = (slices, 1, 1)
    grid = mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES)


def check_model(mesh: Mesh, hidden_size: int, num_heads: int) -> None:
    """Checks that the mesh divides the model; what it does not divide would be replicated on every device.

    Args:
      mesh: mesh with the axes `fsdp` and `tensor`.
      hidden_size: model width, sharded over `fsdp`.
      num_heads: attention heads, sharded over `tensor`.

    Raises:
      UserError: `fsdp` does not divide the width, or `tensor` does not divide the heads.
    """
    for axis, field, size in (("fsdp", "model.hidden_size", hidden_size), ("tensor", "model.num_heads", num_heads)):
        if size % mesh.shape[axis]:
            divisors = [n for n in range(1, mesh.shape[axis] + 1) if size % n == 0 and mesh.devices.size % n == 0]
            raise UserError(
                f"mesh {axis}={mesh.shape[axis]} does not divide {field}={size}: use one of "
                f"{', '.join(map(str, divisors))}, and data=-1 for the rest of the {mesh.devices.size} devices"
            )


def resolve_sizes(sizes: Mapping[str, int], num_devices: int) -> tuple[int, int, int]:
    """Returns the sizes in the order of `AXES`, with -1 replaced by the number of devices that remain for it.

    Raises:
      UserError: a size is 0 or below -1, more than one is -1, or the product is not the number of devices.
    """
    shape = [sizes.get(axis, 1) for axis in AXES]
    given = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, shape, strict=True))
    if shape.count(-1) > 1 or any(size < 1 and size != -1 for size in shape):
        raise UserError(f"mesh ({given}): sizes must be positive, and at most one may be -1")
    known = int(np.prod([size for size in shape if size != -1]))
    if -1 in shape and num_devices % known == 0:
        shape[shape.index(-1)] = num_devices // known
    if int(np.prod(shape)) != num_devices:
        devices = "one device" if num_devices == 1 else f"{num_devices} devices"
        raise UserError(f"mesh ({given}) does not fit {devices}: the sizes must multiply to {num_devices}")
    return tuple(shape)
