"""Layout of an exported folder: makes the contents of its model_index.json, and reads the folder back as a config.

    model_index.json   classes of the components, and under "lidit" the facts of the run that none of their configs hold
    pipeline_lidit.py  the pipeline
    README.md          the model card
    transformer/       LI-DiT, with its code
    vae/  scheduler/   in diffusers' format
    text_encoder/  tokenizer/  text_encoder_2/  tokenizer_2/  …   in transformers' format, sorted by name in the config

An encoder that the folder does not contain is listed in "text_encoder_sources".
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from lidit_jax.diffusion.schedules import RectifiedFlow, Schedule
from lidit_jax.errors import UserError
from lidit_jax.weights import diffusers_scheduler
from lidit_jax.weights.diffusers_lidit import read_lidit_config
from lidit_jax.weights.diffusers_vae import DIFFUSERS_VERSION
from lidit_jax.weights.folders import HUB_NAME, is_there
from lidit_jax.weights.published_config import check_format_version
from lidit_jax.weights.safetensors_folder import read_config, read_json_object

INDEX_FILE = "model_index.json"
PIPELINE = ("pipeline_lidit", "LIDiTPipeline")  # module and class
TRANSFORMER = ("transformer_lidit", "LIDiTTransformer2DModel")
FORMAT_VERSION = 1  # version of the "lidit" object in model_index.json
MAX_ENCODERS = 4
MAX_TOKENS = 1 << 20  # tokens per prompt; a larger number is damaged
MAX_SIDE = 1 << 16  # pixels
MAX_TIMES = 1e6  # bound on the mean and standard deviation of logit(s), s the training time
# Fields of `RectifiedFlow` that only training uses; scheduler_config.json does not have them.
TRAINING_ONLY = ("logit_mean", "logit_std")
# Sections that `Experiment` requires although a trained model does not use them.
UNUSED_SECTIONS = {
    "seed": 0,
    "mesh": {"fsdp": -1},
    "train": {"steps": 1, "batch_size": 1, "learning_rate": 1e-4},
}


@dataclasses.dataclass(frozen=True)
class TextEncoderEntry:
    """Entry of one prompt encoder in model_index.json.

    Attributes:
      name: its name in the config.
      dtype: its compute dtype in training.
      kind: "llm" (causal; features of the third-to-last block) or "t5" (bidirectional; features of the last layer).
      class_name: name of its class in transformers.
      prefix: token ids before every prompt (see `PromptTokenizer`).
      separator: text between prefix and prompt (see `PromptTokenizer`).
      max_length: tokens per prompt, end token included (see `PromptTokenizer`).
      source: {"name", "revision"} of an encoder that the folder does not contain, else None.
    """

    name: str
    dtype: str
    kind: str
    class_name: str
    prefix: tuple[int, ...]
    separator: str
    max_length: int
    source: Mapping[str, Any] | None = None

    def facts(self) -> dict[str, Any]:
        keys = ("name", "dtype", "kind", "separator", "max_length")
        return {key: getattr(self, key) for key in keys} | {"prefix": list(self.prefix)}


def component_names(index: int) -> tuple[str, str]:
    """Returns the component names of an encoder and its tokenizer.

    Index 0 -> ("text_encoder", "tokenizer"), index 1 -> ("text_encoder_2", "tokenizer_2"), …
    """
    suffix = f"_{index + 1}" if index else ""
    return f"text_encoder{suffix}", f"tokenizer{suffix}"


def model_index(encoders: Sequence[TextEncoderEntry], scheduler_class: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the contents of model_index.json.

    Args:
      encoders: prompt encoders, in the order of their component names.
      scheduler_class: name of diffusers' scheduler class.
      facts: values about the run for the "lidit" object, serialisable as JSON; `read_folder` needs resolution, text,
        model, diffusion, sample and vae_dtype.
    """
    components: dict[str, Any] = {}
    sources = {}
    for index in range(MAX_ENCODERS):
        encoder, tokenizer = component_names(index)
        components |= {encoder: [None, None], tokenizer: [None, None]}
        if index >= len(encoders):
            continue
        entry = encoders[index]
        if entry.source is None:
            components[encoder] = ["transformers", entry.class_name]
            components[tokenizer] = ["transformers", "PreTrainedTokenizerFast"]
        else:
            sources[encoder] = {**entry.source, "class": entry.class_name}
    return {
        "_class_name": list(PIPELINE),
        "_diffusers_version": DIFFUSERS_VERSION,
        "transformer": list(TRANSFORMER),
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", scheduler_class],
        **components,
        "text_encoder_sources": sources,
        "lidit": {
            "format_version": FORMAT_VERSION,
            "encoders": [entry.facts() for entry in encoders],
            **facts,
        },
    }


def is_exported_folder(folder: epath.Path) -> bool:
    """Returns True if the folder has the model_index.json of an export, also one that diffusers saved again."""
    try:
        return isinstance(read_json_object(folder / INDEX_FILE).get("lidit"), dict)
    except UserError:
        return False


