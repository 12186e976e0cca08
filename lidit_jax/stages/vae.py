"""The VAE: its task, and the stage that trains and evaluates it."""

import dataclasses
import functools
import itertools
import logging
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from lidit_jax.checkpoint import latest_step
from lidit_jax.data.dataset import Dataset
from lidit_jax.data.open_dataset import open_dataset
from lidit_jax.experiment import Experiment, checkpoint_folder
from lidit_jax.goodput import Goodput
from lidit_jax.images import to_float
from lidit_jax.models.discriminator import PatchDiscriminator, smallest_side
from lidit_jax.models.image_similarity import psnr
from lidit_jax.models.initialize import draw_together
from lidit_jax.models.lpips import LPIPS
from lidit_jax.models.vae import AutoencoderKL
from lidit_jax.models.vae_loss import (
    adaptive_weight,
    adversarial_loss,
    hinge_loss,
    kl_loss,
    reconstruction_loss,
    value_and_gradient_at,
    values_per_image,
    with_gradient,
)
from lidit_jax.parallel.rules import ShardingRules, replicated
from lidit_jax.stages import reconstruction
from lidit_jax.stages.reconstruction import Autoencoding, evaluate_reconstruction, is_evaluated
from lidit_jax.stages.train_network import on_host, train_network
from lidit_jax.stages.work_left import later_steps
from lidit_jax.trainer import Evaluate, Task, TrainState
from lidit_jax.weighted_mean import WeightedMean
from lidit_jax.weights.diffusers_vae import load_vae, save_vae
from lidit_jax.weights.digest import file_digest, folder_digest
from lidit_jax.weights.lpips import load_lpips

logger = logging.getLogger(__name__)
STATISTICS_BATCHES = 16  # batches on which the latents' mean and deviation are measured


@dataclasses.dataclass(frozen=True)
class VAEObjective:
    """Terms of the autoencoder's loss and their weights, per value of an image; see `models/vae_loss.py`.

    Attributes:
      reconstruction: pixel error, "l1" or "l2".
      kl_weight: weight of the posterior's KL divergence from the standard normal.
      perceptual_weight: weight of LPIPS, if its parameters are given.
      adversarial_weight: weight of the adversarial term, times the adaptive weight, if there is a discriminator.
      adversarial_start: step from which the discriminator is trained and the adversarial term counts.
    """

    reconstruction: str = "l1"
    kl_weight: float = 1e-6
    perceptual_weight: float = 1.0
    adversarial_weight: float = 0.5
    adversarial_start: int = 0


def vae_task(
    model: AutoencoderKL,
    objective: VAEObjective,
    *,
    lpips: Any = None,
    discriminator: PatchDiscriminator | None = None,
    evaluate: Evaluate | None = None,
) -> Task:
    """Returns latent diffusion's autoencoder task: reconstruction, KL and, optionally, LPIPS and adversarial terms.

    A batch has {"image": uint8 [B, H, W, 3]}. The parameters are {"vae": …} and, with a discriminator,
    {"discriminator": …}; both networks are updated on the same reconstructions.

    Args:
      model: the autoencoder.
      objective: terms of the loss and their weights.
      lpips: parameters of `LPIPS`; None for no perceptual term.
      discriminator: None for no adversarial term.
      evaluate: computes what is logged every `sample_every` steps; or None.
    """

    def init(key):
        keys = jax.random.split(key)
        side = 2 * model.config.downsampling_factor
        params = {"vae": model.init(keys[0], jnp.zeros((1, side, side, model.config.in_channels)))["params"]}
        if discriminator:
            side = smallest_side(discriminator.layers)
            images = jnp.zeros((1, side, side, model.config.out_channels))
            params["discriminator"] = discriminator.init(keys[1], images)["params"]
        return params

    def loss(params, frozen, batch, key, phase):
        images = to_float(batch["image"])
        autoencode = functools.partial(model.apply, {"params": params["vae"]})
        posterior = autoencode(images, method=AutoencoderKL.encode)
        features = autoencode(posterior.sample(key), method=AutoencoderKL.decode_features)
        decoded = autoencode(features, method=AutoencoderKL.decode_last)
        kl = kl_loss(posterior, images)
        metrics = {"kl": kl, "psnr": jnp.mean(psnr(decoded, images))}

        def dissimilarity(decoded):
            terms = {"reconstruction": reconstruction_loss(decoded, images, objective.reconstruction)}
            total = terms["reconstruction"]
            if lpips is not None:
                perceive = functools.partial(LPIPS(model.dtype).apply, {"params": frozen["lpips"]})
                terms["perceptual"] = jnp.mean(perceive(decoded, images))
                total += objective.perceptual_weight * terms["perceptual"]
            return total, terms

        value, gradient, terms = value_and_gradient_at(dissimilarity, decoded)
        metrics |= terms
        if not phase:
            return _over_images(images, with_gradient(value, decoded, gradient) + objective.kl_weight * kl, metrics)

        def score(images):
            return discriminator.apply({"params": params["discriminator"]}, images)

        def adversarial_term(decoded):
            return adversarial_loss(score(decoded)), {}

        in_kernel = functools.partial(_gradient_in_last_kernel, model, params["vae"], features)
        adversarial, adversarial_gradient, _ = value_and_gradient_at(adversarial_term, decoded)
        adaptive = adaptive_weight(in_kernel(gradient), in_kernel(adversarial_gradient), values_per_image(images))
        weight = objective.adversarial_weight * jax.lax.stop_gradient(adaptive)
        value, gradient = value + weight * adversarial, gradient + weight * adversarial_gradient
        hinge = hinge_loss(score(images), score(jax.lax.stop_gradient(decoded)))
        metrics |= {"hinge": hinge, "adaptive_weight": adaptive}
        total = with_gradient(value, decoded, gradient) + objective.kl_weight * kl + hinge
        return _over_images(images, total, metrics)

    return Task(
        name="vae",
        init=draw_together(init),
        loss=loss,
        frozen=None if lpips is None else {"lpips": lpips},
        evaluate=evaluate,
        phases=(objective.adversarial_start,) if discriminator else (),
        networks={"vae": 0, "discriminator": 1} if discriminator else {},
    )


