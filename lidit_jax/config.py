"""Builds the library's dataclasses from the values of a config file, with errors that name the config key."""

import dataclasses
import difflib
import inspect
import logging
import os
import re
import runpy
import traceback
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from etils import epath
from ml_collections import ConfigDict

from lidit_jax.errors import UserError, cannot_write
from lidit_jax.files import read_json, write_json

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

logger = logging.getLogger(__name__)

T = TypeVar("T", bound="DataclassInstance")

CONFIG_FILE = "config.json"
DIGESTS_FILE = "digests.json"
# Folders of this project's configs: in an installed package and in a checkout.
_PACKAGE = Path(__file__).resolve().parent
CONFIG_FOLDERS = (_PACKAGE / "configs", _PACKAGE.parent / "configs")
# Fields of any section that name a file or folder.
PATH_FIELDS = ("path", "data_dir", "class_names", "index_dir", "start_from", "weights")
TO_FILL_IN = "TO_FILL_IN"  # value of `start_from` in a config that is meant to start from another run
MAX_NUMBER = 10**30  # largest int accepted for a float field
# Fields of any section that may differ when a run resumes, because none changes what a step computes, except its
# rounding. (`steps` may differ too.)
CHANGEABLE_FIELDS = (
    *("log_every", "checkpoint_every", "sample_every", "keep", "num_threads", "num_workers", "prefetch"),
    *("index_dir", "max_broken", "compile_ahead", "stalled_after", "max_skipped_in_row", "strict_restore"),
    *("tensorboard", "profile", "profile_all_hosts", "remat", "scan_unroll", "attention"),
)
CHANGEABLE_SECTIONS = ("mesh", "vae.evaluate")  # likewise
# Sections whose entries have free names and no fields: a caption may be called as a field is.
_CAPTIONS = re.compile(r"data\.(mixture\.[^.]+\.)?captions\..+")
# Removed keys of earlier versions, as section and name; they never affected results, so they are ignored.
OBSOLETE_KEYS = (("text", "encode"),)


def sibling_config(file: str, name: str, *arguments: str) -> ConfigDict:
    """Loads another config for a config file to modify.

    Args:
      file: the `__file__` of the config file that modifies it.
      name: name of the config, without ".py": a file in the same folder or, if there is none, one of this project's.
      *arguments: for its `get_config`.
    """
    return _run_config_file(sibling_file(file, name), *arguments)


def sibling_file(file: str | Path, name: str) -> Path:
    """Returns the file that `sibling_config` loads."""
    sibling = Path(file).with_name(f"{name}.py")
    return sibling if sibling.exists() else find_config(name)[0]


def load_config(text: str) -> ConfigDict:
    """Loads the config that a command line names; see `find_config`.

    Raises:
      UserError: the file does not exist or fails; or it takes no argument, but there is one.
    """
    file, arguments = find_config(text)
    return _run_config_file(file, *arguments)


def find_config(text: str) -> tuple[Path, tuple[str, ...]]:
    """Finds the config file that a command line names.

    Args:
      text: a file, as in "configs/scenes.py:128", or the name of one of this project's configs, as in "scenes:128",
        each with or without an argument after a colon. "configs/NAME.py" is found from any working directory.

    Returns:
      The file, and the argument if there is one.

    Raises:
      UserError: there is no such file.
    """
    match = re.fullmatch(r"(.+?\.py|[^:]+)(?::(.*))?", text, re.DOTALL)
    name, argument = match.groups() if match else (text, None)
    arguments = () if argument is None else (argument,)
    own = {file.stem: file for folder in CONFIG_FOLDERS for file in sorted(folder.glob("*.py"))}
    file = Path(name).expanduser()
    if file.suffix == ".py" and file.is_file():
        return file, arguments
    is_own = file.parent == Path() and not file.suffix or file.parent == Path("configs") and file.suffix == ".py"
    if is_own and file.stem in own:
        return own[file.stem], arguments
    if is_own:
        raise UserError(f"--config={text}: there is no config {file.stem!r}{nearest(file.stem, own)}")
    found = near(file.stem, own)
    advice = f"did you mean {found!r}?" if found else f"give a .py file, or one of {', '.join(own)}"
    raise UserError(f"--config={text}: no such config file; {advice}")


