"""Compares a workdir's checkpoints with their manifests, and its frozen networks with the digests in checkpoints."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from etils import epath

from lidit_jax.checkpoint import finished_steps, read_provenance, verify_checkpoint
from lidit_jax.config import read_workdir
from lidit_jax.errors import UserError, one_line
from lidit_jax.experiment import LIDIT, Experiment
from lidit_jax.manifest import MANIFEST_FILE, DamagedError
from lidit_jax.weights import diffusers_vae, huggingface_llm
from lidit_jax.weights.digest import folder_digest
from lidit_jax.weights.folders import HUB_NAME, is_there
from lidit_jax.weights.safetensors_folder import read_config, weights_files


@dataclasses.dataclass(frozen=True)
class Finding:
    """Result of verifying one checkpoint or network; `str` gives the line to print.

    Attributes:
      name: its path in the workdir, or its folder.
      text: what was found.
      is_damaged: whether it can't be used.
    """

    name: str
    text: str
    is_damaged: bool = False

    def __str__(self) -> str:
        return one_line(f"{self.name}: {'damaged: ' if self.is_damaged else ''}{self.text}")


def check_workdir(workdir: epath.Path) -> Iterator[Finding]:
    """Yields a finding for each checkpoint of the workdir, newest first, and for each frozen network.

    Raises:
      UserError: if the folder is not a workdir, or has neither checkpoints nor networks.
    """
    experiment = Experiment(read_workdir(workdir), workdir, only_shapes=True)
    findings, recorded = 0, {}
    for folder in sorted((workdir / "training").glob("*/checkpoints"), key=str):
        for step in finished_steps(folder):
            finding = _check_checkpoint(folder / str(step), f"training/{folder.parent.name}/checkpoints/{step}")
            if folder.parent.name == LIDIT and not finding.is_damaged:
                recorded = recorded or read_provenance(folder / str(step)).get("frozen", {})
            findings += 1
            yield finding
    for finding in _check_networks(experiment, recorded if isinstance(recorded, dict) else {}):
        findings += 1
        yield finding
    if not findings:
        raise UserError(f"{workdir}: no checkpoint and no trained network there yet")


def _check_checkpoint(folder: epath.Path, name: str) -> Finding:
    try:
        has_manifest = verify_checkpoint(folder)
    except DamagedError as error:
        return Finding(name, str(error), is_damaged=True)
    return Finding(name, "intact" if has_manifest else f"not verified: it is from before {MANIFEST_FILE}")


def _check_networks(experiment: Experiment, recorded: Mapping[str, Any]) -> Iterator[Finding]:
    """Yields a finding for each frozen network that exists, or that the config names.

    Args:
      experiment: the run.
      recorded: digest of each network in the newest intact checkpoint of LI-DiT.
    """
    for name, encoder in experiment.encoders.items() if experiment.has_lidit else ():
        place, own = f"encoders.{name}", experiment.workdir / "encoders" / name
        digest = functools.partial(experiment.encoder_digest, name)
        yield from _check_network(
            place, encoder.weights, own, huggingface_llm.WEIGHTS_STEM, digest, recorded.get(place)
        )
    own = experiment.vae_folder()
    digest = functools.partial(folder_digest, own)
    yield from _check_network(
        "vae", experiment.vae.weights, own, diffusers_vae.WEIGHTS_STEM, digest, recorded.get("vae")
    )


def _check_network(
    name: str, weights: str, own: epath.Path, stem: str, digest: Callable[[], str], recorded: str | None
) -> Iterator[Finding]:
    """Yields the finding of a network, or none if the run has not trained it yet.

    Args:
      name: its place in the config.
      weights: folder or hub name that the config gives; "" if the run trains the network itself.
      own: its folder in the workdir.
      stem: name of its weights file without the ending.
      digest: computes its digest.
      recorded: its digest in a checkpoint of LI-DiT, or None.
    """
    folder = epath.Path(weights) if weights else own
    if HUB_NAME.fullmatch(weights) and not is_there(folder):
        yield Finding(name, f"not verified: {weights} is on the Hugging Face hub")
        return
    if not weights and not folder.exists():
        return
    name = f"{name} ({folder})"
    try:
        read_config(folder)
        weights_files(folder, stem)
        found = digest()
    except UserError as error:
        yield Finding(name, str(error), is_damaged=True)
        return
    if recorded is None:
        yield Finding(name, "readable; no checkpoint of LI-DiT has recorded its digest")
    elif found != recorded:
        yield Finding(name, f"its digest is {found}, LI-DiT was trained with {recorded!r:.40}", is_damaged=True)
    else:
        yield Finding(name, "intact")
