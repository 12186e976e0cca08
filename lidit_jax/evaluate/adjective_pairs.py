"""Prompts of the positional-bias benchmark (paper, appendix A.3): adjective-noun pairs, one after the other.

The paper's 1,000 prompts were never released; it prints six, "A green bench, a red car, a blue bowl, and a pink
apple." among them. Each has four pairs of one kind (colours, textures, or shapes and sizes), so the pairs are the
four bins of Figure 3. Ten of the samples' twelve halves are prompts of T2I-CompBench's lists, "a green bench and a
red car", word for word. So here a prompt is two different prompts of one list, joined in the printed form. Ours:

- T2I-CompBench's validation lists are used (the printed halves are from the start of the full ones).
- Kinds take turns, so each has a third of the prompts; no noun comes twice in a prompt.
- All is drawn from seed 2406: the same lists give the same prompts, whatever generates the images.

An option, also ours, mixes the kinds and makes prompts of one to eight pairs; the paper says "up to 8 nouns or
attributes", which we read as the eight words of four pairs. And a file of prompts in this form can be used.
"""

import itertools
import json
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from lidit_jax.errors import UserError
from lidit_jax.evaluate.attributes import ATTRIBUTES, KINDS
from lidit_jax.evaluate.noun_phrases import split_noun_phrases
from lidit_jax.files import write_json
from lidit_jax.pictures import save_png

NUM_PROMPTS, SEED = 1000, 2406
MAX_PAIRS = 8  # of a prompt of mixed kinds
METADATA_FILE, SAMPLES = "metadata.jsonl", "samples"
_KIND_OF = {adjective: kind for kind, adjectives in KINDS.items() for adjective in adjectives}


class Pair(NamedTuple):
    """An adjective and its noun.

    Attributes:
      phrase: "a red car", "leather gloves".
      kind: of the adjective: color, shape (sizes included) or texture.
    """

    phrase: str
    kind: str

    @property
    def noun(self) -> str:
        return re.sub(r"^an? ", "", self.phrase).partition(" ")[2]


class PositionalBias:
    """One folder per prompt with its pairs and its images: 00000/metadata.jsonl, 00000/samples/0000.png.

    Attributes:
      prompts: in the benchmark's order.
    """

    def __init__(self, prompts: Sequence[str], pairs: Sequence[Sequence[Pair]]):
        """Args: pairs: of each prompt, in its order."""
        self.prompts, self._pairs = list(prompts), [list(of_prompt) for of_prompt in pairs]

    @classmethod
    def from_lists(cls, lists: Mapping[str, Sequence[str]], mixed: bool = False) -> "PositionalBias":
        """Makes 1,000 prompts of T2I-CompBench's.

        Args:
          lists: kind -> its prompts.
          mixed: one to eight pairs of mixed kinds per prompt, instead of four of one kind.

        Raises:
          UserError: a list has too few pairs to fill a prompt.
        """
        found = {kind: find_prompts(kind, prompts) for kind, prompts in lists.items()}
        for kind, of_kind in found.items():
            if len({pair.noun for pairs in of_kind for pair in pairs}) < MAX_PAIRS or not _join(of_kind):
                raise UserError(
                    f"{kind}_val.txt has only {2 * len(of_kind)} adjective-noun pairs that can be used: is it "
                    "T2I-CompBench's?"
                )
        pairs = mix_pairs(found) if mixed else join_prompts(found)
        return cls([join_phrases([pair.phrase for pair in of_prompt]) for of_prompt in pairs], pairs)

    def last_file(self, index: int) -> str:
        return f"{index:05}/{METADATA_FILE}"

    def write(self, out: epath.Path, index: int, pictures: Sequence[np.ndarray]) -> None:
        for i, picture in enumerate(pictures):
            save_png(picture, out / f"{index:05}" / SAMPLES / f"{i:04}.png")
        pairs = [pair._asdict() for pair in self._pairs[index]]
        write_json(out / self.last_file(index), {"prompt": self.prompts[index], "pairs": pairs}, indent=None)


def join_phrases(phrases: Sequence[str]) -> str:
    """Joins phrases to a sentence: "A green bench, a red car, a blue bowl, and a pink apple."."""
    *before, last = phrases
    comma = "," if len(before) > 1 else ""
    sentence = f"{', '.join(before)}{comma} and {last}" if before else last
    return f"{sentence[0].upper()}{sentence[1:]}."


