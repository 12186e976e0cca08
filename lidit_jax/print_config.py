"""Formats the complete config of a run, with the source of each value."""

import ast
import dataclasses
import io
import tokenize
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from lidit_jax.config import flatten, sibling_file
from lidit_jax.config_fields import with_defaults
from lidit_jax.experiment import Experiment
from lidit_jax.llava_run import fill_in_paths, llava_section
from lidit_jax.text.load_encoder import EncoderConfig

COMMAND_LINE, PAPER, LLAVA, OURS, DEFAULT = "command line", "paper", "LLaVA", "ours", "default"


def format_config(config: ConfigDict, file: Path, overrides: Collection[str]) -> str:
    """Returns one line per field: its key, its value and its source.

    The source is "command line", "paper" or "LLaVA" (the config file marks the value so), "ours" (any other value of
    the config file) or "default" (the config file does not state the field).

    Args:
      config: the config, with the overrides applied.
      file: the config file.
      overrides: keys given on the command line.

    Raises:
      UserError: if the config is invalid.
    """
    stated, marked = flatten(config), {mark: marked_keys(file, mark) for mark in (PAPER, LLAVA)}
    rows = []
    for key, value in flatten(_resolve(config)).items():
        if any(key == override or key.startswith(f"{override}.") for override in overrides):
            source = COMMAND_LINE
        else:
            marks = [mark for mark, keys in marked.items() if key in keys or _is_within(key, keys)]
            source = marks[0] if marks else OURS if key in stated else DEFAULT
        rows.append((key, repr(value), source))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    widths[1] = min(widths[1], 60)
    return "\n".join(f"{key:{widths[0]}}  {value:{widths[1]}}  {source}" for key, value, source in rows)


def _resolve(config: ConfigDict) -> dict[str, Any]:
    """Returns the config with the defaults of its sections filled in."""
    checked = config.copy_and_resolve_references()
    if "llava" in config:
        fill_in_paths(checked)
        llava_section(checked)
        return with_defaults(config)
    with checked.unlocked():
        checked.data.path = checked.data.get("path") or "unused"  # may not be filled in yet
    run = Experiment(checked, epath.Path("unused"), only_shapes=True)
    sections = {"data": run.data, "vae": run.vae}
    if run.has_lidit:
        sections |= {"text": run.text, "model": run.model.config, "train": run.train, "sample": run.sample}
        sections |= {"encoders": run.encoders}
    resolved = with_defaults(config)
    for name in resolved:
        if name in sections:
            resolved[name] = _as_dict(sections[name])
    if "path" in resolved["data"]:
        resolved["data"]["path"] = config.data.get("path", "")
    return resolved


def _as_dict(section: Any) -> Any:
    if isinstance(section, dict):
        return {name: _as_dict(value) for name, value in section.items()}
    if isinstance(section, EncoderConfig) and section.model:
        section = dataclasses.replace(section, model=section.language_model)
    return dataclasses.asdict(section)


def _is_within(key: str, sections: Collection[str]) -> bool:
    return any(key.startswith(f"{section}.") for section in sections)


def marked_keys(file: Path, mark: str = PAPER) -> set[str]:
    """Returns the keys whose values a config file, or the sibling config that it modifies, marks as another's.

    The mark is a comment that begins with the word, at the end of the value's line or on the line above it. The key of
    a section that is stated by name, as in `"model": LLAMA3_8B`, stands for all of its fields.

    Args:
      file: the config file.
      mark: "paper" or "LLaVA".
    """
    source = Path(file).read_text()
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    lines = source.splitlines()
    keys: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "sibling_config"
        if is_call and len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
            keys |= marked_keys(sibling_file(file, node.args[1].value), mark)
    for key, line in _stated_keys(ast.parse(source)):
        above = comments.get(line - 1, "") if lines[line - 2].lstrip().startswith("#") else ""
        is_marked = any(comment.startswith(mark) for comment in (comments.get(line, ""), above))
        keys = keys | {key} if is_marked else keys - {key}
    return keys


def _stated_keys(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Yields the key and line of each value that `get_config` assigns to `config` literally, in order."""
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "get_config"]
    for node in functions[0].body if functions else ():  # a file may import its get_config
        if isinstance(node, ast.Assign):
            yield from _keys_of(_path(node.targets[0]), node.value, node.lineno)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            called = _path(node.value.func)
            if called and called.endswith(".update"):
                for keyword in node.value.keywords:
                    if keyword.arg:
                        path = f"{called.removesuffix('.update')}.{keyword.arg}"
                        yield from _keys_of(path, keyword.value, keyword.lineno)


def _keys_of(path: str | None, value: ast.expr, line: int) -> Iterator[tuple[str, int]]:
    if not path:
        return
    if not isinstance(value, ast.Dict):
        yield path, line
        return
    for key, item in zip(value.keys, value.values, strict=True):
        if isinstance(key, ast.Constant):
            yield from _keys_of(f"{path}.{key.value}", item, key.lineno)


def _path(node: ast.expr) -> str | None:
    """Returns "train.steps" of the expression `config.train.steps`; None for any other."""
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    if not (isinstance(node, ast.Name) and node.id == "config"):
        return None
    return ".".join(reversed(names)) or None
