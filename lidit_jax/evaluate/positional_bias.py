"""Prompts of the positional-bias benchmark (paper, appendix A.3): lists of adjective-noun pairs.

The paper's 1,000 prompts were never released. It prints six, such as "A green bench, a red car, a blue bowl, and a pink
apple." Each has four pairs of one kind (colours, textures, or shapes and sizes), which correspond to the four bins of
Figure 3. Ten of the twelve halves of these samples are prompts of T2I-CompBench's lists word for word, for example "a
green bench and a red car". A prompt is therefore made here of two different prompts of one list, joined in the printed
form. Our choices:

- T2I-CompBench's validation lists are used (the printed halves come from the start of the full lists).
- Kinds alternate, so each has a third of the prompts. No noun occurs twice in a prompt.
- Sampling uses the fixed seed 2406: the same lists give the same prompts, whichever model generates the images.

An option, also ours, mixes kinds and makes prompts of one to eight pairs. The paper says "up to 8 nouns or attributes",
which we read as the eight words of four pairs. Alternatively, a file of prompts in this form can be given.
"""

import itertools
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from lidit_jax.errors import UserError
from lidit_jax.evaluate.attributes import ATTRIBUTES, KINDS
from lidit_jax.evaluate.noun_phrases import split_noun_phrases
from lidit_jax.files import read_json, write_json
from lidit_jax.images import save_png

NUM_PROMPTS, SEED = 1000, 2406
MAX_PAIRS = 8  # most pairs in a prompt of mixed kinds
METADATA_FILE, SAMPLES = "metadata.jsonl", "samples"
_KIND_BY_ADJECTIVE = {adjective: kind for kind, adjectives in KINDS.items() for adjective in adjectives}


class Pair(NamedTuple):
    """An adjective-noun pair.

    Attributes:
      phrase: the words, such as "a red car" or "leather gloves".
      kind: kind of the adjective: "color", "shape" (which includes sizes) or "texture".
    """

    phrase: str
    kind: str

    @property
    def noun(self) -> str:
        """The phrase without its article and adjective."""
        return re.sub(r"^an? ", "", self.phrase).partition(" ")[2]


class PositionalBias:
    """Positional-bias benchmark; a folder per prompt: 00000/metadata.jsonl with its pairs, 00000/samples/0000.png.

    Attributes:
      prompts: prompts in the benchmark's order.
    """

    def __init__(self, prompts: Sequence[str], pairs: Sequence[Sequence[Pair]]):
        """Creates the benchmark.

        Args:
          prompts: the prompts.
          pairs: the pairs of each prompt, in the order of the prompt.
        """
        self.prompts, self._pairs = list(prompts), [list(prompt_pairs) for prompt_pairs in pairs]

    @classmethod
    def from_lists(cls, lists: Mapping[str, Sequence[str]], mixed: bool = False) -> "PositionalBias":
        """Builds 1,000 prompts from T2I-CompBench's lists.

        Args:
          lists: prompts of T2I-CompBench by kind.
          mixed: whether prompts have one to eight pairs of mixed kinds instead of four of one kind.

        Raises:
          UserError: a list has too few pairs to fill a prompt.
        """
        found = {kind: find_prompts(kind, prompts) for kind, prompts in lists.items()}
        for kind, kind_prompts in found.items():
            if len({pair.noun for pairs in kind_prompts for pair in pairs}) < MAX_PAIRS or not _join_two(kind_prompts):
                raise UserError(
                    f"{kind}_val.txt has only {2 * len(kind_prompts)} adjective-noun pairs that can be used, too few "
                    "for a prompt: use T2I-CompBench's file"
                )
        pairs = mix_pairs(found) if mixed else join_prompts(found)
        return cls([join_phrases([pair.phrase for pair in prompt_pairs]) for prompt_pairs in pairs], pairs)

    def last_file(self, index: int) -> str:
        return f"{index:05}/{METADATA_FILE}"

    def write(
        self, out: epath.Path, index: int, images: Sequence[np.ndarray], texts: Sequence[Mapping[str, str]]
    ) -> None:
        for i, (image, text) in enumerate(zip(images, texts, strict=True)):
            save_png(image, out / f"{index:05}" / SAMPLES / f"{i:04}.png", text)
        pairs = [pair._asdict() for pair in self._pairs[index]]
        write_json(out / self.last_file(index), {"prompt": self.prompts[index], "pairs": pairs}, indent=None)


def join_phrases(phrases: Sequence[str]) -> str:
    """Joins phrases to a sentence like "A green bench, a red car, a blue bowl, and a pink apple."."""
    *before, last = phrases
    comma = "," if len(before) > 1 else ""
    sentence = f"{', '.join(before)}{comma} and {last}" if before else last
    return f"{sentence[0].upper()}{sentence[1:]}."


