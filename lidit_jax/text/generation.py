"""Generation by language models of transformers: their inputs with images, and greedy decoding.

PyTorch and transformers are imported inside functions: the rest of this package works without them.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from lidit_jax.errors import UserError


def image_inputs(
    processor: Any, images: Sequence[np.ndarray], text: str, system_prompt: str = "", chat_template: bool = True
) -> dict[str, Any]:
    """Returns the inputs of a vision-language model: an image and then the text, in the user's turn, once per image.

    Rows are padded on the left, so that all answers begin at the same position.

    Args:
      processor: the model's `AutoProcessor`.
      images: uint8 [H, W, 3] each.
      text: what the model is told about every image.
      system_prompt: text in a turn of its own before; "" for none.
      chat_template: use the processor's chat template if it has one.

    Raises:
      UserError: the processor fails, as a chat template can.
    """
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
    system = {"role": "system", "content": [{"type": "text", "text": system_prompt}]}
    try:
        if chat_template and processor.chat_template:
            messages = [system, turn] if system_prompt else [turn]
            prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        else:
            prompt = " ".join(part for part in (system_prompt, f"{processor.image_token}\n{text}") if part)
        processor.tokenizer.padding_side = "left"
        if processor.tokenizer.pad_token is None:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token
        rows, bos = [[Image.fromarray(image)] for image in images], processor.tokenizer.bos_token
        # Templates that write the begin token would otherwise get a second one, as in transformers' own tokenisation.
        add_special_tokens = not (bos and prompt.startswith(bos))
        return dict(
            processor(
                images=rows,
                text=[prompt] * len(rows),
                padding=len(rows) > 1,
                return_tensors="pt",
                add_special_tokens=add_special_tokens,
            )
        )
    except Exception as error:  # a template is a program and can raise anything; a prompt may spell an image token out
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the model's processor fails on an image with the text {text!r:.80} ({reason})") from error


def decode_greedily(network: Any, tokenizer: Any, max_tokens: int) -> None:
    """Sets a model of transformers to answer with its most likely tokens.

    The generation config is made anew: a folder's generation_config.json may ask for beams, for sampling, or for code
    of its own.

    Args:
      network: the model.
      tokenizer: has the end token, if the model names none.
      max_tokens: longest answer.
    """
    import transformers

    own = network.generation_config
    network.generation_config = transformers.GenerationConfig(
        max_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=own.eos_token_id if own.eos_token_id is not None else tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        bos_token_id=own.bos_token_id,
        decoder_start_token_id=own.decoder_start_token_id,
    )


def check_answer_length(named: str, network: Any, given: int, max_tokens: int) -> None:
    """Raises UserError if a prompt of `given` tokens and its answer do not fit into the model's context.

    Args:
      named: flag and name of the model, for the message.
      network: the model.
      given: tokens of the prompt.
      max_tokens: longest answer.
    """
    longest = getattr(network.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and given + max_tokens > longest:
        raise UserError(
            f"{named} reads at most {longest} tokens, but a prompt has {given} and its answer up to {max_tokens}: give "
            "a shorter prompt or a smaller --max_tokens"
        )
