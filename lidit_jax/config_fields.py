"""The fields of a config: their defaults, and values from the command line, typed by the dataclasses' annotations."""

import ast
import dataclasses
import decimal
import logging
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from lidit_jax.config import MAX_NUMBER, dataclass_of, near, nearest, options_of, type_name
from lidit_jax.data.data_config import DataConfig
from lidit_jax.diffusion.schedules import SCHEDULES
from lidit_jax.errors import UserError
from lidit_jax.evaluate.scenes import SceneEvaluation
from lidit_jax.models.lidit_config import LIDiTConfig
from lidit_jax.models.llava_section import LlavaSectionConfig
from lidit_jax.models.llm import LLMConfig
from lidit_jax.models.t5 import T5Config
from lidit_jax.models.vae_section import VAESectionConfig
from lidit_jax.parallel.mesh import MeshConfig
from lidit_jax.pipeline import SampleConfig
from lidit_jax.text.load_encoder import EncoderConfig
from lidit_jax.text.prompts import TextConfig
from lidit_jax.train_config import TrainConfig

logger = logging.getLogger(__name__)

Hint = Any  # an annotation, or a dict of the annotations by name

# `diffusion` is added by `_sections`: its fields depend on its name.
SECTIONS: dict[str, Hint] = {
    "seed": int,
    "start_from": str,
    "mesh": MeshConfig,
    "data": DataConfig,
    "text": TextConfig,
    "encoders": Mapping[str, EncoderConfig],
    "vae": VAESectionConfig,
    "model": LIDiTConfig,
    "train": TrainConfig,
    "sample": SampleConfig,
    "evaluate": SceneEvaluation,
    "llava": LlavaSectionConfig,
    "language_models": {  # of configs/ablation_scenes.py
        "instruction": str,
        "instructed_share": float,
        "corpus_seed": int,
        "length": int,
        "model": LLMConfig,
        "t5": T5Config,
        "train": TrainConfig,
    },
}
LLAVA_SECTIONS = ("seed", "mesh", "llava")  # all that a config of a multi-modal LLM has
_FLAG_WORDS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_NONE_WORDS = ("none", "null")


def with_defaults(config: Mapping[str, Any] | ConfigDict) -> dict[str, Any]:
    """Returns the sections of a config with the default of every field that they do not state.

    Sections that the config lacks stay absent, and required fields that are missing stay missing. Workdirs of earlier
    versions lack later fields: these must have defaults that do what was done before.
    """
    values = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
    sections = _sections(values)
    filled = {name: _filled(value, sections.get(name)) for name, value in values.items()}
    if schedule := _schedule(values):
        filled["diffusion"] = _defaults(schedule) | filled["diffusion"]
    return {"start_from": ""} | filled


def _filled(value: Any, hint: Hint) -> Any:
    if not isinstance(value, Mapping):
        return value
    entries = _entry_hint(hint)
    if entries is not None:
        # A source of a mixture has the values of the `data` section for the fields that it does not state.
        return {name: entry if entries is DataConfig else _filled(entry, entries) for name, entry in value.items()}
    hints, cls = _field_hints(hint) or {}, dataclass_of(hint)
    filled = _defaults(cls) if cls else {}
    return filled | {name: _filled(entry, hints.get(name)) for name, entry in value.items()}


def _defaults(cls: type) -> dict[str, Any]:
    defaults = {}
    for field in dataclasses.fields(cls):
        if field.default is not dataclasses.MISSING:
            is_section = dataclasses.is_dataclass(field.default)
            defaults[field.name] = dataclasses.asdict(field.default) if is_section else field.default
    return defaults


def apply_overrides(config: ConfigDict, overrides: Mapping[str, str]) -> None:
    """Sets the fields that the command line gives, whether the config states them or not.

    `None` removes an optional section, or an entry of a section whose names are free, as in
    `--config.encoders.qwen=None`; a field of a new entry adds it.

    Args:
      config: the config to modify.
      overrides: text of the value by dotted key, as in {"train.steps": "100"}.

    Raises:
      UserError: a key is unknown (the message names the nearest), or a value is not of the field's type.
    """
    with config.unlocked(), config.ignore_type():
        for key in sorted(overrides, key=lambda key: key != "diffusion.name"):  # on which the others depend
            _apply(config, key, overrides[key])


