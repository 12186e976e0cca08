"""Built-in scenes as a benchmark: images are generated as for a list of prompts, then checked exactly."""

from etils import epath

from lidit_jax.data.shapes.layout import SceneLayout
from lidit_jax.errors import UserError
from lidit_jax.evaluate.benchmarks import PlainPrompts
from lidit_jax.evaluate.read_image import read_image
from lidit_jax.evaluate.scenes import SceneEvaluation, report_scenes, score_scenes


class ShapesBenchmark(PlainPrompts):
    """Benchmark with an equal number of prompts of each kind of scene; see `SceneEvaluation.of_each`."""

    def __init__(self, num_scenes: int, num_images: int, layout: SceneLayout, height: int, width: int):
        """Builds the prompts.

        Args:
          num_scenes: number of scenes of each kind.
          num_images: images per prompt.
          layout: layout of the scenes, as in training.
          height: height of the images in pixels.
          width: width of the images in pixels.

        Raises:
          UserError: `num_scenes` is less than 1, or images of this size cannot show such scenes.
        """
        if num_scenes < 1:
            raise UserError(f"--num_scenes={num_scenes} must be at least 1")
        self._scenes = SceneEvaluation.of_each(num_scenes, layout).prompts(layout, height, width)
        super().__init__([scene.prompt for scene in self._scenes], num_images)

    def judge(self, out: epath.Path) -> None:
        """Checks all images in the folder, logs the scores and writes them to the same folder.

        Raises:
          UserError: an image is missing or damaged.
        """
        scenes = [scene for scene in self._scenes for _ in range(self._num_images)]
        files = [out / name for index in range(len(self._scenes)) for name in self.files(index)]
        images = [read_image(file) for file in files]
        report_scenes(score_scenes(scenes, images), scenes, images, out)
