"""Plan, shards and statistics in the output folder of `recaption`."""

import collections
import dataclasses
import logging
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from lidit_jax.data.data_config import DataConfig
from lidit_jax.data.indexed.source import IndexedSource
from lidit_jax.errors import UserError, cannot_write
from lidit_jax.files import created_folder, is_unused, read_json, write_json
from lidit_jax.recaption.request import RecaptionRequest
from lidit_jax.score.load_model import model_folder
from lidit_jax.weights.digest import file_digest, folder_digest

logger = logging.getLogger(__name__)

PLAN = "recaption.json"
SAMPLES_A_SHARD = 1000
WRITTEN = "written"  # in the statistics: samples of the shard


class OutputShard(NamedTuple):
    """A shard to write.

    Attributes:
      name: name of the tar.
      indices: indices of its samples in the data set.
    """

    name: str
    indices: range

    @property
    def statistics(self) -> str:
        """Name of the file with its statistics, as img2dataset names its own."""
        return f"{self.name.removesuffix('.tar')}_stats.json"


def output_shards(num_samples: int) -> list[OutputShard]:
    """Returns the shards of a data set, each of `SAMPLES_A_SHARD` samples or fewer."""
    starts = range(0, num_samples, SAMPLES_A_SHARD)
    return [
        OutputShard(f"{number:06}.tar", range(start, min(start + SAMPLES_A_SHARD, num_samples)))
        for number, start in enumerate(starts)
    ]


def make_plan(source: IndexedSource, data: DataConfig, request: RecaptionRequest) -> dict[str, Any]:
    """Returns everything that determines the content of the folder, as JSON."""
    facts = dataclasses.asdict(request)
    del facts["batch_size"]  # as much as fits into memory, which may change when a run is resumed
    return facts | {
        "data": source.fingerprint,
        "num_samples": len(source),
        "samples_a_shard": SAMPLES_A_SHARD,
        "min_aesthetic": data.min_aesthetic,
        "aesthetic_key": data.aesthetic_key,
        "weights": request.weights and _model_digest("weights", request.weights),
        "clip": request.clip and _model_digest("clip", request.clip),
        "aesthetic_head": request.aesthetic_head and file_digest(request.aesthetic_head),
    }


def _model_digest(flag: str, name: str) -> str:
    """Returns a digest of a model's weights, and of its JSON files and chat templates: processor, end tokens, …."""
    folder = model_folder(flag, name)
    settings = sorted((*folder.glob("*.json"), *folder.glob("*.jinja")), key=lambda file: file.name)
    return "-".join((folder_digest(folder), file_digest(*settings)))


def check_plan(out: epath.Path, plan: Mapping[str, Any]) -> None:
    """Checks that a folder is unused or was begun with the same plan; writes nothing.

    Raises:
      UserError: the folder has other content.
    """
    if not (out / PLAN).exists():
        if not is_unused(out):
            raise UserError(f"{out} is not empty and holds no shards of recaption: use another --out")
        return
    found = _read(out / PLAN)
    if found is None:
        raise UserError(f"{out / PLAN} is damaged: use another --out")
    for name, now in plan.items():
        if found.get(name) != now:
            raise UserError(f"{out} was begun with {name}={found.get(name)!r:.80}, now {now!r:.80}: use another --out")


def claim(out: epath.Path, plan: Mapping[str, Any]) -> None:
    """Writes the plan into the folder, unless another process has.

    Raises:
      UserError: the folder cannot be written, or another process has claimed it for another request.
    """
    try:
        with created_folder(out):
            # A name of its own: several processes start at once and write the same plan.
            temporary = out / f".{PLAN}.{secrets.token_hex(8)}.tmp"
            try:
                write_json(temporary, dict(plan))
                if not (out / PLAN).exists():
                    temporary.replace(out / PLAN)
            finally:
                temporary.unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(f"--out={out}", error) from error
    check_plan(out, plan)


def _read(file: epath.Path) -> dict[str, Any] | None:
    """Returns the object in a JSON file; None if it is damaged or missing."""
    try:
        found = read_json(file)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def report(out: epath.Path, shards: Sequence[OutputShard], request: RecaptionRequest, data: DataConfig) -> None:
    """Logs what became of the samples of the complete shards and, once all are complete, how to train on them.

    Raises:
      UserError: no sample is left.
    """
    complete = [shard for shard in shards if (out / shard.name).exists()]
    counts: collections.Counter[str] = collections.Counter()
    for shard in complete:
        statistics = _read(out / shard.statistics)
        if statistics is None or not all(type(count) is int for count in statistics.values()):
            raise UserError(f"{out / shard.statistics} is damaged: remove it and {shard.name}, and start again")
        counts.update(statistics)
    others = ", ".join(f"{reason}: {count}" for reason, count in counts.most_common() if reason != WRITTEN)
    logger.info("%s: %d images%s", out, counts[WRITTEN], f" ({others})" if others else "")
    if len(complete) == len(shards) and not counts[WRITTEN]:
        raise UserError(f"{out} has no image: none could be used ({others})")
    if len(complete) < len(shards):
        logger.info("%d of %d shards are complete; the other parts write the rest", len(complete), len(shards))
        return
    if request.weights:
        logger.info(
            "train on it with --config.data.source=tar --config.data.path=%s --config.data.captions.%s=1, and the same "
            "for the fields of the original captions",
            *(out, request.field),
        )
    if request.clip:
        logger.info("its scores are --config.data.aesthetic_key=%s", data.aesthetic_key)
