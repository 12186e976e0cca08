"""The prompts of the positional-bias benchmark (paper, appendix A.3): up to eight adjective-noun pairs each.

The paper's own prompts were never released. These are made of what T2I-CompBench's validation lists say of one colour,
shape or texture ("a red car", "an oval mirror", "rubber gloves"):

- 1,000 prompts; the first has one pair, the next two and so on to eight, then one again: 125 prompts of each number,
  and 4,500 pairs.
- A pair's kind (colour, shape, texture) is drawn evenly, then a pair of that kind; no noun comes twice in a prompt.
- All from seed 2406: the same lists make the same prompts, whatever draws them.
"""

import json
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from lidit_jax.errors import UserError
from lidit_jax.evaluation.attributes import ATTRIBUTES, KINDS
from lidit_jax.evaluation.noun_phrases import split_noun_phrases
from lidit_jax.json_file import write_json
from lidit_jax.pictures import save_png

NUM_PROMPTS, MAX_PAIRS, SEED = 1000, 8, 2406
METADATA_FILE, SAMPLES = "metadata.jsonl", "samples"


class PositionalBias:
    """A folder a prompt, with its pairs and its pictures: 00000/metadata.jsonl, 00000/samples/0000.png.

    Attributes:
      prompts: 1,000.
    """

    def __init__(self, lists: Mapping[str, Sequence[str]]):
        """Args: lists: color, shape and texture, T2I-CompBench's prompts each.

        Raises:
          UserError: a list has too few pairs to fill a prompt.
        """
        pairs = {kind: find_pairs(kind, prompts) for kind, prompts in lists.items()}
        for kind, found in pairs.items():
            if len({noun for _, noun in found}) < MAX_PAIRS:
                raise UserError(f"{kind}_val.txt has only {len(found)} adjective-noun pairs: is it T2I-CompBench's?")
        self._pairs = draw_pairs(pairs)
        self.prompts = [join_phrases([pair["phrase"] for pair in of_prompt]) for of_prompt in self._pairs]

    def last_file(self, index: int) -> str:
        return f"{index:05}/{METADATA_FILE}"

    def write(self, out: epath.Path, index: int, pictures: Sequence[np.ndarray]) -> None:
        for i, picture in enumerate(pictures):
            save_png(picture, out / f"{index:05}" / SAMPLES / f"{i:04}.png")
        entry = {"prompt": self.prompts[index], "pairs": self._pairs[index]}
        write_json(out / self.last_file(index), entry, indent=None)


def find_pairs(kind: str, prompts: Sequence[str]) -> list[tuple[str, str]]:
    """(phrase, noun) of all "a ADJECTIVE NOUN" whose one adjective is of this kind, each once, in order.

    Only prompts of two such are looked at, "a red car and a blue cup", not sentences.

    Args: kind: color, shape or texture.
    """
    found = {}
    for prompt in prompts:
        phrases = split_noun_phrases(prompt)
        if len(phrases) != 2 or " and ".join(phrases) != prompt.strip(" ."):
            continue
        for phrase in phrases:
            adjective, _, noun = re.sub(r"^an? ", "", phrase).partition(" ")
            if noun and adjective in KINDS[kind] and not ATTRIBUTES & set(noun.split()):
                found[phrase] = noun
    return list(found.items())


def draw_pairs(pairs: Mapping[str, Sequence[tuple[str, str]]]) -> list[list[dict[str, str]]]:
    """Each prompt's pairs: {"phrase": "a red car", "kind": "color"}.

    Args: pairs: kind -> (phrase, noun); of each at least eight nouns.
    """
    # Only `random.random` is promised to give the same numbers in all versions of Python.
    generator = random.Random(SEED)

    def choose(items: Sequence[Any]) -> Any:
        return items[int(generator.random() * len(items))]

    kinds, drawn = sorted(pairs), []
    for index in range(NUM_PROMPTS):
        nouns: set[str] = set()
        of_prompt: list[dict[str, str]] = []
        while len(of_prompt) <= index % MAX_PAIRS:
            kind = choose(kinds)
            phrase, noun = choose(pairs[kind])
            if noun not in nouns:
                nouns.add(noun)
                of_prompt.append({"phrase": phrase, "kind": kind})
        drawn.append(of_prompt)
    return drawn


def join_phrases(phrases: Sequence[str]) -> str:
    """ "a, b and c"."""
    return " and ".join(filter(None, (", ".join(phrases[:-1]), phrases[-1])))


def read_pairs(file: epath.Path) -> list[dict[str, str]]:
    """What `PositionalBias.write` wrote of a prompt's pairs.

    Raises:
      UserError: the file is something else.
    """
    try:
        pairs = json.loads(file.read_text())["pairs"]
        pairs = [{"phrase": str(pair["phrase"]), "kind": str(pair["kind"])} for pair in pairs]
    except (ValueError, KeyError, TypeError, RecursionError):
        pairs = []
    if not 1 <= len(pairs) <= MAX_PAIRS:
        raise UserError(f"{file} has no pairs of the positional-bias benchmark: is it damaged, or another benchmark's?")
    return pairs