def parse_prompt(prompt: str) -> list[Pair]:
    """Splits a sentence in the form of `join_phrases` into its pairs.

    Raises:
      ValueError: a phrase is not one adjective of T2I-CompBench and a noun, or there are more than eight phrases.
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
    """Parses a phrase such as "a red car" or "leather gloves".

    A wrong article is corrected (T2I-CompBench has "an big bathtub"). A missing article is not added, as in the paper.

    Returns:
      The pair; None if the phrase is not one adjective of T2I-CompBench and a noun.
    """
    found = re.fullmatch(r"(?:(an?) )?(\S+) (\S.*)", phrase.strip())
    if found is None:
        return None
    article, adjective, noun = found.groups()
    if adjective not in ATTRIBUTES or ATTRIBUTES & set(noun.split()):
        return None
    words = ("an" if adjective[0] in "aeiou" else "a", adjective, noun) if article else (adjective, noun)
    return Pair(" ".join(words), _KIND_BY_ADJECTIVE[adjective])


def find_prompts(kind: str, prompts: Sequence[str]) -> list[tuple[Pair, Pair]]:
    """Selects the prompts of the form "a red car and a blue cup" whose two adjectives are of the given kind.

    Prompts of any other form, such as full sentences, are left out.

    Returns:
      The pairs of each prompt in the order of the list, without duplicates.
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
    """Builds each of the benchmark's prompts from two prompts of one kind: four pairs with four different nouns.

    Prompts repeat only if the lists are too short for 1,000 different ones.

    Args:
      found: result of `find_prompts` by kind. Each kind needs two prompts that together have four different nouns.

    Returns:
      The pairs of each prompt.
    """
    generator, joined = random.Random(SEED), {}
    for kind in sorted(found):
        joined[kind] = sorted(_join_two(found[kind]), key=lambda _: generator.random())
    turns = itertools.islice(itertools.cycle(joined.values()), NUM_PROMPTS)
    return [kind_prompts[index // len(joined) % len(kind_prompts)] for index, kind_prompts in enumerate(turns)]


def _join_two(prompts: Sequence[tuple[Pair, Pair]]) -> list[list[Pair]]:
    """Returns all ordered combinations of two prompts that together have four different nouns."""
    nouns = [(pairs, {pair.noun for pair in pairs}) for pairs in prompts]
    ways = itertools.permutations([entry for entry in nouns if len(entry[1]) == 2], 2)
    return [
        [*first, *second] for (first, first_nouns), (second, second_nouns) in ways if not first_nouns & second_nouns
    ]


def mix_pairs(found: Mapping[str, Sequence[tuple[Pair, Pair]]]) -> list[list[Pair]]:
    """Samples one to eight pairs of mixed kinds for each of the benchmark's prompts (ours).

    The number of pairs cycles through 1 to 8, so each number has 125 prompts. For each pair, the kind is sampled
    uniformly, then a pair of that kind. No noun occurs twice in a prompt.

    Args:
      found: result of `find_prompts` by kind.

    Returns:
      The pairs of each prompt.
    """
    pairs = {kind: list(dict.fromkeys(itertools.chain(*kind_prompts))) for kind, kind_prompts in found.items()}
    kinds, mixed, generator = sorted(found), [], random.Random(SEED)

    def choose(items: Sequence[Any]) -> Any:
        # Python guarantees reproducible sequences across versions only for `random.random`.
        return items[int(generator.random() * len(items))]

    for index in range(NUM_PROMPTS):
        prompt_pairs: dict[str, Pair] = {}
        while len(prompt_pairs) <= index % MAX_PAIRS:
            pair = choose(pairs[choose(kinds)])
            prompt_pairs.setdefault(pair.noun, pair)
        mixed.append(list(prompt_pairs.values()))
    return mixed


def read_pairs(file: epath.Path) -> list[Pair]:
    """Reads the pairs of a prompt from the metadata file that `PositionalBias.write` wrote.

    Raises:
      UserError: the file is damaged or has another format.
    """
    try:
        pairs = read_json(file)["pairs"]
        pairs = [Pair(str(pair["phrase"]), str(pair["kind"])) for pair in pairs]
    except (ValueError, KeyError, TypeError):
        pairs = []
    if not 1 <= len(pairs) <= MAX_PAIRS:
        raise UserError(
            f"{file} has no pairs of the positional-bias benchmark: it is damaged or belongs to another benchmark; "
            "generate the images again"
        )
    return pairs
