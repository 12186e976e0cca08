"""A tiny vision-language model with random weights, saved as transformers saves one."""

from pathlib import Path
from typing import Any

import torch
import transformers

from lidit_jax.text.train_tokenizer import train_tokenizer

CAPTIONS = ["a red circle above a blue square", "Describe the objects: colour, shape and size"]
CHAT_TEMPLATE = """\
{%- for message in messages %}<|{{ message.role }}|>
{%- if message.content is string %}{{ message.content }}
{%- else %}{% for part in message.content %}{{ "<image>" if part.type == "image" else part.text }}{% endfor %}
{%- endif %}{{ eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""
SIZES = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 8, "patch_size": 4, "projection_dim": 16}


def save(model: Any, folder: Path, chat_template: str | None = None) -> str:
    """Saves a model with random weights and a tokenizer, and returns the folder."""
    for seed, parameter in enumerate(model.parameters()):
        torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(seed))
    model.save_pretrained(folder)
    tokenizer = train_tokenizer(CAPTIONS, 299)
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return str(folder)


def image_processor() -> Any:
    return transformers.CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})


def save_llava(folder: Path) -> str:
    """Saves a LLaVA and its processor, and returns the folder."""
    tokenizer = train_tokenizer(CAPTIONS, 299)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=transformers.LlamaConfig(**SIZES | {"vocab_size": 320}),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    save(transformers.LlavaForConditionalGeneration(config), folder)
    processor = transformers.LlavaProcessor(
        image_processor(),
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    processor.save_pretrained(folder)
    return str(folder)