def _apply(config: ConfigDict, key: str, text: str) -> None:
    *parents, name = _parts(key, _sections(config))
    section, hint = config, _sections(config)
    for depth, parent in enumerate(parents):
        is_free = _entry_hint(hint) is not None
        hint = _hint_of(hint, key, depth, config)
        if section.get(parent) is None:
            if depth == 0 and parent not in OPTIONAL_SECTIONS:
                raise UserError(f"config key {key}: this config has no section {parent!r}{_elsewhere(key, config)}")
            section[parent] = ConfigDict()
            if is_free and parents[0] == "encoders":
                logger.info("added %s to the encoders", parent)
        section = section[parent]
        if not isinstance(section, ConfigDict):
            raise UserError(f"config key {key} is unknown: {'.'.join(parents[: depth + 1])} is not a section")
    is_free = _entry_hint(hint) is not None or not parents and name in OPTIONAL_SECTIONS
    hint = _hint_of(hint, key, len(parents), config)
    if is_free and text.lower() in _NONE_WORDS:
        if name not in section:
            suggestion = nearest(name, section) if parents and section else ""
            raise UserError(f"config key {key}: there is nothing to remove{suggestion}")
        del section[name]
        return
    value = parse_value(key, text, hint)
    try:
        section[name] = value
    except ValueError as error:  # ConfigDict's keys have no dots
        raise UserError(f"config key {key} is {text!r:.80}: write a slash for every dot in a name") from error
    if key == "diffusion.name" and (schedule := _schedule(config)):
        for other in sorted(set(section) - {"name"} - set(_field_hints(schedule) or ())):
            logger.info("left out diffusion.%s, which %s does not have", other, value)
            del section[other]


def _parts(key: str, hint: Hint) -> list[str]:
    """Splits a dotted key. Names of entries that are no sections have no dots: "data.captions.a.b" names "a/b"."""
    parts = key.split(".")
    for depth, part in enumerate(parts):
        entries = _entry_hint(hint)
        if entries is not None and _field_hints(entries) is None and _entry_hint(entries) is None:
            return [*parts[:depth], "/".join(parts[depth:])]
        hint = entries if entries is not None else (_field_hints(hint) or {}).get(part)
    return parts


def parse_value(key: str, text: str, hint: Hint) -> Any:
    """Returns the value that a text on the command line stands for.

    Args:
      key: key of the field, for error messages.
      text: the text.
      hint: the field's annotation.

    Raises:
      UserError: the text is no value of that type.
    """
    options = options_of(hint)
    if types.NoneType in options and text.lower() in _NONE_WORDS:
        return None
    for option in options:
        try:
            return _parse(text, option)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    kinds = (dict if isinstance(option, dict) else typing.get_origin(option) or option for option in options)
    names = " or ".join(dict.fromkeys(map(type_name, kinds)))
    raise UserError(f"config key {key} is {text!r:.80}: it must be of type {names}")


def _parse(text: str, hint: Hint) -> Any:
    """Parses a text as one type; raises an exception of `ast.literal_eval` if it is none."""
    if hint is str:
        return text
    if hint is bool:
        if text.lower() not in _FLAG_WORDS:
            raise ValueError
        return _FLAG_WORDS[text.lower()]
    if hint is int:
        return _parse_int(text)
    if hint is float:
        return float(text)
    kind = typing.get_origin(hint) or hint
    value = _literal(text) if hint is Any else ast.literal_eval(text)
    if kind in (tuple, Sequence):
        item = typing.get_args(hint)[0]
        return tuple(_parse(str(entry), item) for entry in (value if isinstance(value, tuple | list) else (value,)))
    if (_field_hints(hint) is not None or _entry_hint(hint) is not None) and not isinstance(value, dict):
        raise ValueError
    return value


