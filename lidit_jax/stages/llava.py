"""Multi-modal instruction tuning of an LLM after LLaVA-1.5 (paper section 3.1; Liu et al. 2023): task and stages.

Stage "align" trains the projector alone, stage "tune" the projector and the LLM, both on the tokens of answers. The
result is a folder that transformers and `encoders.NAME.weights` read.
"""

import contextlib
import functools
import logging
import shlex
import time
from collections.abc import Mapping
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lidit_jax.config import CONFIG_FILE, claim_workdir
from lidit_jax.data.dataset import Dataset
from lidit_jax.errors import UserError, cannot_write
from lidit_jax.files import check_writable
from lidit_jax.goodput import Goodput
from lidit_jax.llava_run import OUTPUT, LlavaRun
from lidit_jax.models.flops import llava_step
from lidit_jax.models.initialize import draw_together
from lidit_jax.models.llava import IMAGE_TEXT, Llava, LlavaConfig, image_features
from lidit_jax.models.llava_section import LlavaStageConfig
from lidit_jax.models.token_loss import token_losses
from lidit_jax.parallel.compilation_cache import COMPILED, cache_compilations
from lidit_jax.parallel.mesh import make_mesh
from lidit_jax.parallel.preemption import activity
from lidit_jax.parallel.rules import ShardingRules, replicated
from lidit_jax.parallel.watchdog import watched
from lidit_jax.stages.train_network import train_network
from lidit_jax.trainer import Task, check_batch_size
from lidit_jax.weighted_mean import Perplexity, WeightedMean
from lidit_jax.weights.safetensors_folder import new_folder
from lidit_jax.workdir_lock import LOCK_FILE, lock

logger = logging.getLogger(__name__)

PROJECTOR = ("linear_1", "linear_2")
SAMPLED = 300  # conversations on which the share of truncated ones is estimated


def llava_task(
    name: str,
    config: LlavaConfig,
    normalisation: tuple[tuple[float, ...], tuple[float, ...]],
    frozen: Mapping[str, Any],
) -> Task:
    """Returns the task of a stage: next-token prediction on the answers of conversations about an image.

    A batch has {"image": uint8 [B, S, S, 3], "tokens": int32 [B, L], "counted": bool [B, L], "truncated": bool [B]}.

    Args:
      name: "align", whose parameters are the projector's, or "tune", whose parameters are all of `Llava`'s.
      config: the networks.
      normalisation: mean and standard deviation of red, green and blue.
      frozen: {"tower": parameters of the vision tower} and, for "align", "language_model": those of the LLM.
    """
    model, (mean, deviation) = Llava(config), normalisation

    def init(key):
        tokens = jnp.full((1, config.tokens_per_image), config.image_token, jnp.int32)
        features = jnp.zeros((1, config.tokens_per_image, config.vision.hidden_size), config.llm.dtype)
        if name == "align":
            return model.init(key, features, method=Llava.project)["params"]
        return model.init(key, tokens, features)["params"]

    def loss(params, frozen, batch, key, phase):
        del key, phase
        if name == "align":
            params = {**params, "language_model": frozen["language_model"]}
        with jax.named_scope("vision_tower"):
            pixels = (batch["image"].astype(jnp.float32) / 255 - jnp.asarray(mean)) / jnp.asarray(deviation)
            features = image_features(config, frozen["tower"], pixels)
        hidden = model.apply({"params": params}, batch["tokens"], features, method=Llava.hidden)
        losses = token_losses(hidden[:, :-1], head_kernel(params["language_model"]), batch["tokens"][:, 1:])
        mean_loss = WeightedMean.over(losses, batch["counted"][:, 1:])
        truncated = WeightedMean.over(batch["truncated"])
        return mean_loss, {"perplexity": Perplexity(mean_loss.mean, mean_loss.weight), "truncated": truncated}

    def flops(batch):
        rows, length = batch["tokens"].shape
        return llava_step(config, rows, length, trains_llm=name == "tune")

    return Task(name=name, init=draw_together(init), loss=loss, frozen=frozen, flops=flops)


