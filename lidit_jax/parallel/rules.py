"""Sharding rules: one table from the logical axes of arrays to the axes of the device mesh."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

# Elements of the smallest frozen weight worth sharding; below it the gather costs more than the memory saved.
MIN_SHARDED_ELEMENTS = 1 << 14

# Name scope of the matmuls whose results are reduced over the devices as gradients. XLA keeps it in the operation names
# of a compiled program, where `compile/cost.py` looks for it.
GRADIENT_SCOPE = "gradient_reduction"

MeshAxes = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Mesh axes of each logical axis; None replicates it. Changing the parallelism means changing this table.

    Weights are sharded along their width over `fsdp` (all-gathered before use) and along heads and FFN over `tensor`
    (never gathered). Small or oddly sized axes are replicated: norms, positions, image channels.
    """

    batch: MeshAxes = ("data", "fsdp")  # only devices that share a tensor-parallel group see the same samples
    length: MeshAxes = None
    embed: MeshAxes = "fsdp"  # model width, in weights
    embed_out: MeshAxes = None  # second width of a square weight: sharding one of the two suffices
    embed_activation: MeshAxes = None  # model width, in activations: not sharded
    heads: MeshAxes = "tensor"
    mlp: MeshAxes = "tensor"
    modulation: MeshAxes = "tensor"
    vocab: MeshAxes = "tensor"
    llm_embed: MeshAxes = None
    conv_in: MeshAxes = None
    conv_out: MeshAxes = "fsdp"
    bias: MeshAxes = ("fsdp", "tensor")  # stored in as many shards as possible, used as its features are
    layers: MeshAxes = None  # leading axis of stacked blocks, over which the model scans
    norm: MeshAxes = None

    def pairs(self) -> tuple[tuple[str, MeshAxes], ...]:
        """Returns the rules in Flax's form: ((logical axis, mesh axes), ...)."""
        return tuple((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))


def shardings(boxed: Any, mesh: Mesh, rules: ShardingRules) -> Any:
    """Returns the `NamedSharding` of each leaf of a parameter tree.

    An axis whose size the mesh does not divide is replicated: a bias of 3 channels is correct without sharding.

    Args:
      boxed: tree of arrays or shapes in Flax's boxes of logical axis names.
      mesh: device mesh.
      rules: mesh axes of each logical axis.

    Returns:
      The same tree with a sharding in place of each box.
    """
    specs = nn.logical_to_mesh(nn.get_partition_spec(boxed), rules.pairs())
    return jax.tree.map(
        lambda spec, leaf: NamedSharding(mesh, _divisible_spec(spec, leaf.shape, mesh)),
        specs,
        nn.unbox(boxed),
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )


def constrain(x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """Constrains the sharding of x inside a jitted function, by the same rules as `shardings`.

    Does nothing without a mesh or logical axis rules in context, nor inside a `shard_map`, where x is local to a
    device.

    Args:
      x: array.
      axes: logical name of each axis of x, or None to replicate it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AxisType.Manual in mesh.axis_types or not nn.get_logical_axis_rules():
        return x
    return jax.lax.with_sharding_constraint(x, _divisible_spec(nn.logical_to_mesh_axes(axes), x.shape, mesh))


def _divisible_spec(spec: PartitionSpec, shape: Sequence[int], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Returns the spec with None for each array axis whose size its mesh axes do not divide."""
    axes = tuple(spec) + (None,) * (len(shape) - len(spec))
    sizes = zip(axes, shape, strict=True)
    return PartitionSpec(*(axis if size % num_shards(mesh, axis) == 0 else None for axis, size in sizes))


def frozen_shardings(tree: Any, mesh: Mesh, rules: ShardingRules) -> Any:
    """Returns shardings for frozen weights that are all-gathered before use (see `replicate`).

    A weight is sharded over the mesh axes of `rules.embed` along its longest axis that they divide, and replicated if
    there is none or if the weight has fewer than `MIN_SHARDED_ELEMENTS` elements.

    Args:
      tree: tree of arrays, or of anything else with a shape.
      mesh: device mesh.
      rules: sharding rules.
    """
    shards = num_shards(mesh, rules.embed)

    def sharding_of(leaf: Any) -> NamedSharding:
        divisible = [axis for axis, size in enumerate(leaf.shape) if size % shards == 0]
        if not divisible or math.prod(leaf.shape) < MIN_SHARDED_ELEMENTS:
            return replicated(mesh)
        longest = max(divisible, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * longest, rules.embed))

    return jax.tree.map(sharding_of, tree)


def replicate(tree: Any) -> Any:
    """Constrains every array of the tree to be replicated, inside a jitted function: all-gathers sharded ones."""
    return jax.tree.map(lambda x: nn.with_logical_constraint(x, (None,) * x.ndim), tree)


def batch_sharding(mesh: Mesh, rules: ShardingRules) -> NamedSharding:
    """Returns the sharding of a batch: its leading axis over the batch axes of the mesh, the others replicated."""
    return NamedSharding(mesh, PartitionSpec(rules.batch))


def num_batch_shards(mesh: Mesh, rules: ShardingRules) -> int:
    """Returns the number of shards of a batch under `batch_sharding`."""
    return num_shards(mesh, rules.batch)


def num_shards(mesh: Mesh | AbstractMesh, axes: MeshAxes) -> int:
    """Returns the number of shards of an array axis that is sharded over these mesh axes."""
    names = () if axes is None else (axes,) if isinstance(axes, str) else axes
    return math.prod(mesh.shape[name] for name in names)


def put_sharded(arrays: Any, shardings: Any) -> Any:
    """Puts NumPy arrays on the devices with the given shardings.

    Args:
      arrays: tree of arrays, the same and complete in every process.
      shardings: the same tree of shardings.
    """
    return jax.tree.map(lambda x, to: jax.make_array_from_callback(x.shape, to, x.__getitem__), arrays, shardings)


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Returns the sharding that replicates an array on every device of the mesh."""
    return NamedSharding(mesh, PartitionSpec())
