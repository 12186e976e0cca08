"""Visual question answering with transformers' models: BLIP, ViLT and multi-modal chat models.

BLIP         BlipForQuestionAnswering, such as Salesforce/blip-vqa-base: probability of "yes"; T2I-CompBench needs it
ViLT         ViltForQuestionAnswering: the most likely of its answers
chat models  any model of AutoModelForImageTextToText with a chat template, such as LLaVA or Qwen2-VL: greedy decoding
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image

from lidit_jax.errors import UserError
from lidit_jax.score.load_model import device, load_model, load_processor, model_folder

BATCH = 8  # questions at a time
MAX_WORDS = 50  # the official BLIP code truncates questions to so many words …
MAX_TOKENS = 35  # … and then to so many tokens
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CHAT_SUFFIX = " Answer yes or no."
MAX_NEW_TOKENS = 8


class VqaModel(Protocol):
    """Answers questions about an image."""

    def answers(self, image: np.ndarray, questions: Sequence[str]) -> list[str]:
        """Returns one answer per question.

        Args:
          image: uint8 [H, W, 3].
          questions: such as "Is the cat black?".
        """


def load_vqa(name: str) -> VqaModel:
    """Loads a VQA model of any kind; its config.json tells which.

    Args:
      name: a folder, or a model's name on the hub.

    Raises:
      UserError: there is none, or it does not answer questions about images.
    """
    kind = _kind(name)
    if kind == "blip":
        return BlipVqa(name)
    if kind == "vilt":
        return ViltVqa(name)
    return ChatVqa(name)


def load_blip(name: str) -> "BlipVqa":
    """Loads a BLIP, the kind of model that gives probabilities of "yes".

    Args:
      name: a folder, or a model's name on the hub.

    Raises:
      UserError: there is none, or it is of another kind.
    """
    if _kind(name) != "blip":
        raise UserError(f"--vqa={name} is not a BLIP, which this benchmark needs: use Salesforce/blip-vqa-base")
    return BlipVqa(name)


def is_yes(answer: str) -> bool:
    """Returns True if an answer's first word is "yes", whatever its case and the punctuation around it."""
    return re.match(r"\W*yes\b", answer, re.IGNORECASE) is not None


def clean_question(question: str) -> str:
    """Cleans a question as the official BLIP code does: lower case, punctuation removed, at most 50 words.

    The characters "?", "," and "'" stay, like all others that the official pattern does not list.
    """
    question = re.sub(r'[.!"()*#:;~]', "", question.lower()).rstrip(" ")
    return " ".join(question.split(" ")[:MAX_WORDS])


class BlipVqa:
    """BLIP, used as in T2I-CompBench's BLIPvqa_eval.

    Nothing is generated: the probabilities of the answer's first token are read off. The question starts with BLIP's
    own [ENC] token in place of [CLS], and the image is resized to the model's square input by Pillow's bicubic filter,
    whatever the folder's processor would do.

    The official script runs at 480 x 480 pixels. Salesforce/blip-vqa-base, the same model, is published for 384 x 384,
    so its scores are close to the official ones but not equal.
    """

    def __init__(self, name: str):
        self._model = load_model("BlipForQuestionAnswering", "vqa", name)
        self._tokenizer = load_processor("AutoTokenizer", "vqa", name)
        text = self._model.config.text_config
        # The vocabulary is bert-base-uncased's, then [DEC], which starts answers, then [ENC].
        self._decode, self._encode = text.bos_token_id, text.bos_token_id + 1
        self._yes, self._no = self._tokenizer.convert_tokens_to_ids(["yes", "no"])
        if self._tokenizer.unk_token_id in (self._yes, self._no) or not 0 <= self._encode < text.vocab_size:
            raise UserError(f'--vqa={name}: its tokenizer is not BLIP\'s: it lacks "yes", "no" or the token [ENC]')

    def yes_probabilities(self, image: np.ndarray, questions: Sequence[str]) -> list[float]:
        """Returns p(yes) / (p(yes) + p(no)) for each answer's first token, rounded to 4 decimals as officially.

        Args:
          image: uint8 [H, W, 3].
          questions: such as "a red car?".
        """
        import torch

        ids = [self._token_ids(clean_question(question)) for question in questions]
        # Batches of equal length only: transformers' decoder attends to the padding of shorter questions.
        by_length = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        probabilities = [0.0] * len(ids)
        with torch.inference_mode():
            image_features = self._model.vision_model(pixel_values=self._pixels(image))[0]
            for _, same_length in itertools.groupby(by_length, key=lambda i: len(ids[i])):
                for batch in _batches(list(same_length)):
                    answers = self._batch_probabilities(image_features, [ids[i] for i in batch])
                    for i, probability in zip(batch, answers, strict=True):
                        probabilities[i] = probability
        return probabilities

    def answers(self, image: np.ndarray, questions: Sequence[str]) -> list[str]:
        """Returns "yes" for each question if it is more likely than "no", else "no"."""
        return ["yes" if p > 0.5 else "no" for p in self.yes_probabilities(image, questions)]

    def _pixels(self, image: np.ndarray) -> Any:
        """Resizes and normalises an image; returns a tensor [1, 3, side, side]."""
        import torch

        side = self._model.config.vision_config.image_size
        resized = np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC), np.float32)
        pixels = (resized / 255 - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)
        return torch.from_numpy(pixels.transpose(2, 0, 1)[None]).to(device(), self._model.dtype)

    def _token_ids(self, question: str) -> list[int]:
        """Returns a question's token ids, with [ENC] in place of [CLS]."""
        ids = self._tokenizer(question, truncation=True, max_length=MAX_TOKENS)["input_ids"]
        return [self._encode, *ids[1:]]

    def _batch_probabilities(self, image_features: Any, questions: list[list[int]]) -> list[float]:
        """Returns the probabilities of "yes" for one batch.

        Args:
          image_features: [1, patches, width].
          questions: token ids, all of one length.
        """
        import torch

        question_features = self._model.text_encoder(
            input_ids=torch.tensor(questions, device=device()),
            encoder_hidden_states=image_features.expand(len(questions), -1, -1),
        )[0]
        start = torch.full((len(questions), 1), self._decode, device=device())
        logits = self._model.text_decoder(input_ids=start, encoder_hidden_states=question_features).logits[:, 0]
        logits = logits[:, [self._yes, self._no]].float()  # [questions, 2]
        return [round(p, 4) for p in logits.softmax(-1)[:, 0].tolist()]


