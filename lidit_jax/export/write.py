"""Exports a workdir to a folder that diffusers loads without JAX.

Memory holds one tensor at a time: LI-DiT's weights go from the checkpoint to the file tensor by tensor, those of the
VAE and the LLMs are copied as files. `export/folder.py` describes the layout of the folder.
"""

import contextlib
import dataclasses
import importlib.util
import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tqdm
from etils import epath

from lidit_jax.checkpoint_weights import open_weights
from lidit_jax.config import read_workdir
from lidit_jax.errors import UserError, cannot_write
from lidit_jax.experiment import LIDIT, Experiment, checkpoint_folder
from lidit_jax.export.copying import copy_files, model_files, num_bytes, tokenizer_files
from lidit_jax.export.folder import (
    INDEX_FILE,
    MAX_ENCODERS,
    PIPELINE,
    TRANSFORMER,
    TextEncoderEntry,
    component_names,
    is_exported_folder,
    model_index,
)
from lidit_jax.export.model_card import model_card
from lidit_jax.export.transformers_class import check_reference, transformers_class, transformers_config
from lidit_jax.files import check_writable, existing_parent, write_json
from lidit_jax.models.lidit_config import COMPUTE_FIELDS
from lidit_jax.models.vae_config import VAEConfig
from lidit_jax.text.encoders import T5TextEncoder
from lidit_jax.text.load_encoder import open_encoder, tokenizer_folder
from lidit_jax.trained_model import compare_frozen, move_weights
from lidit_jax.weights import diffusers_scheduler, diffusers_vae, huggingface_llm
from lidit_jax.weights.diffusers_lidit import save_lidit
from lidit_jax.weights.folders import HUB_NAME
from lidit_jax.weights.safetensors_folder import CONFIG_FILE, local_folder, new_folder, read_config

logger = logging.getLogger(__name__)

WEIGHTS = ("ema", "params")
DTYPES = {"float32": 4, "bfloat16": 2}  # bytes per element
TEXT_ENCODERS = ("copy", "reference")
# Names of the entries at the top level of an exported folder.
EXPORTED = re.compile(
    r"model_index\.json|pipeline_lidit\.py|README\.md|(text_encoder|tokenizer)(_\d+)?|transformer|vae|scheduler"
)
SPARE_BYTES = 64 << 20  # room for configs, code and the model card


@dataclasses.dataclass(frozen=True)
class Request:
    """Options of an export.

    Attributes:
      workdir: workdir of a run that trained LI-DiT.
      out: folder to write; must not exist or be empty, or with `overwrite` be a previous export.
      weights: which weights of LI-DiT: "ema" (moving average) or "params" (raw).
      dtype: dtype of LI-DiT's weights; those of the VAE and the LLMs are copied unchanged.
      text_encoders: "copy" or "reference" for the LLMs that the run did not train; None copies those in folders and
        refers to those on the Hugging Face hub.
      max_shard_gb: largest size of a file of LI-DiT's weights, in 10^9 bytes.
      overwrite: whether to replace a previous export.
      encoders: folders of encoders, by name, that are no longer where the run's config says.
      vae: folder of the VAE, if it is no longer where the run's config says.
    """

    workdir: epath.Path
    out: epath.Path
    weights: str = "ema"
    dtype: str = "float32"
    text_encoders: str | None = None
    max_shard_gb: float = 5.0
    overwrite: bool = False
    encoders: Mapping[str, str] = dataclasses.field(default_factory=dict)
    vae: str | None = None


@dataclasses.dataclass(frozen=True)
class _TextEncoder:
    """A prompt encoder to export.

    Attributes:
      entry: its entry in model_index.json.
      config: contents of its config.json.
      files: weights files to copy; empty for an encoder that is exported as a reference.
      tokenizer: tokenizer files to copy; empty for an encoder that is exported as a reference.
    """

    entry: TextEncoderEntry
    config: Mapping[str, Any]
    files: Sequence[epath.Path] = ()
    tokenizer: Sequence[epath.Path] = ()


