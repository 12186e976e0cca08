"""The `vae` section of a config: weights or model, training, the terms of the loss, and the evaluation."""

import dataclasses
from typing import Annotated

from lidit_jax.errors import UserError
from lidit_jax.models.vae_config import VAEConfig
from lidit_jax.models.vae_loss import RECONSTRUCTION_LOSSES
from lidit_jax.ranges import Count, CountOrZero, Size, Weight, between, check_ranges
from lidit_jax.train_config import TrainConfig


@dataclasses.dataclass(frozen=True)
class PerceptualConfig:
    """The `vae.perceptual` section: the perceptual term (LPIPS) of the VAE's loss.

    Attributes:
      weights: safetensors file with the state of the lpips package's LPIPS(net="vgg"); "" disables the term.
      weight: weight of the term in the loss.
    """

    weights: str = ""
    weight: Weight = 1.0

    def __post_init__(self):
        check_ranges(self, "vae.perceptual.")


@dataclasses.dataclass(frozen=True)
class AdversarialConfig:
    """The `vae.adversarial` section: the adversarial term (PatchGAN) of the VAE's loss.

    Attributes:
      weight: weight of the term in the loss, multiplied by the adaptive weight; 0 disables the term.
      start: first step at which the discriminator is trained and its term enters the loss.
      width: see `PatchDiscriminator`.
      layers: see `PatchDiscriminator`.
    """

    weight: Weight = 0.0
    start: CountOrZero = 0
    width: Annotated[int, between(1, 1024)] = 64
    layers: Annotated[int, between(1, 8)] = 3

    def __post_init__(self):
        check_ranges(self, "vae.adversarial.")


@dataclasses.dataclass(frozen=True)
class ReconstructionEvaluation:
    """The `vae.evaluate` section: the evaluation of reconstructions.

    Attributes:
      num_images: largest number of images, evenly spread over the held-out images (over all images if none are held
        out).
      batch_size: images per batch.
      sheet: images on the contact sheet.
    """

    num_images: Count = 512
    batch_size: Size = 32
    sheet: Size = 16

    def __post_init__(self):
        check_ranges(self, "vae.evaluate.")


@dataclasses.dataclass(frozen=True)
class VAESectionConfig:
    """The `vae` section: a VAE from a folder in diffusers' format (`weights`), or one to train in this run.

    Attributes:
      weights: folder in diffusers' format; "" trains a VAE.
      dtype: compute dtype.
      model: sizes of a VAE to train; a folder has its own.
      train: its training.
      reconstruction: kind of the reconstruction loss, "l1" or "l2".
      kl_weight: weight of the KL term in the loss.
      perceptual: the perceptual term of the loss, off by default.
      adversarial: the adversarial term of the loss, off by default.
      evaluate: the evaluation of reconstructions; None disables it.
    """

    weights: str = ""
    dtype: str = "bfloat16"
    model: VAEConfig | None = None
    train: TrainConfig | None = None
    reconstruction: str = "l1"
    kl_weight: Weight = 1e-6
    perceptual: PerceptualConfig = PerceptualConfig()
    adversarial: AdversarialConfig = AdversarialConfig()
    evaluate: ReconstructionEvaluation | None = None

    def __post_init__(self):
        check_ranges(self, "vae.")
        if self.reconstruction not in RECONSTRUCTION_LOSSES:
            raise UserError(
                f"vae.reconstruction={self.reconstruction!r} is unknown: use one of {', '.join(RECONSTRUCTION_LOSSES)}"
            )