class ViltVqa:
    """ViLT, a classifier over a fixed set of answers."""

    def __init__(self, name: str):
        self._model = load_model("ViltForQuestionAnswering", "vqa", name)
        self._processor = load_processor("AutoProcessor", "vqa", name)
        self._labels = self._model.config.id2label

    def answers(self, image: np.ndarray, questions: Sequence[str]) -> list[str]:
        """Returns the most likely label for each question."""
        import torch

        found = []
        with torch.inference_mode():
            for batch in _batches(questions):
                inputs = self._processor(
                    images=[Image.fromarray(image)] * len(batch),
                    text=list(batch),
                    padding=True,
                    truncation=True,
                    max_length=self._model.config.max_position_embeddings,
                    return_tensors="pt",
                ).to(device(), self._model.dtype)
                found += [self._labels[index] for index in self._model(**inputs).logits.argmax(-1).tolist()]
        return found


class ChatVqa:
    """A multi-modal chat model, instructed to answer yes or no."""

    def __init__(self, name: str):
        self._processor = _chat_processor(name)
        if not getattr(self._processor, "chat_template", None):
            raise UserError(
                f"--vqa={name} has no chat template: name a multi-modal chat model, a BLIP for VQA or a ViLT"
            )
        self._tokenizer = self._processor.tokenizer
        # Generation continues at the right end, so padding goes to the left.
        self._tokenizer.padding_side = "left"
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._model = load_model("AutoModelForImageTextToText", "vqa", name)

    def answers(self, image: np.ndarray, questions: Sequence[str]) -> list[str]:
        """Returns the model's answers by greedy decoding, at most `MAX_NEW_TOKENS` tokens each."""
        import torch

        found = []
        with torch.inference_mode():
            for batch in _batches(questions):
                texts = [
                    self._processor.apply_chat_template(_conversation(question), add_generation_prompt=True)
                    for question in batch
                ]
                inputs = self._processor(
                    images=[[Image.fromarray(image)]] * len(batch), text=texts, padding=True, return_tensors="pt"
                ).to(device(), self._model.dtype)
                generated = self._model.generate(
                    **inputs,
                    max_new_tokens=MAX_NEW_TOKENS,
                    do_sample=False,
                    pad_token_id=self._tokenizer.pad_token_id,
                )[:, inputs["input_ids"].shape[1] :]
                decoded = self._processor.batch_decode(generated, skip_special_tokens=True)
                found += [answer.strip() for answer in decoded]
        return found


def _chat_processor(name: str) -> Any:
    try:
        return load_processor("AutoProcessor", "vqa", name)
    except UserError as error:
        # Models that also take videos, such as Qwen2-VL, have video processors that need torchvision.
        if "torchvision" not in str(error).lower():
            raise
        raise UserError(
            f"--vqa={name}: this kind of model needs torchvision as well: pip install torchvision"
        ) from error


def _conversation(question: str) -> list[dict[str, Any]]:
    """Returns a conversation that asks a question about an image."""
    content = [{"type": "image"}, {"type": "text", "text": question + CHAT_SUFFIX}]
    return [{"role": "user", "content": content}]


def _batches(questions: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(questions), BATCH):
        yield questions[start : start + BATCH]


def _kind(name: str) -> str:
    """Returns the kind of a model: "blip", "vilt" or "chat".

    Raises:
      UserError: it is of no such kind, or its folder is missing or damaged.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    folder = model_folder("vqa", name)
    try:
        config, _ = transformers.PreTrainedConfig.get_config_dict(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"--vqa={name}: its config.json is damaged: copy or download the model again") from error
    kind = config.get("model_type")
    if kind in ("blip", "vilt"):
        return kind
    if kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise UserError(
            f"--vqa={name} is a {kind!r:.40}, which does not answer questions about images: name a BLIP for VQA, a "
            "ViLT or a multi-modal chat model"
        )
    return "chat"