def _over_images(
    images: jax.Array, loss: jax.Array, metrics: Mapping[str, jax.Array]
) -> tuple[WeightedMean, dict[str, WeightedMean]]:
    """Weights scalars that are means over a batch of images [B, H, W, C] by the number of images."""
    count = jnp.float32(images.shape[0])
    return WeightedMean(loss, count), {name: WeightedMean(mean, count) for name, mean in metrics.items()}


def _gradient_in_last_kernel(model: AutoencoderKL, params: Any, features: jax.Array, gradient: jax.Array) -> jax.Array:
    """Returns the gradient of a loss with respect to the kernel of the decoder's last convolution.

    Args:
      model: the autoencoder.
      params: its parameters.
      features: input of that convolution; treated as constant.
      gradient: gradient of the loss with respect to the reconstruction.
    """
    last = params["decoder"]["conv_out"]

    def decode_last(kernel):
        changed = {"params": {"decoder": {"conv_out": {**last, "kernel": kernel}}}}
        return model.apply(changed, jax.lax.stop_gradient(features), method=AutoencoderKL.decode_last)

    return jax.vjp(decode_last, last["kernel"])[1](gradient)[0]


class VAEStage:
    """The VAE stage of a run: trains the VAE unless it exists, and evaluates it if the config asks for it."""

    def __init__(self, experiment: Experiment, dataset: Dataset):
        """Loads what the stage needs, before anything is written.

        Raises:
          UserError: if the held-out images, or the weights of the perceptual loss, cannot be used.
        """
        self.experiment, self.dataset, self.config = experiment, dataset, experiment.vae
        self.model = experiment.autoencoder(experiment.vae_config)
        self.evaluation = self.config.evaluate
        self.to_train = not self.config.weights and not self._is_finished()
        self.lpips = self._lpips() if self.to_train else None
        self.images: list[np.ndarray] = []
        if self.evaluation is None:
            return
        if experiment.data.holds_out:
            self.evaluation_data = open_dataset(
                experiment.data, experiment.size_multiple(), held_out=True, with_captions=experiment.has_lidit
            )
        else:
            self.evaluation_data = dataset
        if self.to_train or not is_evaluated(experiment.workdir / reconstruction.SCORES_FILE, self._provenance()):
            if not experiment.data.holds_out:
                logger.info("vae: evaluated on training images, because none are held out (data.held_out_shards=0)")
            self.images = self.evaluation_data.images(self.evaluation.num_images)

    @property
    def is_done(self) -> bool:
        """True if nothing is left to be trained or evaluated."""
        return not self.to_train and not self.images

    def run(self, mesh: Mesh, rules: ShardingRules, goodput: Goodput) -> None:
        """Trains and evaluates the VAE; skips what a former run has finished."""
        autoencoding = Autoencoding(self.model, mesh, rules)
        if self.to_train:
            self._train(autoencoding, mesh, rules, goodput)
        if self.images:
            with goodput.timed("evaluating"):
                self._evaluate(autoencoding, mesh)
        self.images, self.lpips = [], None  # frees them before LI-DiT is trained

    def _is_finished(self) -> bool:
        """Returns True if the VAE exists and, in a run of a VAE alone, was trained for the steps in the config."""
        if not self.experiment.vae_folder().exists():
            return False
        taken = latest_step(checkpoint_folder(self.experiment.workdir, "vae"))
        return self.experiment.has_lidit or taken >= self.experiment.vae.train.steps

    def _provenance(self) -> dict[str, Any]:
        """Returns what an evaluation depends on: VAE, data and settings."""
        return {
            "vae": folder_digest(self.experiment.vae_folder()),
            "data": self.evaluation_data.fingerprint,
            "held_out": self.experiment.data.holds_out,
            "evaluation": dataclasses.asdict(self.evaluation),
        }

    def _lpips(self) -> Any:
        """Loads the parameters of the perceptual loss; logs that it is off, and returns None, without weights."""
        file = self.config.perceptual.weights
        if not file:
            logger.info("vae: trains without the perceptual loss (vae.perceptual.weights is empty)")
            return None
        return load_lpips(file)

    def _train(self, autoencoding: Autoencoding, mesh: Mesh, rules: ShardingRules, goodput: Goodput) -> None:
        experiment, training = self.experiment, self.experiment.vae.train
        perceptual, adversarial = self.config.perceptual, self.config.adversarial

        def evaluate(state: TrainState, step: int) -> tuple[dict[str, float], dict[str, np.ndarray]]:
            scores, sheet = evaluate_reconstruction(autoencoding, state.averaged["vae"], self.images, self.evaluation)
            return reconstruction.scalars(scores), {"reconstruction": sheet}

        discriminator = PatchDiscriminator(adversarial.width, adversarial.layers, self.model.dtype)
        task = vae_task(
            self.model,
            VAEObjective(
                self.config.reconstruction,
                self.config.kl_weight,
                perceptual.weight,
                adversarial.weight,
                adversarial.start,
            ),
            lpips=None if self.lpips is None else jax.device_put(self.lpips, replicated(mesh)),
            discriminator=discriminator if adversarial.weight else None,
            evaluate=evaluate if self.images else None,
        )

        def batches(first: int):
            return self.dataset.batches(training.batch_size, experiment.config.seed, tokenize=None, first=first)

        provenance = {"data": self.dataset.fingerprint}
        if self.lpips is not None:
            provenance["perceptual"] = file_digest(perceptual.weights)
        state = train_network(
            *(experiment, task, training, batches, mesh, rules, provenance, goodput),
            later_steps=later_steps(experiment, task.name),
        )
        measured = itertools.islice(batches(training.steps), STATISTICS_BATCHES)
        latents = autoencoding.latent_statistics(state.averaged["vae"], measured)
        factors = {"shift_factor": latents.shift_factor, "scaling_factor": latents.scaling_factor}
        logger.info("vae: latents have %s", ", ".join(f"{name} {value:.4f}" for name, value in factors.items()))
        with goodput.timed("saving"):
            params = on_host(state.averaged["vae"], mesh, training.stalled_after)
            if jax.process_index() == 0:
                folder = experiment.vae_folder()
                if folder.exists():  # from fewer steps; if interrupted here, the new one is in the checkpoint
                    folder.rmtree()
                save_vae(folder, dataclasses.replace(self.model.config, **factors), params)
            multihost_utils.sync_global_devices("saved vae")

    def _evaluate(self, autoencoding: Autoencoding, mesh: Mesh) -> None:
        """Evaluates the reconstructions of the finished VAE, trained here or elsewhere, and writes the report."""
        config, params = load_vae(self.experiment.vae_folder())
        params = jax.device_put(params, replicated(mesh))
        scores, sheet = evaluate_reconstruction(autoencoding, params, self.images, self.evaluation)
        reconstruction.report(scores, sheet, config, self._provenance(), self.experiment.workdir)
