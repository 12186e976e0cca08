"""Captions of images by a vision-language model of transformers."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lidit_jax.errors import UserError
from lidit_jax.recaption.model_errors import model_errors
from lidit_jax.score.load_model import device, load_model, load_processor, model_folder
from lidit_jax.text.generation import check_answer_length, decode_greedily, image_inputs
from lidit_jax.weights.safetensors_folder import read_config

FLAG = "weights"
# The end of a sentence, before spaces or in Chinese and Japanese; neither the number of a list's entry nor a title.
_SENTENCE_END = re.compile(r"""(?<!\d)(?<!\bDr)(?<!\bMr)(?<!\bMrs)(?<!\bMs)(?<!\bSt)[.!?]["')\]”’»]?(?=\s)|[。！？]""")


class GeneratedCaption(NamedTuple):
    """A caption of an image.

    Attributes:
      text: the caption, in one line; of a caption that was cut off, its complete sentences if there is one.
      complete: whether the model ended the caption itself.
    """

    text: str
    complete: bool


class Captioner:
    """Asks a vision-language model about batches of images, and takes its most likely answers."""

    def __init__(self, name: str, question: str, max_tokens: int):
        """Loads the model, in the precision of its weights, onto a GPU if PyTorch has one.

        Args:
          name: folder of the model, or its name on the hub.
          question: what the model is asked of each image.
          max_tokens: longest answer in tokens.

        Raises:
          UserError: the folder cannot be read, or its model takes no images.
        """
        if "vision_config" not in read_config(model_folder(FLAG, name)):
            raise UserError(
                f"--{FLAG}={name} takes no images (no vision_config in its config.json): name a vision-language model"
            )
        self._named, self._question, self._max_tokens = f"--{FLAG}={name}", question, max_tokens
        self._processor = load_processor("AutoProcessor", FLAG, name, trust_remote_code=False)
        self._network = load_model("AutoModelForImageTextToText", FLAG, name, trust_remote_code=False)
        decode_greedily(self._network, self._processor.tokenizer, max_tokens)

    def __call__(self, images: Sequence[np.ndarray]) -> list[GeneratedCaption]:
        """Returns the caption of each image, uint8 [H, W, 3].

        Raises:
          UserError: the question or an image does not fit the model.
          OutOfMemory: the batch is too large.
        """
        import torch

        inputs = image_inputs(self._processor, images, self._question)
        given = inputs["input_ids"].shape[1]
        check_answer_length(self._named, self._network, given, self._max_tokens)
        with model_errors(self._named, len(images)), torch.inference_mode():
            tokens = self._network.generate(**{key: x.to(device()) for key, x in inputs.items()})
        answers = tokens[:, given:].cpu()
        end = np.atleast_1d(self._network.generation_config.eos_token_id)
        texts = self._processor.tokenizer.batch_decode(answers, skip_special_tokens=True)
        complete = np.isin(answers.numpy(), end).any(axis=1)
        return [
            GeneratedCaption(_one_line(text) if whole else complete_sentences(_one_line(text)), bool(whole))
            for text, whole in zip(texts, complete, strict=True)
        ]


def complete_sentences(text: str) -> str:
    """Returns the text up to the end of its last complete sentence; all of it if it has none."""
    ends = [found.end() for found in _SENTENCE_END.finditer(f"{text} ")]
    return text[: ends[-1]] if ends else text


def _one_line(text: str) -> str:
    return " ".join(text.split())
