"""One table from the logical axes of arrays to the axes of the device mesh."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

# Numbers in a frozen weight that is worth cutting: of fewer, a message costs more than the memory.
CUT_FROM = 1 << 14

# Name scope of the products whose results are reduced over the devices as gradients: XLA keeps it in the names of a
# compiled program, where `compile/hlo.py` looks for it.
GRADIENT_SCOPE = "gradient_reduction"

MeshAxes = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Where each logical axis goes; changing the parallelism is changing this table.

    Weights are cut along their width over `fsdp` (gathered when used) and along heads and FFN over `tensor` (never
    gathered). What is small, or has an odd size, stays whole: norms, positions, image channels.
    """

    batch: MeshAxes = ("data", "fsdp")  # every device but its tensor partners sees other samples
    length: MeshAxes = None
    embed: MeshAxes = "fsdp"  # the model width of weights
    embed_out: MeshAxes = None  # the second width of a square weight: one of the two is enough
    embed_activation: MeshAxes = None  # activations keep their width whole
    heads: MeshAxes = "tensor"
    mlp: MeshAxes = "tensor"
    modulation: MeshAxes = "tensor"
    vocab: MeshAxes = "tensor"
    llm_embed: MeshAxes = None
    conv_in: MeshAxes = None
    conv_out: MeshAxes = "fsdp"
    bias: MeshAxes = ("fsdp", "tensor")  # cut as finely as can be; used as the features are that it is added to
    layers: MeshAxes = None  # the scanned depth
    norm: MeshAxes = None

    def pairs(self) -> tuple[tuple[str, MeshAxes], ...]:
        """As Flax takes them: ((logical axis, mesh axes), ...)."""
        return tuple((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))


def shardings(boxed: Any, mesh: Mesh, rules: ShardingRules) -> Any:
    """For a tree whose leaves carry logical axes (Flax's boxes), the tree of `NamedSharding`, without boxes.

    An axis that the mesh does not divide stays whole: a bias of 3 channels need not be cut to be correct.
    """
    specs = nn.logical_to_mesh(nn.get_partition_spec(boxed), rules.pairs())

    fit = lambda spec, leaf: NamedSharding(mesh, _fit(spec, leaf.shape, mesh))  # noqa: E731
    is_spec = lambda x: isinstance(x, PartitionSpec)  # noqa: E731
    return jax.tree.map(fit, specs, nn.unbox(boxed), is_leaf=is_spec)


def constrain(x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """Inside a jitted function: shards x by its logical axes, as `shardings` stores a weight of these.

    Does nothing where no mesh or no logical rules are in force, and inside a `shard_map`, where x is one device's own.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AxisType.Manual in mesh.axis_types or not nn.get_logical_axis_rules():
        return x
    return jax.lax.with_sharding_constraint(x, _fit(nn.logical_to_mesh_axes(axes), x.shape, mesh))


def _fit(spec: PartitionSpec, shape: Sequence[int], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The spec without the mesh axes that do not divide the array's."""
    axes = tuple(spec) + (None,) * (len(shape) - len(spec))
    sizes = zip(axes, shape, strict=True)
    return PartitionSpec(*(axis if size % num_shards(mesh, axis) == 0 else None for axis, size in sizes))


def stored_shardings(tree: Any, mesh: Mesh, rules: ShardingRules) -> Any:
    """For frozen weights that are used whole (`whole`): each is cut along its longest axis that the mesh divides.

    Args: tree: of anything with a shape.
    """
    shards = num_shards(mesh, rules.embed)

    def cut(leaf: Any) -> NamedSharding:
        fitting = [axis for axis, size in enumerate(leaf.shape) if size % shards == 0]
        if not fitting or math.prod(leaf.shape) < CUT_FROM:
            return replicated(mesh)
        longest = max(fitting, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * longest, rules.embed))

    return jax.tree.map(cut, tree)


def whole(tree: Any) -> Any:
    """Inside a jitted function: the tree's arrays, gathered where a device has a part of them."""
    return jax.tree.map(lambda x: nn.with_logical_constraint(x, (None,) * x.ndim), tree)


def batch_sharding(mesh: Mesh, rules: ShardingRules) -> NamedSharding:
    """Leading axis over the batch axes of the mesh, the rest whole."""
    return NamedSharding(mesh, PartitionSpec(rules.batch))


def num_batch_shards(mesh: Mesh, rules: ShardingRules) -> int:
    """Parts that `batch_sharding` cuts a batch into."""
    return num_shards(mesh, rules.batch)


def num_shards(mesh: Mesh | AbstractMesh, axes: MeshAxes) -> int:
    """Parts that mesh axes cut an array's axis into."""
    names = () if axes is None else (axes,) if isinstance(axes, str) else axes
    return math.prod(mesh.shape[name] for name in names)


def place(arrays: Any, places: Any) -> Any:
    """NumPy arrays, of which every process has the whole, on the devices as the tree of shardings says."""
    return jax.tree.map(lambda x, to: jax.make_array_from_callback(x.shape, to, x.__getitem__), arrays, places)


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())