def export(request: Request) -> None:
    """Writes the exported folder atomically.

    Raises:
      UserError: an option is invalid or a file is missing or damaged, before anything is written; or the disk is full.
    """
    check_writable(request.out, f"--out={request.out}")
    _check_request(request)
    config = move_weights(read_workdir(request.workdir), request.encoders, request.vae)
    run = Experiment(config, request.workdir)
    if not run.has_lidit:
        raise UserError(
            f"{request.workdir} trained only a VAE, which is already in diffusers' format: {run.vae_folder()}"
        )
    run.check_folders()
    _check_not_used(request.out, run)
    encoders = [_text_encoder(run, name, request.text_encoders) for name in run.encoders]
    vae = run.vae_folder()
    VAEConfig.from_dict(read_config(vae))
    vae_files = [vae / CONFIG_FILE, *model_files(vae, diffusers_vae.WEIGHTS_STEM)]
    checkpoints = checkpoint_folder(run.workdir, LIDIT)
    with open_weights(checkpoints, request.weights, run.train.strict_restore) as weights:
        compare_frozen(run, checkpoints / str(weights.step), request.encoders, request.vae)
        lidit_bytes = weights.num_parameters * DTYPES[request.dtype]
        copied_bytes = num_bytes([*vae_files, *(file for e in encoders for file in (*e.files, *e.tokenizer))])
        _check_space(request.out, lidit_bytes + copied_bytes)
        with (
            _new_or_replaced(request.out, request.overwrite) as folder,
            tqdm.tqdm(
                total=lidit_bytes + copied_bytes, unit="B", unit_scale=True, desc="writing", mininterval=1
            ) as bar,
        ):
            save_lidit(
                folder / "transformer",
                run.model.config,
                weights,
                dtype=request.dtype,
                max_shard_bytes=int(request.max_shard_gb * 10**9),
                progress=bar.update,
            )
            _copy_code(TRANSFORMER[0], folder / "transformer")
            copy_files(vae_files, folder / "vae", bar.update)
            _write_encoders(encoders, folder, bar.update)
            _write_scheduler(run, folder)
            _write_index(run, encoders, {"step": weights.step, "weights": request.weights}, folder)
            _copy_code(PIPELINE[0], folder)
            card = model_card(run, [e.entry for e in encoders], weights.step, weights.num_parameters, request.dtype)
            (folder / "README.md").write_text(card, encoding="utf-8")
    logger.info(
        "%s: %s weights of step %d, %.0f MB; load it with diffusers.DiffusionPipeline.from_pretrained(%r, "
        "trust_remote_code=True)",
        *(request.out, request.weights, weights.step, (lidit_bytes + copied_bytes) / 1e6, str(request.out)),
    )


def _check_request(request: Request) -> None:
    """Checks the options that do not depend on the workdir.

    Raises:
      UserError: an option is invalid, or `out` may not be written.
    """
    choices = (("weights", WEIGHTS), ("dtype", tuple(DTYPES)), ("text_encoders", (None, *TEXT_ENCODERS)))
    for name, known in choices:
        if getattr(request, name) not in known:
            raise UserError(f"--{name}={getattr(request, name)}: use {' or '.join(filter(None, known))}")
    if not 0.001 <= request.max_shard_gb <= 1e6:
        raise UserError(f"--max_shard_gb={request.max_shard_gb} is not from 0.001 to 1000000")
    out = local_folder(request.out)
    if not out.exists() or not any(out.iterdir()):
        return
    if not request.overwrite:
        raise UserError(f"--out={out} is not empty: use another folder, or pass --overwrite")
    if not is_exported_folder(epath.Path(out)):
        raise UserError(f"--out={out} is not empty and not an export: --overwrite only replaces exports")
    for entry in sorted(out.iterdir()):
        if not EXPORTED.fullmatch(entry.name):
            raise UserError(
                f"{entry} is not part of an export, and --overwrite would delete it: move it, or use another --out"
            )


def _check_not_used(out: epath.Path, run: Experiment) -> None:
    """Checks that the folder to replace contains nothing that the run depends on.

    Raises:
      UserError: the run, its weights or its `start_from` are in the folder.
    """
    replaced = local_folder(out).resolve()
    used = [run.vae_folder(), *(run.encoder_folder(name) for name in run.encoders)]
    used += [epath.Path(run.config.get("start_from") or run.workdir), epath.Path(run.workdir)]
    for folder in used:
        if "://" not in str(folder) and Path(folder).resolve().is_relative_to(replaced):
            raise UserError(f"--out={out} contains {folder}, which the run needs: use another folder")


def _check_space(out: epath.Path, needed: int) -> None:
    """Checks the free space on the disk.

    Raises:
      UserError: fewer than `needed` bytes and the spare ones are free.
    """
    free, needed = shutil.disk_usage(existing_parent(out)).free, needed + SPARE_BYTES
    if free < needed:
        raise UserError(
            f"--out={out} needs {needed / 1e6:,.0f} MB with {SPARE_BYTES / 1e6:.0f} MB to spare, the disk has "
            f"{free / 1e6:,.0f} MB free: free some space"
        )


