"""Saves tiny VQA models with random weights in transformers' format."""

import pathlib

import numpy as np

_TEXT = """[PAD] [UNK] [CLS] [SEP] [MASK] yes no a an red blue green car apple cup plate wooden round is there ?
    USER : ASSISTANT <image>"""
WORDS = _TEXT.split()


def random_image(seed: int, height: int = 40, width: int = 56) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save_blip(folder: pathlib.Path) -> pathlib.Path:
    import torch
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"bos_token_id": len(WORDS), "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    text = {"vocab_size": len(WORDS) + 2, "encoder_hidden_size": 16, "max_position_embeddings": 40, **sizes, **special}
    vision = {"image_size": 32, "patch_size": 16, **sizes}
    torch.manual_seed(0)
    model = transformers.BlipForQuestionAnswering(transformers.BlipConfig(text_config=text, vision_config=vision))
    _make_louder(model)
    model.save_pretrained(folder)
    _save_words(folder)
    return folder


def save_vilt(folder: pathlib.Path) -> pathlib.Path:
    import torch
    import transformers
    from transformers.models.vilt.image_processing_pil_vilt import ViltImageProcessorPil

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    labels = {"id2label": {0: "yes", 1: "no", 2: "two"}, "label2id": {"yes": 0, "no": 1, "two": 2}}
    torch.manual_seed(0)
    config = transformers.ViltConfig(
        vocab_size=len(WORDS), image_size=32, patch_size=16, max_position_embeddings=40, **sizes, **labels
    )
    model = transformers.ViltForQuestionAnswering(config)
    _make_louder(model)
    model.save_pretrained(folder)
    processor = transformers.ViltProcessor(ViltImageProcessorPil(size={"shortest_edge": 32}), _save_words(folder))
    processor.save_pretrained(folder)
    return folder


def save_llava(folder: pathlib.Path, chat_template: bool = True) -> pathlib.Path:
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", eos_token="[SEP]", extra_special_tokens={"image_token": "<image>"}
    )
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(image_size=32, patch_size=16, **sizes),
        text_config=transformers.LlamaConfig(vocab_size=len(WORDS), **sizes),
        image_token_id=WORDS.index("<image>"),
    )
    model = transformers.LlavaForConditionalGeneration(config)
    _make_louder(model)
    model.save_pretrained(folder)
    template = (
        "{% for message in messages %}USER : {% for part in message['content'] %}"
        "{{ '<image> ' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endfor %} ASSISTANT :"
    )
    processor = transformers.LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template if chat_template else None,
    )
    processor.save_pretrained(folder)
    return folder


def _make_louder(model) -> None:
    """Scales weights up: with transformers' initialisation, the answers would hardly depend on the question."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "norm" not in name.lower():
                parameter.mul_(12)


def _save_words(folder: pathlib.Path):
    import transformers

    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(WORDS))
    tokenizer = transformers.BertTokenizer(str(vocabulary))
    tokenizer.save_pretrained(folder)
    return tokenizer