def _run_config_file(file: Path, *arguments: str) -> ConfigDict:
    try:
        get_config = runpy.run_path(str(file)).get("get_config")
        if get_config is None:
            raise UserError(f"{file} has no function get_config: add one that returns a ConfigDict")
        if len(arguments) > len(inspect.signature(get_config).parameters):
            raise UserError(f"{file} takes no argument: leave out :{':'.join(arguments)}")
        config = get_config(*arguments)
    except UserError:
        raise
    except SyntaxError as error:
        raise UserError(f"{file}, line {error.lineno}: {error.msg}") from error
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        where = f"{file}, line {lines[-1]}" if lines else f"{file}"
        raise UserError(f"{where}: {type(error).__name__}: {error}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"{file}: get_config returns {type(config).__name__}: return a ConfigDict")
    return config


def expand_home(config: ConfigDict) -> None:
    """Expands `~` at the start of every path in a config."""
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            expand_home(value)
        elif key in PATH_FIELDS and isinstance(value, str):
            config[key] = os.path.expanduser(value)


def build(cls: type[T], values: Mapping[str, Any], where: str, **more: Any) -> T:
    """Builds a dataclass from a config section, and the dataclasses of its fields from the sections within.

    Args:
      cls: the dataclass.
      values: the config section.
      where: the section's path in the config, as in "vae.train", for error messages.
      **more: fields that are not in the section.

    Raises:
      UserError: for an unknown key (with the nearest known one), a missing key, a value of the wrong type, or one that
        the dataclass rejects.
    """
    require_section(where, values)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    values = {**_plain(values), **more}
    for key in values:
        if key not in fields:
            raise UserError(f"config key {where}.{key!s:.80} is unknown{nearest(str(key), fields)}")
    for name, value in values.items():
        section = dataclass_of(hints[name])
        if section and isinstance(value, Mapping):
            values[name] = build(section, value, f"{where}.{name}")
        _check_type(f"{where}.{name}", values[name], hints[name])
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise UserError(f"config key {where}.{name} is missing")
    try:
        return cls(**values)
    except UserError as error:
        # A dataclass names its fields by its usual section ("train.steps", "VAE config: in_channels"), not by this one.
        its_section = re.compile(rf"^(?:[\w.]+\.|[\w ]+: )?(?=(?:{'|'.join(fields)})\b)")
        message = str(error)
        if not message.startswith(f"{where}."):  # as that of a source in a mixture does
            message = its_section.sub(f"{where}.", message)
        if where.endswith(".data"):  # a section of its own of a stage
            message = message.replace("--config.data.", f"--config.{where}.")
        raise UserError(message) from error


def require_section(key: str, value: Any) -> None:
    """Raises UserError unless the value of a config key is a section."""
    if not isinstance(value, ConfigDict | Mapping):
        raise UserError(f"config key {key} is {value!r:.80}: it must be of type dict")


def dataclass_of(hint: Any) -> "type[DataclassInstance] | None":
    """Returns the dataclass of an annotation, `X` or `X | None`; None if there is none."""
    return next(
        (option for option in options_of(hint) if isinstance(option, type) and dataclasses.is_dataclass(option)), None
    )


def options_of(hint: Any) -> tuple[Any, ...]:
    """Returns the types of a union, or the only type."""
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def _check_type(key: str, value: Any, hint: Any) -> None:
    """Raises UserError unless the value is of the annotated type; the entries of containers are not checked."""
    kinds = [typing.get_origin(option) or option for option in options_of(hint)]
    if not all(isinstance(kind, type) for kind in kinds):  # Any, Literal: checked where the value is used
        return
    if float in kinds:
        kinds.append(int)
        if isinstance(value, int) and abs(value) > MAX_NUMBER:
            raise UserError(f"config key {key} is {value!r:.40}…: the largest number is {MAX_NUMBER:.0e}")
    is_flag = isinstance(value, bool) and bool not in kinds
    if is_flag or not isinstance(value, tuple(kinds)):
        names = " or ".join(type_name(kind) for kind in dict.fromkeys(kinds))
        raise UserError(f"config key {key} is {value!r:.80}: it must be of type {names}")


def type_name(kind: Any) -> str:
    """Returns the name, as it is written in configs, of a type or of a section's annotations by name."""
    if kind is types.NoneType:
        return "null"
    return "dict" if isinstance(kind, dict) or dataclasses.is_dataclass(kind) else kind.__name__


def near(name: str, choices: Iterable[str]) -> str | None:
    """Returns the choice that a name most likely stands for: its initials, its beginning, or a near spelling of it."""
    name, choices = name.lower().replace("-", "_"), list(choices)
    for choice in choices:
        if name == "".join(word[0] for word in choice.split("_") if word):
            return choice
    for choice in choices:
        if len(name) > 2 and choice.startswith(f"{name}_"):
            return choice
    return next(iter(difflib.get_close_matches(name, choices, n=1)), None)


def nearest(name: str, choices: Iterable[str]) -> str:
    """Returns "; did you mean 'x'?" with the nearest choice or, if none is near, a list of all choices."""
    choices = list(choices)
    found = near(name, choices)
    return f"; did you mean {found!r}?" if found else f"; known are {', '.join(choices)}"


def claim_workdir(
    workdir: epath.Path,
    config: ConfigDict,
    write: bool = True,
    may_grow: bool = True,
    digests: Mapping[str, str] | None = None,
) -> None:
    """Writes the config into a new workdir, or checks that an existing one belongs to the same training.

    What does not change the training may differ: see `CHANGEABLE_FIELDS` and `CHANGEABLE_SECTIONS`; sampling options;
    and paths, if they name the same place or files of the same digest.

    Fields that a config does not state count, and are written, with their defaults.

    Args:
      workdir: folder of the run.
      config: the config of the run.
      write: whether to write; False only checks, for all but one of the processes that share a workdir.
      may_grow: whether the steps of the last trained component, and the `sample` and `evaluate` sections, may differ.
      digests: digests of the files that the config names, by key.

    Raises:
      UserError: if the workdir was made with another config, or can't be written. Nothing is overwritten then.
    """
    from lidit_jax.config_fields import with_defaults  # the sections' modules import this one

    digests = digests or {}
    file, digests_file = workdir / CONFIG_FILE, workdir / DIGESTS_FILE
    stored = with_defaults(read_workdir(workdir)) if file.exists() else None
    # Without a config, the digests are those of a claim that was interrupted.
    digests_before = _read_json(digests_file) if stored is not None and digests_file.exists() else {}
    resolved = with_defaults(config)
    if stored is not None:
        before, now = flatten(stored), flatten(resolved)
        for key in sorted(before.keys() | now.keys()):
            if before.get(key) == now.get(key) or _is_free(key, now, may_grow):
                continue
            if _has_moved(key, before.get(key), now.get(key), digests_before.get(key), digests.get(key)):
                continue
            raise _another_config(workdir, key, before, now)
    if not write:
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if any(digests_before.get(key) != digest for key, digest in digests.items()):
            write_json(digests_file, {**digests, **digests_before})
        # Nothing is written without need: the workdir of a finished run may be read-only.
        if stored is None or flatten(_read_json(file)) != flatten(resolved):
            write_json(file, _plain(resolved))
    except OSError as error:
        raise cannot_write(f"--workdir={workdir}", error) from error


def _is_free(key: str, now: Mapping[str, Any], may_grow: bool) -> bool:
    """Returns True if a key may differ when a run resumes."""
    if key == "model.position_grid" and now.get("model.position") == "conv":  # which doesn't use it
        return True
    # Steps of the last trained component, and sections that are read after training or for the log.
    known = ("train.steps", "vae.train.steps", "llava.tune.train.steps", "llava.align.train.steps")
    last_steps = next((name for name in known if name in now), "")
    if key == last_steps or f"{key}.".startswith(("evaluate.", "sample.")):
        return may_grow
    if any(f"{key}.".startswith(f"{section}.") for section in CHANGEABLE_SECTIONS):
        return True
    return key.rpartition(".")[2] in CHANGEABLE_FIELDS and not _CAPTIONS.fullmatch(key)


def _has_moved(key: str, before: Any, now: Any, digest_before: str | None, digest: str | None) -> bool:
    """Returns True if a key names the same place in another way, or another place with the same files."""
    if key.rpartition(".")[2] not in PATH_FIELDS or not (before and now):
        return False
    if not isinstance(before, str) or not isinstance(now, str):
        return False
    if digest is not None and digest == digest_before:
        return True
    return "://" not in before + now and os.path.abspath(before) == os.path.abspath(now)


def _another_config(workdir: epath.Path, key: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> UserError:
    resume = f"give --config.{key}={before.get(key)} or " if _is_one_word(before.get(key)) and key in now else ""
    # A run may begin with the weights of one with the same model; a VAE alone can't.
    can_start = (not key.startswith("model.") or key == "model.dtype") and "model.depth" in now
    start = f", where --config.start_from={workdir} begins with its weights" if can_start else ""
    return UserError(
        f"{workdir} was created with another config: {key} was {before.get(key, 'absent')!r:.200}, "
        f"now {now.get(key, 'absent')!r:.200}; {resume}use another --workdir{start}"
    )


def _is_one_word(value: Any) -> bool:
    """Returns True if the printed value can be passed on the command line as it is."""
    is_word = isinstance(value, str) and re.fullmatch(r"[\w./:+-]{1,200}", value) is not None
    return is_word or isinstance(value, int | float)


def read_workdir(workdir: epath.Path) -> ConfigDict:
    """Returns the config that a workdir was made with.

    Raises:
      UserError: if it has none, or it is not a JSON object.
    """
    file = epath.Path(workdir) / CONFIG_FILE
    if not file.exists():
        raise UserError(f"{workdir}: no {CONFIG_FILE} there; name the --workdir of a training run")
    values = _read_json(file)
    for section, name in OBSOLETE_KEYS:
        if isinstance(values.get(section), dict):
            values[section].pop(name, None)
    model = values.get("model")
    if isinstance(model, dict) and "position" not in model:
        logger.warning("%s is from before model.position: the model has the positions of that time, 'conv'", file)
        model["position"] = "conv"
    try:
        return ConfigDict(values)
    except (AttributeError, ValueError) as error:  # for keys such as "a.b" and "__class__"
        raise UserError(f"{file}: not a run's file ({error!s:.200}); restore it, or use another --workdir") from error


def _read_json(file: epath.Path) -> dict[str, Any]:
    """Returns the object in a JSON file of a workdir.

    Raises:
      UserError: if it is none.
    """
    try:
        values = read_json(file)
        if not isinstance(values, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not a run's file ({error}); restore it, or use another --workdir") from error
    return values


def _plain(values: Any) -> Any:
    """Converts ConfigDicts to dicts and lists to tuples, so that values equal their own JSON round trip."""
    if isinstance(values, ConfigDict | Mapping):
        return {key: _plain(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return tuple(_plain(value) for value in values)
    return values


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Returns the values of nested sections by their dotted keys, such as "vae.train.steps"."""
    flat: dict[str, Any] = {}
    for key, value in _plain(values).items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
