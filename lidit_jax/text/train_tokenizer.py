"""Trains a small byte-level BPE tokenizer on the captions of a data set, so that the demo needs no download."""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lidit_jax.errors import UserError

END = "<|end|>"
# Each CJK character is a word of its own. Merging "red" with "circle" would give a colour-shape pair one token, which
# the model could not decompose for a pair that it was not trained on.
CJK = Regex(r"[\u3000-\u303f\u3400-\u9fff\uff00-\uffef]")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer that splits words at spaces and around CJK characters.

    It can encode any text.

    Args:
      texts: captions.
      vocab_size: number of tokens.

    Raises:
      UserError: if the vocabulary is smaller than the 256 bytes and the end token.
    """
    if vocab_size < 257:
        raise UserError(f"vocab_size={vocab_size} is smaller than a byte-level vocabulary: use at least 257")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(CJK, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=True)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)