def read_folder(folder: str | epath.Path) -> ConfigDict:
    """Returns a config for `Experiment` that describes an exported model, with paths into the folder.

    The config does not name LI-DiT's own weights, which are in `transformer/`. Its data section is a placeholder that
    only states the training resolution.

    Args:
      folder: exported folder, on a disk or in a bucket.

    Raises:
      UserError: a component or its config is missing, damaged, or of a newer format.
    """
    folder = epath.Path(folder)
    file = folder / INDEX_FILE
    if not is_there(file):
        raise UserError(f"{folder}: the folder has no {INDEX_FILE}: use one that python -m lidit_jax.export wrote")
    index = read_json_object(file)
    facts = _facts(index, file)
    schedule, sampler = _schedule(folder)
    # Raises now, not later, if it is missing or damaged.
    read_config(folder / "vae")
    config = UNUSED_SECTIONS | {
        "data": {"source": "shapes", "resolution": _integer(facts, "resolution", file, MAX_SIDE)},
        "text": _text(facts, file),
        "encoders": _encoders(folder, index, facts, file),
        "vae": {"weights": str(folder / "vae"), "dtype": _string(facts, "vae_dtype", file)},
        "model": _object(facts, "model", file) | read_lidit_config(folder / "transformer"),
        "diffusion": _diffusion(schedule, facts, file),
        "sample": _object(facts, "sample", file) | {"sampler": sampler},
    }
    return ConfigDict(config)


def _facts(index: Mapping[str, Any], file: epath.Path) -> dict[str, Any]:
    facts = index.get("lidit")
    if not isinstance(facts, dict):
        raise UserError(f"{file}: it has no lidit object: use a folder that python -m lidit_jax.export wrote")
    check_format_version(facts.get("format_version"), FORMAT_VERSION, f"{file}: lidit.format_version")
    return facts


def _schedule(folder: epath.Path) -> tuple[Schedule, str]:
    file = folder / "scheduler" / diffusers_scheduler.CONFIG_FILE
    return diffusers_scheduler.read_scheduler(read_json_object(file), file)


def _diffusion(schedule: Schedule, facts: Mapping[str, Any], file: epath.Path) -> dict[str, Any]:
    """Returns the `diffusion` section of the config, as `make_schedule` takes it."""
    values = dataclasses.asdict(schedule)
    if not isinstance(schedule, RectifiedFlow):
        return {"name": "ddpm", **values}
    trained = _object(facts, "diffusion", file)
    for key in TRAINING_ONLY:
        if type(trained.get(key, 0.0)) not in (int, float) or not abs(trained.get(key, 0.0)) < MAX_TIMES:
            raise UserError(f"{file}: lidit.diffusion.{key}={trained[key]!r:.80} is not a number")
    return {"name": "rectified_flow", **values, **{key: trained[key] for key in TRAINING_ONLY if key in trained}}


def _text(facts: Mapping[str, Any], file: epath.Path) -> dict[str, Any]:
    text = _object(facts, "text", file)
    _integer(text, "max_length", file, MAX_TOKENS)
    return text


def _encoders(folder: epath.Path, index: Mapping[str, Any], facts: Mapping[str, Any], file: epath.Path) -> dict:
    """Returns the `encoders` section of the config."""
    entries = facts.get("encoders")
    if not isinstance(entries, list) or not 1 <= len(entries) <= MAX_ENCODERS:
        raise UserError(f"{file}: lidit.encoders is not a list of 1 to {MAX_ENCODERS} encoders")
    encoders = {}
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise UserError(f"{file}: lidit.encoders[{i}] is not an object")
        name = _string(entry, "name", file)
        if not re.fullmatch(r"[A-Za-z0-9][\w-]{0,99}", name):
            raise UserError(f"{file}: {name!r:.80} is not a valid encoder name")
        encoders[name] = {
            "weights": _weights(folder, index, component_names(i)[0], file),
            "dtype": _string(entry, "dtype", file),
        }
    if list(encoders) != sorted(encoders) or len(encoders) != len(entries):
        # Configs list their encoders in alphabetical order, which is the order of the model's branches.
        raise UserError(f"{file}: lidit.encoders are not sorted by name: {', '.join(encoders)}")
    return encoders


def _weights(folder: epath.Path, index: Mapping[str, Any], component: str, file: epath.Path) -> str:
    """Returns the location of an encoder: its subfolder, or its entry in text_encoder_sources."""
    if (folder / component).exists():
        read_config(folder / component)
        return str(folder / component)
    sources = index.get("text_encoder_sources")
    source = sources.get(component) if isinstance(sources, dict) else None
    if source is None:
        raise UserError(f"{folder / component} is missing, and {file} gives no source for it; copy the folder again")
    if not isinstance(source, dict):
        raise UserError(f"{file}: text_encoder_sources.{component} is not an object")
    name = _string(source, "name", file)
    revision = source.get("revision")
    return f"{name}@{revision}" if isinstance(revision, str) and HUB_NAME.fullmatch(f"{name}@{revision}") else name


def _object(values: Mapping[str, Any], key: str, file: epath.Path) -> dict[str, Any]:
    """Returns a config section from the facts.

    Raises:
      UserError: it is not an object of identifiers and plain values.
    """
    section = values.get(key)
    if not isinstance(section, dict):
        raise UserError(f"{file}: lidit.{key} is not an object; export the model again")
    for name, value in section.items():
        if not name.isidentifier() or isinstance(value, dict | list):
            raise UserError(f"{file}: lidit.{key}.{name:.80} is not a valid config field")
    return section


def _string(values: Mapping[str, Any], key: str, file: epath.Path) -> str:
    if not isinstance(values.get(key), str) or not values[key]:
        raise UserError(f"{file}: {key}={values.get(key)!r:.80} is not a non-empty string")
    return values[key]


def _integer(values: Mapping[str, Any], key: str, file: epath.Path, most: int) -> int:
    value = values.get(key)
    if type(value) is not int or not 1 <= value <= most:
        raise UserError(f"{file}: {key}={value!r:.80} is not an integer from 1 to {most}")
    return value