def parse_prompt(prompt: str) -> list[Pair]:
    """Splits a sentence that `join_phrases` could have made into its pairs.

    Raises:
      ValueError: a phrase is not an adjective that T2I-CompBench has and a noun, or there are more than eight.
    """
    phrases = re.split(r",? and |, ", prompt.strip().removesuffix("."))
    phrases[0] = phrases[0][:1].lower() + phrases[0][1:]
    pairs = [parse_phrase(phrase) for phrase in phrases]
    for phrase, pair in zip(phrases, pairs, strict=True):
        if pair is None:
            raise ValueError(f"{phrase!r:.80} is not one adjective of T2I-CompBench and a noun")
    if len(pairs) > MAX_PAIRS:
        raise ValueError(f"it has {len(pairs)} pairs, more than {MAX_PAIRS}")
    return pairs


def parse_phrase(phrase: str) -> Pair | None:
    """Reads "a red car" or "leather gloves"; None for anything but one adjective and a noun.

    A wrong article is corrected ("an big bathtub" is in T2I-CompBench); a missing one stays missing, as in the paper.
    """
    found = re.fullmatch(r"(?:(an?) )?(\S+) (\S.*)", phrase.strip())
    if found is None:
        return None
    article, adjective, noun = found.groups()
    if adjective not in ATTRIBUTES or ATTRIBUTES & set(noun.split()):
        return None
    words = ("an" if adjective[0] in "aeiou" else "a", adjective, noun) if article else (adjective, noun)
    return Pair(" ".join(words), _KIND_OF[adjective])


def find_prompts(kind: str, prompts: Sequence[str]) -> list[tuple[Pair, Pair]]:
    """Returns the prompts of the form "a red car and a blue cup" with two pairs of this kind, each once, in order.

    Sentences are left out.
    """
    found = {}
    for prompt in prompts:
        phrases = split_noun_phrases(prompt)
        if len(phrases) != 2 or " and ".join(phrases) != prompt.strip(" ."):
            continue
        pairs = tuple(parse_phrase(phrase) for phrase in phrases)
        if all(pair is not None and pair.kind == kind for pair in pairs):
            found[pairs] = None
    return list(found)


def join_prompts(found: Mapping[str, Sequence[tuple[Pair, Pair]]]) -> list[list[Pair]]:
    """Joins two prompts of one kind to each of the benchmark's: four pairs of four nouns.

    No prompt comes twice, unless the lists are too short for that.

    Args: found: kind -> its prompts, see `find_prompts`; some two of a kind have four nouns.
    """
    generator, joined = random.Random(SEED), {}
    for kind in sorted(found):
        joined[kind] = sorted(_join(found[kind]), key=lambda _: generator.random())
    turns = itertools.islice(itertools.cycle(joined.values()), NUM_PROMPTS)
    return [of_kind[index // len(joined) % len(of_kind)] for index, of_kind in enumerate(turns)]


def _join(prompts: Sequence[tuple[Pair, Pair]]) -> list[list[Pair]]:
    """Returns all ways to join two different prompts that together have four nouns."""
    nouns = [(pairs, {pair.noun for pair in pairs}) for pairs in prompts]
    ways = itertools.permutations([entry for entry in nouns if len(entry[1]) == 2], 2)
    return [[*one, *other] for (one, of_one), (other, of_other) in ways if not of_one & of_other]


def mix_pairs(found: Mapping[str, Sequence[tuple[Pair, Pair]]]) -> list[list[Pair]]:
    """Draws one to eight pairs of mixed kinds for each of the benchmark's prompts (ours).

    The first prompt has one pair, the next two and so on to eight, then one again: 125 prompts of each number. Each
    pair's kind is drawn evenly, then a pair of that kind; no noun comes twice in a prompt.

    Args: found: kind -> its prompts, see `find_prompts`.
    """
    pairs = {kind: list(dict.fromkeys(itertools.chain(*of_kind))) for kind, of_kind in found.items()}
    kinds, mixed, generator = sorted(found), [], random.Random(SEED)

    def choose(items: Sequence[Any]) -> Any:
        # Only `random.random` is promised to give the same numbers in all versions of Python.
        return items[int(generator.random() * len(items))]

    for index in range(NUM_PROMPTS):
        of_prompt: dict[str, Pair] = {}
        while len(of_prompt) <= index % MAX_PAIRS:
            pair = choose(pairs[choose(kinds)])
            of_prompt.setdefault(pair.noun, pair)
        mixed.append(list(of_prompt.values()))
    return mixed


def read_pairs(file: epath.Path) -> list[Pair]:
    """Reads the pairs of a prompt from what `PositionalBias.write` wrote.

    Raises:
      UserError: the file is something else.
    """
    try:
        pairs = json.loads(file.read_text())["pairs"]
        pairs = [Pair(str(pair["phrase"]), str(pair["kind"])) for pair in pairs]
    except (ValueError, KeyError, TypeError, RecursionError):
        pairs = []
    if not 1 <= len(pairs) <= MAX_PAIRS:
        raise UserError(f"{file} has no pairs of the positional-bias benchmark: is it damaged, or another benchmark's?")
    return pairs
