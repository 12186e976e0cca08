"""One table from the logical axes of arrays to the axes of the device mesh."""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

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

    def fit(spec: PartitionSpec, leaf: Any) -> NamedSharding:
        axes = tuple(spec) + (None,) * (len(leaf.shape) - len(spec))
        sizes = zip(axes, leaf.shape, strict=True)
        fitted = [axis if size % num_shards(mesh, axis) == 0 else None for axis, size in sizes]
        return NamedSharding(mesh, PartitionSpec(*fitted))

    is_spec = lambda x: isinstance(x, PartitionSpec)  # noqa: E731
    return jax.tree.map(fit, specs, nn.unbox(boxed), is_leaf=is_spec)


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


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())
