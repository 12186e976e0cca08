"""Tries a tokenizer and its chat template in a process of its own, with limits on time and memory.

A tokenizer is as much a program as a file: a few kilobytes can hold a normaliser that turns a letter into gigabytes, a
regular expression that takes years, or a chat template that never ends. The texts tried here are as long as prompts can
be, so a tokenizer that stays within the limits here also does so in use.
"""

import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from etils import epath
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lidit_jax.errors import UserError
from lidit_jax.text.prompts import INSTRUCTION, MAX_CHARACTERS, PromptTokenizer
from lidit_jax.weights.safetensors_folder import read_json_object

CPU_SECONDS = 15  # a tokenizer with 260,000 tokens, as many as the largest published ones have, takes 3
MEMORY = 2 << 30  # bytes beyond those of the imports
WALL_SECONDS = 600  # of a process that waits for the processor
OUT_OF_MEMORY, TIMED_OUT, GROWS = 3, 4, 5  # exit codes
# Exit codes of a process that the system ended because it ran too long; Windows has no such signals.
_TOO_LONG = (TIMED_OUT, *(-getattr(signal, name) for name in ("SIGXCPU", "SIGKILL") if hasattr(signal, name)))
# Bound on the characters that a normaliser makes of one by its replacements; those of published tokenizers are at most
# 16. A trial cannot tell: a replacement may wait for a word that is in no text tried.
MAX_GROWTH = 1000
# Some damage of a file shows only in use.
PROBE_TEXTS = ("", " a b", "红色", "😀", "\x00", "\u0f00 xyz")
_MIXED = (
    "A red circle, 3 blue squares (above it): the sign says «Grüße!» 一只红色的猫 😀\n\t--- x=1.5e-7; aaaaaaaaaaaaaaaa "
)
EVERY_CHARACTER = "".join(map(chr, (*range(0xD800), *range(0xE000, 0x10000))))  # of Unicode's first plane
LONG_TEXTS = (
    (_MIXED * (MAX_CHARACTERS // len(_MIXED) + 1))[:MAX_CHARACTERS],
    EVERY_CHARACTER,
    *(c * 5000 for c in "a \n0!红"),
)

_passed: set[str] = set()  # digests of the files of tokenizers that this process has tried


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Reads a tokenizer and uses it, without limits.

    Raises:
      Exception: of many types, or a BaseException of the tokenizers library, if a file is damaged.
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder))
    tokenizer(list(PROBE_TEXTS), split_special_tokens=True, verbose=False)
    if not tokenizer.chat_template:
        tokenizer.chat_template = _chat_template_file(epath.Path(folder)) or None
    return tokenizer


def _chat_template_file(folder: epath.Path) -> str:
    """Returns the chat template from chat_template.json, where older multi-modal models keep it, or ""."""
    file = folder / "chat_template.json"
    template = read_json_object(file).get("chat_template") if file.exists() else None
    return template if isinstance(template, str) else ""


def try_tokenizer(folder: Path, files: re.Pattern) -> None:
    """Tries the tokenizer of a local folder, once for the same files.

    Args:
      folder: folder of the tokenizer.
      files: matches the names of the files that a tokenizer is loaded from.

    Raises:
      UserError: if it takes more time or memory than the limits, or a file can't be opened. Other errors are left to
        those who read it.
    """
    digest = hashlib.sha256()
    for file in sorted(file for file in folder.iterdir() if files.fullmatch(file.name)):
        try:
            digest.update(f"{file.name} {file.stat().st_size} ".encode())
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        except OSError as error:  # a folder of this name, or a link to nothing
            raise UserError(f"{file} can't be read ({error.strerror}): copy it again, or remove it") from error
    if digest.hexdigest() in _passed:
        return
    # The packages are found as here, whatever the working directory.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    environment["TOKENIZERS_PARALLELISM"] = "false"  # threads take address space
    command = [sys.executable, "-P", "-m", __name__, str(folder.resolve()), str(CPU_SECONDS), str(MEMORY)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=WALL_SECONDS)
        code, output = done.returncode, done.stderr.strip()
    except subprocess.TimeoutExpired:
        code, output = TIMED_OUT, ""
    if code in (OUT_OF_MEMORY, -signal.SIGABRT):
        reason = f"take more than {MEMORY >> 20} MiB of memory"
    elif code in _TOO_LONG:
        reason = f"take more than {CPU_SECONDS} seconds"
    elif code == GROWS:
        reason = f"replace a character by more than {MAX_GROWTH}"
    else:
        reason = f"end the process that uses them with exit code {code} {output.splitlines()[-1:]}"
    if code:
        raise UserError(f"{folder}: the tokenizer and its chat template {reason}: use other ones")
    _passed.add(digest.hexdigest())


def _growth(normalizer: Any) -> float:
    """Returns a bound on the characters that the replacements of a normaliser, as in tokenizer.json, make of one."""
    if not isinstance(normalizer, dict):
        return 1.0
    inner = math.prod(map(_growth, normalizer.get("normalizers", ())))
    # A pattern may match the empty text before a character.
    return inner * (1.0 + len(normalizer.get("content", "")) + len(normalizer.get("prepend", "")))


def _main(folder: Path, cpu_seconds: int, memory: int) -> int:
    """Limits this process, and tries the tokenizer; returns the exit code."""
    _limit(cpu_seconds, memory)
    try:
        tokenizer = read_tokenizer(folder)
        if _growth(json.loads(tokenizer.backend_tokenizer.to_str())["normalizer"]) > MAX_GROWTH:
            return GROWS
        tokenizer(list(LONG_TEXTS), split_special_tokens=True, verbose=False)
        for system_prompt in ("", INSTRUCTION):
            PromptTokenizer(tokenizer, 8, INSTRUCTION * 6, system_prompt).prefix()
    except MemoryError:
        return OUT_OF_MEMORY
    except BaseException as error:  # reported when the tokenizer is read in earnest
        return OUT_OF_MEMORY if "memory" in str(error).lower() else 0
    return 0


def _limit(cpu_seconds: int, memory: int) -> None:
    """Limits this process, on Windows not at all: the parent's `WALL_SECONDS` then are the only limit."""
    try:
        import resource
    except ImportError:
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if sys.platform == "linux" else 0
    if pages:  # other systems don't limit the address space
        limit = pages * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    limit = int(sum(resource.getrusage(resource.RUSAGE_SELF)[:2])) + cpu_seconds
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    sys.exit(_main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
