"""Prompt encoders of the miniature ablations: small language models, trained once a seed on its corpus, then frozen.

The causal ones (LLaMA and Qwen type) learn next-token prediction, each twice: the base model on captions alone, the
tuned one, which stands for the paper's multi-modal LLM, on captions and instructed descriptions. Both start from the
same initial weights and take the same number of steps; in the paper, tuning comes on top of pre-training. The
bidirectional one is T5's encoder; it learns to fill in masked tokens, T5's own objective without its decoder, on
captions alone, because Table 3 compares it with base LLMs. All share one tokenizer.
"""

import dataclasses
import functools
import logging

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerBase

from lidit_jax.ablate.corpus import Corpus, DocumentStream, DocumentTokenizer
from lidit_jax.ablate.rows import BASE_LLAMA, BASE_QWEN, LLAMA, QWEN, T5
from lidit_jax.config import build
from lidit_jax.data.indexed.loader import rows_of_process
from lidit_jax.data.shapes.source import ShapesSource
from lidit_jax.errors import UserError
from lidit_jax.experiment import Experiment
from lidit_jax.models.initialize import draw_together
from lidit_jax.models.layers import Dense
from lidit_jax.models.llm import CausalLM, LLMConfig
from lidit_jax.models.t5 import T5Config, T5Encoder
from lidit_jax.parallel.rules import ShardingRules
from lidit_jax.stages.language_model import token_loss
from lidit_jax.stages.train_network import on_host, train_network
from lidit_jax.text.load_encoder import LLM_FAMILIES
from lidit_jax.text.prompts import PromptTokenizer
from lidit_jax.text.train_tokenizer import train_tokenizer
from lidit_jax.train_config import TrainConfig
from lidit_jax.trainer import Task
from lidit_jax.weights.huggingface_llm import save_llm
from lidit_jax.weights.huggingface_t5 import save_t5_encoder

logger = logging.getLogger(__name__)

LLAMA_FAMILY = "llama"
FAMILIES = {LLAMA: LLAMA_FAMILY, BASE_LLAMA: LLAMA_FAMILY, QWEN: "qwen2", BASE_QWEN: "qwen2", T5: T5}
TUNED = (LLAMA, QWEN)  # the others are trained on captions alone
TOKENIZER_DOCUMENTS = 4000
FIRST_CORPUS_SEED = 7  # of the scenes that the models of seed 0 read about; LI-DiT's scenes have seed 0
MASKED = 0.3  # share of the tokens; T5's 0.15 would leave few targets per step in texts this short


def train_encoder(experiment: Experiment, name: str, settings: ConfigDict, mesh: Mesh, rules: ShardingRules) -> None:
    """Trains `name` into the workdir's encoders/NAME, in Hugging Face's format; returns at once if that exists.

    Args:
      experiment: gives data and workdir.
      name: of the language model.
      settings: `language_models` of the config.
      mesh: mesh to train on.
      rules: sharding of the parameters.

    Raises:
      UserError: as `check_settings`.
    """
    folder = experiment.workdir / "encoders" / name
    if folder.exists():
        return
    model, training = check_settings(name, settings)
    data = experiment.data
    side, seed = data.resolution, FIRST_CORPUS_SEED + experiment.config.seed
    source = ShapesSource(data.num_examples, side, side, seed, layout=data.scene_layout)
    tuning = Corpus(source, data.captions, float(settings.instructed_share))
    corpus = tuning if name in TUNED else Corpus(source, data.captions, 0.0)
    tokenizer = _tokenizer(tuning, settings.instruction, int(settings.model.vocab_size))
    prompts = functools.partial(PromptTokenizer, tokenizer, int(settings.length), chat_template=False)
    documents = DocumentTokenizer(
        prompts(instruction=""), prompts(instruction=settings.instruction), int(settings.length)
    )
    if isinstance(model, T5Config):
        task = masked_token_task(name, model, tokenizer.mask_token_id)
    else:
        task = next_token_task(name, model)

    def batches(first: int) -> DocumentStream:
        rows = rows_of_process(training.batch_size, jax.process_index(), jax.process_count())
        return DocumentStream(corpus, documents, training.batch_size, first, rows)

    state = train_network(
        experiment, task, training, batches, mesh, rules, {"data": corpus.fingerprint}, later_steps=0.0
    )
    params = on_host(state.params, mesh, training.stalled_after)
    if jax.process_index() == 0:
        if isinstance(model, T5Config):
            save_t5_encoder(folder, model, params["encoder"], tokenizer)
        else:
            save_llm(folder, model, params, tokenizer)
    multihost_utils.sync_global_devices(f"saved {name}")


