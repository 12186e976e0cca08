"""A small language model that becomes a prompt encoder: its task, and the stage that trains it on the captions."""

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from lidit_jax.data.dataset import Dataset
from lidit_jax.experiment import Experiment
from lidit_jax.goodput import Goodput
from lidit_jax.models.initialize import draw_together
from lidit_jax.models.llm import CausalLM, LLMConfig
from lidit_jax.parallel.rules import ShardingRules
from lidit_jax.stages.train_network import on_host, train_network
from lidit_jax.stages.work_left import later_steps
from lidit_jax.text.prompts import PromptTokenizer
from lidit_jax.text.train_tokenizer import train_tokenizer
from lidit_jax.trainer import Task
from lidit_jax.weighted_mean import Perplexity, WeightedMean
from lidit_jax.weights.huggingface_llm import save_llm

TOKENIZER_CAPTIONS = 20_000  # captions that the tokenizer is trained on


def language_model_task(name: str, config: LLMConfig, tokenizer: PromptTokenizer) -> Task:
    """Returns the task of next-token prediction on captions after the instruction, the LLM's input when it encodes.

    A batch has {"<name>/tokens": int32 [B, L], "<name>/mask": bool [B, L]}. The loss is the mean over the caption's
    tokens, its end token included; the instruction is context, not a target.

    Args:
      name: name of the encoder in the config.
      config: architecture of the LLM.
      tokenizer: has the system prompt and instruction as its prefix.
    """
    model = CausalLM(config)
    instruction = tokenizer.prefix()

    def init(key):
        return model.init(key, jnp.zeros((1, 2), jnp.int32))["params"]

    def loss(params, frozen, batch, key, phase):
        del frozen, key, phase
        tokens, mask = batch[f"{name}/tokens"], batch[f"{name}/mask"]
        prefix = jnp.broadcast_to(jnp.asarray(instruction), (tokens.shape[0], len(instruction)))
        sequence = jnp.concatenate([prefix, tokens], axis=1)  # [B, P + L]
        logits = model.apply({"params": params}, sequence)
        logits = logits[:, len(instruction) - 1 : -1]  # [B, L, V]: position i predicts token i
        return token_loss(logits, tokens, mask)

    return Task(name=name, init=draw_together(init), loss=loss)


def token_loss(
    logits: jax.Array, tokens: jax.Array, counted: jax.Array
) -> tuple[WeightedMean, dict[str, WeightedMean]]:
    """Averages the negative log-likelihood of the counted tokens, in nats.

    Args:
      logits: float32 [B, L, V].
      tokens: int32 [B, L].
      counted: bool [B, L], True for the tokens to average over.

    Returns:
      The mean, weighted by the number of counted tokens, and {"perplexity": its exponential}.
    """
    log_likelihood = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)[..., 0]  # [B, L]
    loss = WeightedMean.over(-log_likelihood, counted)
    return loss, {"perplexity": Perplexity(loss.mean, loss.weight)}


def train_language_model(
    experiment: Experiment, name: str, dataset: Dataset, mesh: Mesh, rules: ShardingRules, goodput: Goodput
) -> None:
    """Trains a tokenizer and the LLM on the captions, and saves both in Hugging Face's format, unless they exist."""
    folder = experiment.encoder_folder(name)
    if folder.exists():
        return
    config = experiment.encoders[name].language_model
    texts = [experiment.text.instruction, *dataset.captions(TOKENIZER_CAPTIONS, experiment.config.seed)]
    tokenizer = train_tokenizer(texts, config.vocab_size)
    # On small data sets the tokenizer runs out of merges; the model keeps the vocabulary size of its config.
    prompts = experiment.prompt_tokenizer(tokenizer)
    training = experiment.encoders[name].train
    task = language_model_task(name, config, prompts)

    def batches(first: int):
        return dataset.batches(
            training.batch_size,
            experiment.config.seed,
            tokenize=lambda captions: {f"{name}/{key}": value for key, value in prompts(captions).items()},
            first=first,
            join_captions=True,
            with_images=False,
        )

    state = train_network(
        *(experiment, task, training, batches, mesh, rules, {"data": dataset.fingerprint}, goodput),
        later_steps=later_steps(experiment, name),
    )
    with goodput.timed("saving"):
        params = on_host(state.params, mesh, training.stalled_after)
        if jax.process_index() == 0:
            save_llm(folder, config, params, tokenizer)
        multihost_utils.sync_global_devices(f"saved {name}")
