"""Sections of a config that describe the parts of a run, in the form that the library takes them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lidit_jax.config import build
from lidit_jax.errors import UserError
from lidit_jax.models.vae_loss import RECONSTRUCTION_LOSSES
from lidit_jax.stages.reconstruction import ReconstructionEvaluation

ENCODE = ("in_step", "ahead")


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Under `text` in the config; see `PromptTokenizer`.

    Attributes:
      encode: where the encoders run in training: "in_step", inside the train step, or "ahead", as a program of their
        own before it. The features are the same.
    """

    max_length: int
    instruction: str
    system_prompt: str = ""
    chat_template: bool = True
    encode: str = "in_step"

    def __post_init__(self):
        if self.encode not in ENCODE:
            raise UserError(f"text.encode={self.encode!r} is unknown: use one of {', '.join(ENCODE)}")


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """One entry under `encoders`: one from a folder (`weights`), or an LLM to train here (`family`, `model`, `train`).

    Attributes:
      weights: folder in Hugging Face's format (local, or in a bucket) or its name on the hub; "" trains an LLM on the
        run's captions.
      dtype: of its computation.
      family: "llama" or "qwen2".
      model: fields of `LLMConfig`.
      train: fields of `TrainConfig`.
    """

    weights: str = ""
    dtype: str = "bfloat16"
    family: str = "llama"
    model: Mapping[str, Any] | None = None
    train: Mapping[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class PerceptualConfig:
    """Under `vae.perceptual`: the similarity of how pictures look, a term of the loss.

    Attributes:
      weights: safetensors file with the state of the lpips package's LPIPS(net="vgg"); "" leaves the term out.
      weight: of the term.
    """

    weights: str = ""
    weight: float = 1.0

    def __post_init__(self):
        _check_weight("vae.perceptual.weight", self.weight)


@dataclasses.dataclass(frozen=True)
class AdversarialConfig:
    """Under `vae.adversarial`: a discriminator's opinion, a term of the loss.

    Attributes:
      weight: of the term, times the adaptive weight; 0 leaves it out.
      start: step at which the discriminator begins to learn and to be heard.
      width, layers: see `PatchDiscriminator`.
    """

    weight: float = 0.0
    start: int = 0
    width: int = 64
    layers: int = 3

    def __post_init__(self):
        _check_weight("vae.adversarial.weight", self.weight)
        for name, least, most in (("start", 0, 2**31 - 1), ("width", 1, 1024), ("layers", 1, 8)):
            if not least <= getattr(self, name) <= most:
                raise UserError(f"vae.adversarial.{name}={getattr(self, name)} must be from {least} to {most}")


@dataclasses.dataclass(frozen=True)
class VAEPartConfig:
    """Under `vae`: a VAE from a folder in diffusers' format (`weights`), or one to train here.

    Attributes:
      model: fields of `VAEConfig`.
      train: fields of `TrainConfig`.
      reconstruction, kl_weight: of the loss, see `VAEObjective`.
      perceptual: fields of `PerceptualConfig`.
      adversarial: fields of `AdversarialConfig`.
      evaluate: fields of `ReconstructionEvaluation`; None leaves the evaluation out.
    """

    weights: str = ""
    dtype: str = "bfloat16"
    model: Mapping[str, Any] | None = None
    train: Mapping[str, Any] | None = None
    reconstruction: str = "l1"
    kl_weight: float = 1e-6
    perceptual: Mapping[str, Any] | None = None
    adversarial: Mapping[str, Any] | None = None
    evaluate: Mapping[str, Any] | None = None

    def __post_init__(self):
        if self.reconstruction not in RECONSTRUCTION_LOSSES:
            raise UserError(
                f"vae.reconstruction={self.reconstruction!r}: use one of {', '.join(RECONSTRUCTION_LOSSES)}"
            )
        _check_weight("vae.kl_weight", self.kl_weight)
        self.perceptual_config(), self.adversarial_config(), self.evaluation()  # raise for what is wrong in them

    def perceptual_config(self) -> PerceptualConfig:
        return build(PerceptualConfig, self.perceptual or {}, "vae.perceptual")

    def adversarial_config(self) -> AdversarialConfig:
        return build(AdversarialConfig, self.adversarial or {}, "vae.adversarial")

    def evaluation(self) -> ReconstructionEvaluation | None:
        if self.evaluate is None:
            return None
        return build(ReconstructionEvaluation, self.evaluate, "vae.evaluate")


def _check_weight(key: str, value: float) -> None:
    if not 0 <= value < float("inf"):
        raise UserError(f"{key}={value} must be a finite number of at least 0")