def check_settings(name: str, settings: ConfigDict) -> tuple[LLMConfig | T5Config, TrainConfig]:
    """Returns the configs of the model `name` and of its training, from `language_models` of the config.

    Raises:
      UserError: a key is missing there, or a value is impossible.
    """
    for key in ("instruction", "instructed_share", "length", "model", "t5", "train"):
        if key not in settings:
            raise UserError(f"config key language_models.{key} is missing")
    if not 0 < settings.instructed_share <= 1:
        raise UserError(
            f"language_models.instructed_share={settings.instructed_share} is a share of the tuned models' documents: "
            "use more than 0 and at most 1"
        )
    training = build(TrainConfig, settings.train, "language_models.train")
    family = FAMILIES[name]
    fields = LLM_FAMILIES[LLAMA_FAMILY if family == T5 else family]
    causal = build(LLMConfig, settings.model, "language_models.model", **fields)
    causal = dataclasses.replace(causal, dtype="float32")
    causal.as_encoder()  # raises for too few blocks
    if family != T5:
        return causal, training
    return build(T5Config, settings.t5, "language_models.t5", vocab_size=causal.vocab_size), training


def next_token_task(name: str, config: LLMConfig) -> Task:
    """Returns the task of next-token prediction; batches are {"tokens": int32 [B, L], "mask": bool [B, L]}."""
    model = CausalLM(config)

    def loss(params, frozen, batch, key, phase):
        del frozen, key, phase
        logits = model.apply({"params": params}, batch["tokens"])[:, :-1]  # [B, L - 1, V]
        return token_loss(logits, batch["tokens"][:, 1:], batch["mask"][:, 1:])

    def init(key):
        return model.init(key, jnp.zeros((1, 2), jnp.int32))["params"]

    return Task(name=name, init=draw_together(init), loss=loss)


class MaskedTokenModel(nn.Module):
    """T5's encoder with a linear head over the vocabulary, used in training only."""

    config: T5Config

    @nn.compact
    def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """tokens int32 [B, L], mask bool [B, L] -> float32 [B, L, V]."""
        x = T5Encoder(self.config, name="encoder")(tokens, mask)
        return Dense(self.config.vocab_size, ("embed", "vocab"), use_bias=False, name="head")(x)


def masked_token_task(name: str, config: T5Config, mask_token: int) -> Task:
    """Returns the task of predicting masked tokens; batches as in `next_token_task`."""
    model = MaskedTokenModel(config)

    def init(key):
        return model.init(key, jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool))["params"]

    def loss(params, frozen, batch, key, phase):
        del frozen, phase
        tokens, mask = batch["tokens"], batch["mask"]
        is_masked = mask & jax.random.bernoulli(key, MASKED, tokens.shape)
        logits = model.apply({"params": params}, jnp.where(is_masked, mask_token, tokens), mask)
        return token_loss(logits, tokens, is_masked)

    return Task(name=name, init=draw_together(init), loss=loss)


def _tokenizer(corpus: Corpus, instruction: str, vocab_size: int) -> PreTrainedTokenizerBase:
    """Trains a tokenizer on a sample of the corpus, instructions and answers included.

    Its last token is the mask, which occurs in no text.
    """
    texts = []
    for index in np.linspace(0, len(corpus) - 1, TOKENIZER_DOCUMENTS).astype(int).tolist():
        document = corpus[index]
        texts += [document.caption, *([instruction, document.answer] if document.answer else [])]
    tokenizer = train_tokenizer(texts, vocab_size - 1)
    tokenizer.add_special_tokens({"mask_token": "<|mask|>"})
    return tokenizer
