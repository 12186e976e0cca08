"""Estimates the work of the stages to come, for the time left of the complete run in the progress line."""

from typing import NamedTuple

from lidit_jax.experiment import LIDIT, Experiment
from lidit_jax.models.flops import (
    FORWARD_AND_BACKWARD,
    TextLengths,
    dense,
    lidit_forward,
    llm_forward,
    vae_encoder_forward,
)
from lidit_jax.models.llm import LLMConfig

CHARACTERS_PER_TOKEN = 4  # of the instruction, whose tokenizer may not be trained yet
VAE_TO_ENCODER = 3  # FLOPs of an autoencoder relative to its encoder's: the decoder has more layers in a block


def later_steps(experiment: Experiment, name: str) -> float:
    """Returns the work of all stages after a network's, in steps of that network. A rough estimate from FLOPs.

    Args:
      experiment: the run.
      name: name of the network; 0 is returned if the run's stages do not train it.
    """
    work = _work(experiment)
    if name not in work:
        return 0.0
    names = list(work)
    return sum(work[other].total for other in names[names.index(name) + 1 :]) / work[name].flops


class _Work(NamedTuple):
    """The work of training one network.

    Attributes:
      steps: steps of its training.
      flops: FLOPs of a step.
    """

    steps: int
    flops: int

    @property
    def total(self) -> int:
        return self.steps * self.flops


def _work(experiment: Experiment) -> dict[str, _Work]:
    """Returns the work of each network that the run trains, in the order of training."""
    side, work = experiment.data.resolution, {}
    encoders = experiment.encoders if experiment.has_lidit else {}
    trained = {name: config for name, config in encoders.items() if not config.weights}
    for name, config in trained.items():
        forward = _llm(experiment, config.language_model, config.train.batch_size, with_head=True)
        work[name] = _Work(config.train.steps, FORWARD_AND_BACKWARD * forward)
    if not experiment.vae.weights:
        training = experiment.vae.train
        encoding = vae_encoder_forward(experiment.vae_config, training.batch_size, side, side)
        work["vae"] = _Work(training.steps, FORWARD_AND_BACKWARD * VAE_TO_ENCODER * encoding)
    if experiment.has_lidit:
        count, model = experiment.train.batch_size, experiment.model.config
        latent = side // experiment.vae_config.downsampling_factor
        lengths = [TextLengths(_prefix(experiment), experiment.text.max_length, model.hidden_size)] * len(encoders)
        frozen = sum(_llm(experiment, config.language_model, count) for config in trained.values())
        frozen += vae_encoder_forward(experiment.vae_config, count, side, side)
        forward = lidit_forward(model, count, latent, latent, lengths)
        work[LIDIT] = _Work(experiment.train.steps, frozen + FORWARD_AND_BACKWARD * forward)
    return work


def _llm(experiment: Experiment, config: LLMConfig, prompts: int, with_head: bool = False) -> int:
    length = experiment.text.max_length
    head = dense(prompts * length, config.hidden_size, config.vocab_size) if with_head else 0
    return head + llm_forward(config, prompts, length, _prefix(experiment))


def _prefix(experiment: Experiment) -> int:
    text = experiment.text
    return (len(text.system_prompt) + len(text.instruction)) // CHARACTERS_PER_TOKEN
