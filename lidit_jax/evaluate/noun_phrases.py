"""Noun phrases of T2I-CompBench's prompts, which its scorer turns into questions."""

import functools
import re
from collections.abc import Callable

from lidit_jax.evaluate.attributes import ATTRIBUTES, words

MAX_PHRASES = 8  # most phrases that the official script asks about
# Phrases that the official script skips.
SKIPPED = frozenset(("top", "the side", "the left", "the right"))
SPACY_MODEL = "en_core_web_sm"

_WORD = re.compile(r"[A-Za-z][\w'’-]*|\d[\d:.]*\d|\d|[^\w\s]")
# A word of _STARTS begins a phrase; a word of _ENDS ends the phrase before it.
_STARTS = words("a an the its their his her one two three four five many several some")
_JOINING = words("and or")
_PRONOUNS = words("which that him he she it they them")
_PREPOSITIONS = words(
    """of in on at with by for from to near under above against between through into beside behind inside below
    around over next along off up down while where when as"""
)
_NON_NOUNS = words(
    """is are was were be been has have had stood sat led left parked sitting standing placed attached mounted made
    visible empty neatly both useful necessary nearby waving fascinated struggled used arranged stacked warm
    hydrated most whitish serving reaching sides jot"""
)
_ENDS = _JOINING | _PREPOSITIONS | _NON_NOUNS
_NOT_A_PHRASE = _STARTS | {"tall"}  # as in "stood tall"
# Verbs in the benchmark's sentences. Some are nouns in other places ("the defining features of"), see `_is_verb`.
_VERBS = words(
    """release mix hang hold rest display serve provide provided slice boil nap write sit sits shape stir attract
    attracted bake perch cook pound measure keep kept beat cut illuminate decorate features feature shines flash
    holds reads hung held sparkled propelled controlled floated created dominated flowed displayed"""
)


def noun_phrases(prompt: str) -> list[str]:
    """Returns the noun phrases that the official script asks about, at most 8, in the prompt's order.

    Like the official script, uses the noun chunks of spaCy's en_core_web_sm if spaCy and that model are installed.
    Falls back to `split_noun_phrases` otherwise.
    """
    phrases = (_spacy_chunks() or split_noun_phrases)(prompt)
    return [phrase for phrase in phrases if phrase not in SKIPPED][:MAX_PHRASES]


def splitter_name() -> str:
    """Returns the method that `noun_phrases` uses: spaCy's model with versions, or "rules"."""
    chunks = _spacy_chunks()
    return "rules" if chunks is None else chunks.name


def split_noun_phrases(prompt: str) -> list[str]:
    """Splits a prompt into noun phrases by rules made for T2I-CompBench's prompts.

    The rules are exact for "a ADJECTIVE NOUN and a ADJECTIVE NOUN", also without articles or with nouns of several
    words, which is the form of most of the benchmark. Its sentences are split by lists of their verbs and prepositions.
    The result equals that of spaCy 3.8 with en_core_web_sm 3.8 on 831 of the 900 prompts of the colour, shape and
    texture validation lists. On the others it is usually the model that errs: it loses a noun ("a white snow and a blue
    sled" gives "a white snow" alone), merges two ("a metallic key and fluffy clouds"), or takes a verb for a noun
    ("fluffy scarf hang"). Scores with the model are the official ones nevertheless. In sentences with words that the
    benchmark does not have, a phrase may include a verb.
    """
    phrases: list[list[str]] = [[]]
    tokens = _WORD.findall(prompt)
    for i, word in enumerate(tokens):
        lower, phrase = word.lower(), phrases[-1]
        following = tokens[i + 1].lower() if i + 1 < len(tokens) else "."
        if lower in _PRONOUNS:
            phrases += [[word], []]
        elif lower in _JOINING and _joins_attributes(phrase, following):
            phrase.append(word)
        elif lower == "," and phrase and _is_attribute(phrase[-1]) and following not in _STARTS:
            phrase[-1] += ","
        elif lower in _ENDS or not word[0].isalnum() or _is_verb(lower, phrase, following):
            phrases.append([])
        elif lower in _STARTS and phrase:
            phrases.append([word])
        elif not word[0].isdigit():
            phrase.append(word)
    return [" ".join(phrase) for phrase in phrases if not {word.lower() for word in phrase} <= _NOT_A_PHRASE]


def _is_attribute(word: str) -> bool:
    return word.lower() in ATTRIBUTES


def _joins_attributes(phrase: list[str], following: str) -> bool:
    """Returns True if an "and" joins two adjectives of one noun, as in "a black and white cat"."""
    return bool(phrase) and _is_attribute(phrase[-1]) and _is_attribute(following)


def _is_verb(word: str, phrase: list[str], following: str) -> bool:
    """Returns True if a word is a verb of `_VERBS` after a noun and the word after it does not imply a noun."""
    after_noun = bool(phrase) and phrase[-1].lower() not in _STARTS and not _is_attribute(phrase[-1])
    return word in _VERBS and after_noun and following not in ("of", "and", ".", ",")


@functools.cache
def _spacy_chunks() -> Callable[[str], list[str]] | None:
    """Returns a function from a prompt to spaCy's noun chunks; None if spaCy or its model is not installed."""
    try:
        import spacy

        pipeline = spacy.load(SPACY_MODEL)
    except (ImportError, OSError):
        return None

    def chunks(prompt: str) -> list[str]:
        return [chunk.text for chunk in pipeline(prompt).noun_chunks]

    chunks.name = f"spacy {spacy.__version__}, {SPACY_MODEL} {pipeline.meta['version']}"
    return chunks
