"""Built-in data set: scenes of coloured shapes, rendered from a seed and captioned in English and Chinese.

A scene is a few shapes with colours, sizes and spatial relations, so generated images can be checked exactly
(`checker.py`). Some (colour, shape) pairs never occur in training, so attribute binding can be told from memorisation.
Nothing is stored: example i of a source is a pure function of (seed, i).
"""

import operator
from collections.abc import Sequence

import numpy as np

from lidit_jax.data.buckets import Bucket, resize_to_cover_and_crop
from lidit_jax.data.shapes.captions import LANGUAGES, caption
from lidit_jax.data.shapes.layout import QUADRANTS, SceneLayout, check_arguments, sample_scene
from lidit_jax.data.shapes.rendering import render
from lidit_jax.data.shapes.scene import Pairs, Scene
from lidit_jax.data.sources import Source
from lidit_jax.errors import UserError

# Seed of evaluation and validation scenes. Training never uses it, so their images and prompts are new even where their
# pairs are not.
HELD_OUT_SEED = 1_000_003
_FORMAT_VERSION = 3


class ShapesSource(Source):
    """Random-access source of scenes with images and captions; example i is computed from (seed, i)."""

    def __init__(
        self,
        num_examples: int = 1_000_000,
        height: int = 32,
        width: int = 32,
        seed: int = 0,
        pairs: Pairs = "train",
        num_objects: int | None = None,
        layout: SceneLayout = QUADRANTS,
    ):
        """Creates the source.

        Args:
          num_examples: number of examples.
          height: height of the images in pixels.
          width: width of the images in pixels.
          seed: seed of all examples.
          pairs: see `sample_scene`.
          num_objects: see `sample_scene`.
          layout: see `sample_scene`.

        Raises:
          UserError: a value is out of range.
        """
        check_arguments(layout, num_objects, pairs)
        layout.check_canvas(height, width, num_objects)
        if num_examples < 1:
            raise UserError(f"num_examples={num_examples} is out of range: use 1 or more")
        if seed < 0:
            raise UserError(f"seed={seed} is out of range: use 0 or more")
        self.num_examples = num_examples
        self.height = height
        self.width = width
        self.seed = seed
        self.pairs = pairs
        self.num_objects = num_objects
        self.layout = layout

    @property
    def fingerprint(self) -> str:
        """Identifier of the content; sources with equal fingerprints have equal examples."""
        return (
            f"ShapesSource(version={_FORMAT_VERSION}, num_examples={self.num_examples}, height={self.height}, "
            f"width={self.width}, seed={self.seed}, pairs={self.pairs}, num_objects={self.num_objects}"
            f"{self.layout.fingerprint})"
        )

    def __repr__(self) -> str:
        return self.fingerprint

    def __len__(self) -> int:
        return self.num_examples

    def sizes(self) -> np.ndarray:
        """Returns height and width of every example, int32 [N, 2], as a read-only view that takes no memory."""
        return np.broadcast_to(np.array([self.height, self.width], np.int32), (self.num_examples, 2))

    def scene(self, index: int) -> Scene:
        """Returns the scene of example `index`.

        Raises:
          IndexError: the index is not in 0..len - 1.
        """
        return self._sample(self._rng(index))

    def load(self, indices: Sequence[int], bucket: Bucket | None = None) -> list[dict]:
        """Renders examples.

        Args:
          indices: indices of the examples.
          bucket: aspect-ratio bucket to resize and crop the images to; None keeps the size of the source.

        Returns:
          {"key": str, "image": uint8 [H, W, 3], "captions": {"en": str, "zh": str}, "metadata": {}} for each example.

        Raises:
          IndexError: an index is not in 0..len - 1.
        """
        examples = []
        for index in indices:
            scene, example = self._scene_and_text(index)
            image = render(scene, self.height, self.width)
            examples.append({**example, "image": resize_to_cover_and_crop(image, bucket) if bucket else image})
        return examples

    def describe(self, indices: Sequence[int]) -> list[dict]:
        """Returns the same as `load` without the images, which are not rendered."""
        return [self._scene_and_text(index)[1] for index in indices]

    def _scene_and_text(self, index: int) -> tuple[Scene, dict]:
        rng = self._rng(index)
        scene = self._sample(rng)
        return scene, {
            "key": f"shapes-{self.pairs}-{self.seed}-{index}",
            "captions": {language: caption(scene, language, rng) for language in LANGUAGES},
            "metadata": {},
        }

    def _sample(self, rng: np.random.Generator) -> Scene:
        return sample_scene(rng, self.num_objects, self.pairs, self.layout, self.height, self.width)

    def _rng(self, index: int) -> np.random.Generator:
        index = operator.index(index)
        if not 0 <= index < self.num_examples:
            raise IndexError(f"example {index} is out of range: the source has {self.num_examples} examples")
        return np.random.default_rng((self.seed, index))