def _parse_int(text: str) -> int:
    """Parses a whole number, which may be written with an exponent, as in 1e6."""
    try:
        return int(text)
    except ValueError:
        if "e" not in text.lower():
            raise
    try:
        number = decimal.Decimal(text)
        if -MAX_NUMBER <= number <= MAX_NUMBER and number == number.to_integral_value():
            return int(number)
    except ArithmeticError:  # of words, and of exponents that decimals don't have
        pass
    raise ValueError(f"{text:.80} is not a whole number")


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


# --- what a section may hold ---------------------------------------------------------------------------------------

# Sections that the command line may add; others decide which networks a config has.
OPTIONAL_SECTIONS = ("evaluate", "mesh", "start_from")


def _sections(config: Mapping[str, Any] | ConfigDict) -> dict[str, Hint]:
    schedule = _schedule(config)
    return SECTIONS | {"diffusion": {"name": str} | (_field_hints(schedule) if schedule else {})}


def _schedule(config: Mapping[str, Any] | ConfigDict) -> type | None:
    diffusion = config.get("diffusion")
    name = diffusion.get("name") if isinstance(diffusion, Mapping | ConfigDict) else None
    return SCHEDULES.get(name) if isinstance(name, str) else None


def _field_hints(hint: Hint) -> dict[str, Hint] | None:
    """Returns the annotations of a section's fields by name; None if their names are free, or it is no section."""
    if isinstance(hint, dict):
        return hint
    cls = dataclass_of(hint)
    if cls is None:
        return None
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _entry_hint(hint: Hint) -> Hint | None:
    """Returns the annotation of the entries of a section with free names, such as `encoders`; None for any other."""
    for option in options_of(hint):
        if typing.get_origin(option) is Mapping:
            return typing.get_args(option)[1]
    return None


def _hint_of(hint: Hint, key: str, depth: int, config: ConfigDict) -> Hint:
    """Returns the annotation of part number `depth` of a key, given that of the section it is in."""
    parts = key.split(".")
    entries = _entry_hint(hint)
    if entries is not None:
        return entries
    fields = _field_hints(hint)
    name, where = parts[depth], ".".join(parts[:depth])
    if fields is None:
        raise UserError(f"config key {key} is unknown: {where} is not a section")
    if name in fields:
        return fields[name]
    known = fields if depth else {section: hint for section, hint in fields.items() if section in config} or fields
    found = near(name, known)
    suggestion = nearest(name, known) if found else _elsewhere(key, config) or nearest(name, known)
    raise UserError(f"config key {'.'.join(parts[: depth + 1])} is unknown{suggestion}")


def find_fields(name: str, config: ConfigDict) -> list[str]:
    """Returns the dotted keys of the fields with this name or these initials in any section, the likeliest first."""
    keys = list(_known_keys(config))
    names = {key.split(".")[-1] for key in keys}
    found = name if name in names else near(name, names)
    matches = (key for key in keys if key.split(".")[-1] == found)
    return sorted(matches, key=lambda key: (key.count("."), not key.startswith("train."), key))


def _elsewhere(key: str, config: ConfigDict) -> str:
    """Returns a suggestion of fields in other sections for an unknown key, or ""."""
    name = key.split(".")[-1]
    found = find_fields(name, config)
    # A key of an existing section that is spelt nearly like one of another is more often something else.
    if "." in key and len(name) > 3:
        found = [field for field in found if field.endswith(f".{name}")]
    return f"; did you mean {' or '.join(map(repr, found[:2]))}?" if found else ""


def _known_keys(config: ConfigDict) -> Iterator[str]:
    """Yields the dotted keys of all fields of the sections that a config has."""
    for section, hint in _sections(config).items():
        if section in config:
            yield from _keys_below(section, hint, config[section])


def _keys_below(prefix: str, hint: Hint, value: Any) -> Iterator[str]:
    entries, fields = _entry_hint(hint), _field_hints(hint)
    if entries is not None:
        for name in value or ():
            yield from _keys_below(f"{prefix}.{name}", entries, value[name])
    elif fields is not None and isinstance(value, ConfigDict):
        for name, field in fields.items():
            yield from _keys_below(f"{prefix}.{name}", field, value.get(name))
    else:
        yield prefix
