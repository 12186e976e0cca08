"""A small byte-level BPE tokenizer, trained on a data set's own captions: the demo downloads nothing."""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lidit_jax.errors import UserError

END = "<|end|>"
# One CJK character is one token: merging "red" with "circle" would hide a pair that was never seen from the model.
CJK = Regex(r"[\u3000-\u303f\u3400-\u9fff\uff00-\uffef]")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE (no text is unknown to it) whose words are split at spaces and around CJK characters.

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