def _text_encoder(run: Experiment, name: str, mode: str | None) -> _TextEncoder:
    if list(run.encoders).index(name) >= MAX_ENCODERS:
        raise UserError(
            f"the run has {len(run.encoders)} encoders, but an exported pipeline supports at most {MAX_ENCODERS}"
        )
    config, folder = run.encoders[name], run.encoder_folder(name)
    encoder = open_encoder(folder, run.prompt_tokenizer, dtype=config.dtype)
    values = read_config(folder)
    tokenizer = encoder.tokenizer
    entry = TextEncoderEntry(
        name=name,
        dtype=config.dtype,
        kind="t5" if isinstance(encoder, T5TextEncoder) else "llm",
        class_name=transformers_class(values),
        prefix=tuple(tokenizer.prefix().tolist()),
        separator=tokenizer.separator,
        max_length=tokenizer.max_length,
    )
    if config.weights and (mode or _default_mode(config.weights)) == "reference":
        check_reference(values, f"encoders.{name}")
        return _TextEncoder(dataclasses.replace(entry, source=_source(config.weights, folder)), values)
    return _TextEncoder(
        entry,
        transformers_config(values),
        model_files(folder, huggingface_llm.WEIGHTS_STEM),
        tokenizer_files(tokenizer_folder(folder)),
    )


def _default_mode(weights: str) -> str:
    return "reference" if _is_hub_name(weights) else "copy"


def _is_hub_name(weights: str) -> bool:
    return bool(HUB_NAME.fullmatch(weights)) and not epath.Path(weights).exists()


def _source(weights: str, folder: epath.Path) -> dict[str, Any]:
    """Returns the source of a referenced encoder: its hub name and the revision that the run used, or a local folder.

    Raises:
      UserError: it is in a bucket, from which transformers cannot load.
    """
    if _is_hub_name(weights):
        # The hub's cache names a snapshot's folder after its commit.
        name, _, wanted = weights.partition("@")
        revision = folder.name if folder.parent.name == "snapshots" else wanted or None
        return {"name": name, "revision": revision}
    if "://" in weights:
        raise UserError(f"{weights} is in a bucket, from which transformers cannot load: use --text_encoders=copy")
    source = {"name": str(Path(weights).absolute()), "revision": None}
    tokenizer = tokenizer_folder(folder)
    return source if tokenizer == folder else source | {"tokenizer": str(Path(tokenizer).absolute())}


def _write_encoders(encoders: Sequence[_TextEncoder], folder: Path, copied: Any) -> None:
    for index, encoder in enumerate(encoders):
        if encoder.entry.source is not None:
            continue
        model, tokenizer = component_names(index)
        copy_files(encoder.files, folder / model, copied)
        write_json(folder / model / CONFIG_FILE, encoder.config)
        copy_files(encoder.tokenizer, folder / tokenizer, copied)


def _write_scheduler(run: Experiment, folder: Path) -> None:
    (folder / "scheduler").mkdir()
    values = diffusers_scheduler.scheduler_config(run.schedule, run.sample.sampler)
    write_json(folder / "scheduler" / diffusers_scheduler.CONFIG_FILE, values)


def _write_index(run: Experiment, encoders: Sequence[_TextEncoder], trained: Mapping[str, Any], folder: Path) -> None:
    text = dataclasses.asdict(run.text)
    facts = {
        "resolution": run.data.resolution,
        "text": {key: text[key] for key in ("max_length", "instruction", "system_prompt", "chat_template")},
        "model": {key: getattr(run.model.config, key) for key in COMPUTE_FIELDS},
        "diffusion": dataclasses.asdict(run.schedule),
        "sample": dataclasses.asdict(run.sample),
        "vae_dtype": run.vae.dtype,
        "trained": trained,
    }
    scheduler_class = diffusers_scheduler.scheduler_class(run.sample.sampler)
    write_json(folder / INDEX_FILE, model_index([e.entry for e in encoders], scheduler_class, facts))


def _copy_code(module: str, folder: Path) -> None:
    """Copies a module of `lidit_jax/pytorch`, located without importing it, since PyTorch may be missing."""
    spec = importlib.util.find_spec("lidit_jax.pytorch")
    [package] = spec.submodule_search_locations
    shutil.copyfile(Path(package) / f"{module}.py", folder / f"{module}.py")


@contextlib.contextmanager
def _new_or_replaced(out: epath.Path, overwrite: bool) -> Iterator[Path]:
    """Yields a scratch folder that is renamed to `out` when complete, replacing the old one if `overwrite` is set."""
    folder = local_folder(out).resolve()
    if not overwrite or not folder.exists():
        with new_folder(folder) as scratch:
            yield scratch
        return
    fresh, old = (folder.parent / f".{folder.name}.{kind}.{uuid.uuid4().hex}" for kind in ("fresh", "old"))
    with new_folder(fresh) as scratch:
        yield scratch
    try:
        os.replace(folder, old)
        os.replace(fresh, folder)
    except OSError as error:
        if old.exists():
            os.replace(old, folder)
        shutil.rmtree(fresh, ignore_errors=True)
        raise cannot_write(str(folder), error) from error
    shutil.rmtree(old, ignore_errors=True)