def head_kernel(language_model: Mapping[str, Any]) -> jax.Array:
    """Returns the kernel of a `CausalLM`'s output head, [C, V], from its parameters."""
    if "lm_head" in language_model:
        return language_model["lm_head"]["kernel"]
    return language_model["model"]["embed_tokens"].T


def run_llava(
    config: ConfigDict, workdir: epath.Path, keep_compiled: bool = False, started: float | None = None
) -> None:
    """Trains the stages of a config's `llava` section, and writes the multi-modal LLM; see `run_stages`."""
    started = time.monotonic() if started is None else started
    if not (workdir / CONFIG_FILE).exists():
        check_writable(workdir, f"--workdir={workdir}")
    with activity("checking the config and the data"):
        run = LlavaRun(config, workdir)
        mesh, rules = make_mesh(config.mesh), ShardingRules()
        stages = run.section.stages()
        for name, stage in stages.items():
            try:
                check_batch_size(stage.train, mesh, rules)
            except UserError as error:
                raise UserError(f"llava.{name}.train: {error}") from None
        is_finished, digests = run.is_finished, dict(run.digests)
        datasets = {} if is_finished else {name: run.open_data(name, stage) for name, stage in stages.items()}
        for name, dataset in datasets.items():
            dataset.check_batch_size(stages[name].train.batch_size)
            _check_answers(run, name, stages[name], dataset)
            digests |= dict.fromkeys((f"llava.{name}.data.path", f"llava.{name}.data.data_dir"), dataset.fingerprint)
        claim = functools.partial(claim_workdir, workdir, config, digests=digests)
        claim(write=False, may_grow=not is_finished)  # the folder is of the last step
    if is_finished:
        if jax.process_index() == 0:
            logger.info("%s", _summary(run))
        return
    with _lock(workdir), Goodput(workdir, time.monotonic() - started) as goodput:
        claim(write=jax.process_index() == 0)
        multihost_utils.sync_global_devices("claimed the workdir")
        if keep_compiled:
            cache_compilations(workdir / COMPILED)
        projector, params = None, None
        for name, stage in stages.items():
            _log_data(run, name, stage, datasets[name])
            with activity(f"training the stage {name}"):
                params = _train_stage(run, name, stage, datasets[name], mesh, rules, projector, goodput)
            projector = {layer: params[layer] for layer in PROJECTOR}
        if "tune" not in stages:
            params = {**projector, "language_model": run.load_llm("float32", mesh, rules)}
        with activity("writing the multi-modal LLM"), goodput.timed("saving"):
            _write(run, params, mesh, stages[list(stages)[-1]].train.stalled_after)
    if jax.process_index() == 0:
        logger.info("%s\n%s", goodput.summary(), _summary(run))


def _train_stage(
    run: LlavaRun,
    name: str,
    stage: LlavaStageConfig,
    dataset: Dataset,
    mesh: Mesh,
    rules: ShardingRules,
    projector: Any,
    goodput: Goodput,
) -> Any:
    """Trains one stage; returns its parameters."""
    frozen = {"tower": run.load_tower(mesh, rules)}
    if name == "align":
        frozen["language_model"] = run.load_llm(run.section.dtype, mesh, rules)
    task, tokenize = llava_task(name, run.llava, run.normalisation, frozen), run.conversations(stage)

    def batches(first: int):
        return dataset.batches(stage.train.batch_size, run.config.seed, tokenize, first=first)

    def initial_params(abstract):
        params = {"language_model": run.load_llm("float32", mesh, rules, abstract["language_model"])}
        return params | (projector or _random_projector(task, abstract, run.config.seed))

    provenance = {"data": dataset.fingerprint, "image_token": run.llava.image_token, **run.digests}
    state = train_network(
        *(run, task, stage.train, batches, mesh, rules, provenance, goodput),
        initial_params=initial_params if name == "tune" else None,
        later_steps=_later_steps(run, name),
    )
    return state.params


