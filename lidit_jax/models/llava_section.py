"""The `llava` section of a config: the networks of a multi-modal LLM and the stages of its training."""

import dataclasses

from lidit_jax.data.data_config import DataConfig
from lidit_jax.errors import UserError
from lidit_jax.models.layers import check_dtype
from lidit_jax.models.llava import SELECTIONS
from lidit_jax.models.llm import LLMConfig
from lidit_jax.models.vision import VisionConfig
from lidit_jax.ranges import Size, check_ranges
from lidit_jax.train_config import TrainConfig
from lidit_jax.weights.safetensors_shards import DTYPES


@dataclasses.dataclass(frozen=True)
class LlavaLLMConfig:
    """The LLM that the training starts from.

    Attributes:
      weights: folder in Hugging Face's format, or a name on the hub.
      model: sizes for `compile` without weights; a folder has its own.
    """

    weights: str = ""
    model: LLMConfig | None = None


@dataclasses.dataclass(frozen=True)
class LlavaVisionConfig:
    """The vision tower, which is not trained.

    Attributes:
      weights: folder of a CLIP or SigLIP model in Hugging Face's format, or a name on the hub.
      model: sizes for `compile` without weights; a folder has its own.
    """

    weights: str = ""
    model: VisionConfig | None = None


@dataclasses.dataclass(frozen=True)
class LlavaStageConfig:
    """One stage of the training.

    Attributes:
      data: `data.source="llava"` for conversations, or any source of images with captions, which are the answers.
        `resolution` is that of the vision tower.
      train: its training.
      max_length: tokens that conversations are padded to, those of the image included.
    """

    data: DataConfig
    train: TrainConfig
    max_length: Size = 2048

    def __post_init__(self):
        check_ranges(self, "")
        if self.data.max_aspect != 1.0:
            raise UserError(f"data.max_aspect={self.data.max_aspect:g} must be 1: a vision tower takes squares")


@dataclasses.dataclass(frozen=True)
class LlavaSectionConfig:
    """The `llava` section.

    Attributes:
      llm: the LLM.
      vision: the vision tower.
      align: first stage, which trains the projector alone; None: none.
      tune: second stage, which trains the projector and the LLM; None: none.
      feature_layer: see `LlavaConfig`.
      select: see `LlavaConfig`.
      question: the user's turn before a caption.
      dtype: compute dtype.
      save_dtype: dtype of the weights in the folder that is written.
      remat: rematerialise each block of the LLM in the backward pass.
    """

    llm: LlavaLLMConfig
    vision: LlavaVisionConfig
    align: LlavaStageConfig | None = None
    tune: LlavaStageConfig | None = None
    feature_layer: int = -2
    select: str = "default"
    question: str = "Describe the image."
    dtype: str = "bfloat16"
    save_dtype: str = "bfloat16"
    remat: bool = True

    def __post_init__(self):
        check_dtype("dtype", self.dtype)
        if self.save_dtype not in DTYPES:
            raise UserError(f"save_dtype={self.save_dtype!r:.80}: use one of {', '.join(DTYPES)}")
        if self.select not in SELECTIONS:
            raise UserError(f"select={self.select!r:.80} is unknown: use one of {', '.join(SELECTIONS)}")
        if self.tune is None and self.align is None:
            raise UserError("align and tune are missing, so there is nothing to train: add one of them")

    def stages(self) -> dict[str, LlavaStageConfig]:
        """Returns the stages of the training in order, by name."""
        found = {"align": self.align, "tune": self.tune}
        return {name: stage for name, stage in found.items() if stage is not None}
