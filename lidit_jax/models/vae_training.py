"""The `vae` section of a config: the terms of the VAE's loss, and how it is judged."""

import dataclasses

from lidit_jax.errors import UserError
from lidit_jax.models.vae_config import VAEConfig
from lidit_jax.models.vae_loss import RECONSTRUCTION_LOSSES
from lidit_jax.train_config import TrainConfig


def _check_weight(key: str, value: float) -> None:
    if not 0 <= value < float("inf"):
        raise UserError(f"{key}={value} must be a finite number of at least 0")


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
class ReconstructionEvaluation:
    """Under `vae.evaluate` in the config.

    Attributes:
      num_images: at most, evenly spread over the held-out pictures (over all pictures, where none are held out).
      batch_size: pictures at once.
      sheet: pictures on the contact sheet.
    """

    num_images: int = 512
    batch_size: int = 32
    sheet: int = 16

    def __post_init__(self):
        for name in ("num_images", "batch_size", "sheet"):
            if getattr(self, name) < 1:
                raise UserError(f"vae.evaluate.{name}={getattr(self, name)} must be at least 1")


@dataclasses.dataclass(frozen=True)
class VAEPartConfig:
    """Under `vae`: a VAE from a folder in diffusers' format (`weights`), or one to train here.

    Attributes:
      model: sizes of a VAE to train; a folder has its own.
      train: its training.
      reconstruction, kl_weight: of the loss, see `VAEObjective`.
      perceptual, adversarial: further terms of the loss, off by default.
      evaluate: how reconstructions are evaluated; None leaves the evaluation out.
    """

    weights: str = ""
    dtype: str = "bfloat16"
    model: VAEConfig | None = None
    train: TrainConfig | None = None
    reconstruction: str = "l1"
    kl_weight: float = 1e-6
    perceptual: PerceptualConfig = PerceptualConfig()
    adversarial: AdversarialConfig = AdversarialConfig()
    evaluate: ReconstructionEvaluation | None = None

    def __post_init__(self):
        if self.reconstruction not in RECONSTRUCTION_LOSSES:
            raise UserError(
                f"vae.reconstruction={self.reconstruction!r}: use one of {', '.join(RECONSTRUCTION_LOSSES)}"
            )
        _check_weight("vae.kl_weight", self.kl_weight)