def _random_projector(task: Task, abstract: Any, seed: int) -> Any:
    where = {layer: jax.tree.map(lambda x: x.sharding, abstract[layer]) for layer in PROJECTOR}
    init = jax.jit(lambda key: {layer: nn.unbox(task.init(key))[layer] for layer in PROJECTOR}, out_shardings=where)
    return init(jax.random.key(seed))


def _later_steps(run: LlavaRun, name: str) -> float:
    """Returns the work of the stage after `name`, in steps of that one."""
    stages = run.section.stages()
    if name == "tune" or "tune" not in stages:
        return 0.0
    work = [
        llava_step(run.llava, stage.train.batch_size, stage.max_length, trains_llm=each == "tune")
        for each, stage in stages.items()
    ]
    return stages["tune"].train.steps * work[1] / work[0]


def _write(run: LlavaRun, params: Any, mesh: Mesh, stalled_after: float) -> None:
    """Writes the result on the first host; all hosts gather each tensor, in the same order."""
    files, flat = run.files(), flax.traverse_util.flatten_dict(params)
    gather = jax.jit(lambda x: x, out_shardings=replicated(mesh))
    gather_block = jax.jit(lambda x, block: x[block], out_shardings=replicated(mesh))

    def read(path: tuple[str, ...], block: int | None) -> np.ndarray:
        found = gather(flat[path]) if block is None else gather_block(flat[path], np.int32(block))
        return np.asarray(jax.device_get(found), np.float32)

    with watched(stalled_after, "writing the multi-modal LLM"):
        if jax.process_index():
            for _ in files.trained_tensors(read):
                pass
        else:
            try:
                with new_folder(run.output) as scratch:
                    files.save(epath.Path(scratch), read, dtype=run.section.save_dtype)
            except OSError as error:
                raise cannot_write(str(run.output), error) from error
        multihost_utils.sync_global_devices("wrote the multi-modal LLM")


def _check_answers(run: LlavaRun, name: str, stage: LlavaStageConfig, dataset: Dataset) -> None:
    """Raises UserError if no answer fits into a row; logs the share of truncated conversations on the first host."""
    tokenized = run.conversations(stage)(dataset.captions(SAMPLED, run.config.seed))
    if not tokenized["counted"][:, 1:].any():
        raise UserError(
            f"llava.{name}.max_length={stage.max_length} has no room for an answer after the image and the question: "
            "raise it, or shorten llava.question"
        )
    truncated = float(tokenized["truncated"].mean())
    if truncated and jax.process_index() == 0:
        logger.warning("%s: %.1f%% of conversations are longer than %d tokens", name, 100 * truncated, stage.max_length)


def _log_data(run: LlavaRun, name: str, stage: LlavaStageConfig, dataset: Dataset) -> None:
    """Logs the data of a stage, and one conversation as the LLM reads it; on the first host only."""
    if jax.process_index():
        return
    logger.info("%s: %s", name, dataset.summary())
    conversations = run.conversations(stage)
    for text in dataset.captions(1, run.config.seed):
        ids, counted = conversations.encode(conversations.turns(text))
        shown = [token for token in ids if token != run.llava.image_token]
        answers = [token for token, counts in zip(ids, counted, strict=True) if counts]
        tokenizer = run.tokenizer
        logger.info("%s: a conversation, without its %s: %r", name, IMAGE_TEXT, tokenizer.decode(shown)[:600])
        logger.info("%s: its answers, which are learnt: %r", name, tokenizer.decode(answers)[:600])


def _summary(run: LlavaRun) -> str:
    output = shlex.quote(str(run.output))
    return "\n".join(
        [
            f"finished: {run.workdir}",
            f"  {OUTPUT}: the multi-modal LLM, in Hugging Face's format",
            f"use it as a prompt encoder: give --config.encoders.NAME.weights={output}",
            f"see what it answers: python -m lidit_jax.describe --weights={output} --image=FILE "
            f"--prompt={shlex.quote(run.section.question)}",
        ]
    )


def _lock(workdir: epath.Path) -> contextlib.AbstractContextManager[object]:
    """Locks the workdir on the first host, for all of them."""
    return contextlib.nullcontext() if jax.process_index() else lock(workdir / LOCK_FILE, str(workdir))
