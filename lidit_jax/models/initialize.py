"""Random initialisation by a small program, which draws parameters of the same kind and shape together.

Flax's `Module.init` draws every parameter by operations of its own: a hundred times the same few, each of which XLA
compiles. For a small model that is a considerable part of the time before the first step.
"""

import collections
import functools
import hashlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

# Elements above which a parameter is drawn alone: taking it out of a common draw would copy it.
LARGE = 1 << 20
# Logical axis that `nn.scan` adds in front of the parameters of stacked blocks.
LAYERS = "layers"


class Parameter(nn.LogicallyPartitioned):
    """Flax's box of a parameter and its logical axes, with the initialiser that drew it.

    Attributes:
      initializer: (key, shape, dtype) -> array.
    """

    initializer: Callable[..., jax.Array] | None = flax.struct.field(default=None, pytree_node=False)

    @property
    def num_blocks(self) -> int:
        """Number of stacked blocks; 1 for a parameter that is not stacked."""
        return self.value.shape[0] if is_stacked(self) else 1

    @property
    def kind(self) -> tuple[Any, ...]:
        """Initialiser, shape and logical axes of one block, and dtype."""
        start = int(is_stacked(self))
        return self.initializer, self.value.shape[start:], self.names[start:], self.value.dtype


def is_stacked(boxed: nn.LogicallyPartitioned) -> bool:
    """Returns True if the leading axis of a boxed parameter is that of stacked blocks."""
    return boxed.names[:1] == (LAYERS,)


def partitioned(init: Callable[..., Any], axes: tuple[str | None, ...]) -> Callable[..., jax.Array]:
    """Returns an initialiser for `Module.param` whose parameter has the logical axes `axes`.

    Args:
      init: initialiser: the same object for all parameters that it draws, which `draw_together` compares.
      axes: logical axes.
    """

    def initialize(*args: Any) -> Parameter:
        return Parameter(init(*args), axes, initializer=init)

    # The initialiser returns a box, which Flax's annotations pass on; `Module.param` returns the array in it.
    return initialize  # type: ignore[return-value]


def draw_together(init: Callable[[jax.Array], Any]) -> Callable[[jax.Array], Any]:
    """Returns an initialisation like `init` whose program has one draw for all parameters of a kind, up to `LARGE`.

    A kind is an initialiser, a shape and its logical axes, so that what is drawn together is sharded alike. The values
    do not depend on the kinds: block l of a parameter (0 if it is not stacked) is
    `initializer(fold_in(fold_in(key, hash of the parameter's path), l), shape of the block, dtype)`.

    Args:
      init: key -> parameters, each in a `Parameter` (the output of Flax's `Module.init`). It is traced for its shapes
        alone.
    """

    @functools.cache
    def shapes() -> Any:
        return jax.eval_shape(lambda: init(jax.random.key(0)))  # traced once, however often the result is

    def draw(key: jax.Array) -> Any:
        leaves, tree = jax.tree_util.tree_flatten_with_path(shapes(), is_leaf=lambda x: isinstance(x, Parameter))
        boxes = {jax.tree_util.keystr(path): box for path, box in leaves}
        paths_of_kind = collections.defaultdict(list)
        for path, box in boxes.items():
            paths_of_kind[box.kind, path if box.value.size > LARGE else None].append(path)
        # The keys of all blocks of all parameters at once, in the order in which they are drawn.
        ordered = [path for paths in paths_of_kind.values() for path in paths]
        counts = [boxes[path].num_blocks for path in ordered]
        hashes = jnp.asarray(np.repeat([_hash(path) for path in ordered], counts))
        blocks = jnp.asarray(np.concatenate([np.arange(count, dtype=np.uint32) for count in counts]))
        keys = jax.vmap(functools.partial(_block_key, key))(hashes, blocks)
        values: dict[str, jax.Array] = {}
        for ((initializer, shape, _, dtype), large), paths in paths_of_kind.items():
            stops = np.cumsum([boxes[path].num_blocks for path in paths])
            draw_block = functools.partial(_draw_block, initializer, shape, dtype)
            # Blocks of a large parameter one after another: their random bits take as much memory as the parameter.
            drawn = jax.lax.map(draw_block, keys[: stops[-1]]) if large else jax.vmap(draw_block)(keys[: stops[-1]])
            keys = keys[stops[-1] :]
            values |= dict(zip(paths, jnp.split(drawn, stops[:-1]), strict=True))
        drawn_boxes = [box.replace(value=values[path].reshape(box.value.shape)) for path, box in boxes.items()]
        return jax.tree.unflatten(tree, drawn_boxes)

    return draw


def _draw_block(initializer: Any, shape: tuple[int, ...], dtype: Any, key: jax.Array) -> jax.Array:
    return initializer(key, shape, dtype)


def _block_key(key: jax.Array, path_hash: jax.Array, block: jax.Array) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(key, path_hash), block)


def _hash(path: str) -> np.uint32:
    return np.uint32(int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "big"))
