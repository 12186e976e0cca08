"""Generates answers of language models to prompts, with transformers."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tqdm
from etils import epath

from lidit_jax.errors import UserError
from lidit_jax.evaluate.read_image import read_image
from lidit_jax.score.eval_extra import require_extra
from lidit_jax.score.load_model import device, load_model, load_processor, model_folder
from lidit_jax.text.generation import check_answer_length, decode_greedily, image_inputs
from lidit_jax.text.load_encoder import load_tokenizer, tokenizer_folder
from lidit_jax.text.prompts import INSTRUCTION, PromptTokenizer
from lidit_jax.weights import huggingface_t5
from lidit_jax.weights.safetensors_folder import read_config

FLAG = "weights"
MAX_PROMPT_TOKENS = 4096


@dataclasses.dataclass(frozen=True)
class DescribeRequest:
    """Models and the prompts that they are given.

    Attributes:
      weights: folders in Hugging Face's format, or names of models on the hub.
      prompts: the prompts; each is given to each model alone and, unless `instruction` is "", after the instruction.
      instruction: see `PromptTokenizer`.
      system_prompt: see `PromptTokenizer`.
      chat_template: see `PromptTokenizer`.
      image: image file that the models are given before the text; None for none.
      max_tokens: longest answer in tokens.
    """

    weights: Sequence[str]
    prompts: Sequence[str]
    instruction: str = INSTRUCTION
    system_prompt: str = ""
    chat_template: bool = True
    image: epath.Path | None = None
    max_tokens: int = 128

    @property
    def instructions(self) -> tuple[str, ...]:
        """The instructions that every prompt is given after; "" is none."""
        return ("", self.instruction) if self.instruction else ("",)


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer of a model to a prompt.

    Attributes:
      weights: the model, as the request names it.
      prompt: the prompt.
      instruction: the instruction before it; "" for none.
      given: text that the model reads, with its special tokens.
      text: the answer.
      tokens: number of tokens of the answer, its end token included.
      complete: whether the model ended the answer; otherwise it was cut off.
    """

    weights: str
    prompt: str
    instruction: str
    given: str
    text: str
    tokens: int
    complete: bool


def generate_answers(request: DescribeRequest) -> list[Answer]:
    """Returns each model's answers, in the order of the models, prompts and instructions.

    One model is in memory at a time, in the precision of its weights. PyTorch computes on a GPU if it has one.

    Raises:
      UserError: a package is missing; a folder, its tokenizer or the image cannot be read; a model has no head or
        decoder to generate text with, or takes no images; or a prompt is too long for a model.
    """
    require_extra("describe", "torch")
    image = read_image(request.image) if request.image else None
    models = [_Model(name, read_config(model_folder(FLAG, name))) for name in request.weights]
    for model in models:
        if image is not None and not model.takes_images:
            raise UserError(
                f"--{FLAG}={model.name} takes no images (no vision_config in its config.json): leave out --image"
            )
    answers = []
    count = len(models) * len(request.prompts) * len(request.instructions)
    with tqdm.tqdm(total=count, unit="answer", desc="generating", mininterval=1) as bar:
        for model in models:
            for answer in _answers_of(model, request, image):
                answers.append(answer)
                bar.update()
    return answers


@dataclasses.dataclass(frozen=True)
class _Model:
    """A model that the request names, and its config.json."""

    name: str
    config: Mapping[str, Any]

    @property
    def takes_images(self) -> bool:
        return "vision_config" in self.config

    @property
    def has_encoder(self) -> bool:
        return (
            bool(self.config.get("is_encoder_decoder")) or self.config.get("model_type") in huggingface_t5.MODEL_TYPES
        )

    @property
    def class_name(self) -> str:
        """The class of transformers that generates text with the model."""
        if self.takes_images:
            return "AutoModelForImageTextToText"
        return "AutoModelForSeq2SeqLM" if self.has_encoder else "AutoModelForCausalLM"


def _answers_of(model: _Model, request: DescribeRequest, image: np.ndarray | None) -> Iterator[Answer]:
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()  # it would warn of options that greedy decoding ignores
    tokenizer = load_tokenizer(tokenizer_folder(model_folder(FLAG, model.name)))
    tasks = list(itertools.product(request.prompts, request.instructions))
    if image is None:
        inputs = [_text_inputs(model, tokenizer, request, *task) for task in tasks]
    else:
        processor = load_processor("AutoProcessor", FLAG, model.name, trust_remote_code=False)
        inputs = [
            image_inputs(
                processor,
                [image],
                " ".join(part for part in (instruction, prompt) if part),
                request.system_prompt,
                request.chat_template,
            )
            for prompt, instruction in tasks
        ]
    network = load_model(model.class_name, FLAG, model.name, trust_remote_code=False)
    longest = max(one["input_ids"].shape[1] for one in inputs)
    check_answer_length(f"--{FLAG}={model.name}", network, longest, request.max_tokens)
    decode_greedily(network, tokenizer, request.max_tokens)
    end = network.generation_config.eos_token_id
    for (prompt, instruction), given in zip(tasks, inputs, strict=True):
        with torch.inference_mode():
            output = network.generate(**{key: x.to(device()) for key, x in given.items()})
        tokens = given["input_ids"][0]
        generated = output[0].cpu()[1 if model.has_encoder else len(tokens) :]
        yield Answer(
            weights=model.name,
            prompt=prompt,
            instruction=instruction,
            given=tokenizer.decode(tokens, skip_special_tokens=False),
            text=tokenizer.decode(generated, skip_special_tokens=True).strip(),
            tokens=len(generated),
            complete=bool(np.isin(generated[-1:], end).any()),
        )


def _text_inputs(
    model: _Model, tokenizer: Any, request: DescribeRequest, prompt: str, instruction: str
) -> dict[str, Any]:
    """Returns the tokens that LI-DiT's encoder reads and, with a chat template, the beginning of the model's turn."""
    import torch

    prompts = PromptTokenizer(
        tokenizer,
        max_length=MAX_PROMPT_TOKENS,
        instruction=instruction,
        system_prompt=request.system_prompt,
        chat_template=request.chat_template,
    )
    row = prompts([prompt])
    if row["truncated"][0]:
        raise UserError(f"a prompt has more than {MAX_PROMPT_TOKENS - 1} tokens: give a shorter one")
    tokens = row["tokens"][0][row["mask"][0]]
    # T5 reads the end token, which for a decoder would end the text that it continues.
    tokens = np.concatenate([prompts.prefix(), tokens if model.has_encoder else tokens[:-1], prompts.suffix()])
    if not len(tokens):
        raise UserError(f"--{FLAG}={model.name} has nothing to continue after an empty prompt: give --prompt")
    ids = torch.from_numpy(tokens.astype(np.int64))[None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
