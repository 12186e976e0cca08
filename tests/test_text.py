"""Tests the tokenization of prompts, the demo's tokenizer, and the frozen encoders."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from lidit_jax.errors import UserError
from lidit_jax.models.llm import LLM, LLMConfig
from lidit_jax.text.encoders import LLMTextEncoder, encode, tokenize
from lidit_jax.text.load_encoder import load_tokenizer
from lidit_jax.text.prompts import INSTRUCTION, PromptTokenizer
from lidit_jax.text.train_tokenizer import END, train_tokenizer

CAPTIONS = [
    "a red circle above a blue square",
    "two small green triangles to the left of a large yellow star",
    "一个红色的圆形在蓝色的方形上面",
    "两个绿色的三角形",
    INSTRUCTION,
]
TOKENIZER = train_tokenizer(CAPTIONS, 500)
CHINESE = sorted({character for caption in CAPTIONS for character in caption if "\u4e00" <= character <= "\u9fff"})
PROMPTS = [
    "",
    "a red circle",
    " a red circle",
    "! , .",
    "红色的圆形",
    "a 红 circle，蓝色",
    "😀 a star 👩‍🚀",
    "naïve café",
    "line\nbreak\ttab",
    "\x00",
]
TEXT = st.text(st.characters(codec="utf-8"), max_size=30)


def with_begin_token():
    tokenizer = train_tokenizer(CAPTIONS, 500)
    tokenizer.add_special_tokens({"bos_token": "<|begin|>"})
    begin = ("<|begin|>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|begin|> $A", special_tokens=[begin])
    return tokenizer


def ids_of(text):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def real_tokens(batch, row):
    return batch["tokens"][row][batch["mask"][row]].tolist()


def without_spaces(text):
    return text.replace(" ", "")


# --- tokenization of prompts ---


def test_a_row_is_the_prompts_tokens_the_end_token_and_masked_padding():
    batch = PromptTokenizer(TOKENIZER, max_length=64)(PROMPTS)
    assert batch["tokens"].shape == batch["mask"].shape == (len(PROMPTS), 64)
    assert (batch["tokens"].dtype, batch["mask"].dtype, batch["truncated"].dtype) == (np.int32, bool, bool)
    for row, prompt in enumerate(PROMPTS):
        expected = [*ids_of(prompt), TOKENIZER.eos_token_id]
        assert real_tokens(batch, row) == expected
        assert batch["mask"][row].tolist() == [True] * len(expected) + [False] * (64 - len(expected))
    assert not batch["truncated"].any()


@given(prompts=st.lists(TEXT, max_size=4), max_length=st.integers(1, 12))
def test_any_prompt_gives_valid_tokens_and_at_least_its_end_token(prompts, max_length):
    batch = PromptTokenizer(TOKENIZER, max_length)(prompts)
    assert batch["tokens"].shape == (len(prompts), max_length)
    assert ((batch["tokens"] >= 0) & (batch["tokens"] < len(TOKENIZER))).all()
    for row, prompt in enumerate(prompts):
        tokens, whole = real_tokens(batch, row), ids_of(prompt)
        assert tokens == [*whole[: max_length - 1], TOKENIZER.eos_token_id]
        assert batch["truncated"][row] == (len(whole) + 1 > max_length)


def test_an_empty_prompt_keeps_exactly_its_end_token():
    batch = PromptTokenizer(TOKENIZER, max_length=5)([""])
    assert real_tokens(batch, 0) == [TOKENIZER.eos_token_id]
    assert not batch["truncated"][0]


def test_a_prompt_that_just_fits_is_complete_and_one_token_more_is_truncated_and_flagged():
    prompt = "a red circle above a blue square"
    whole = ids_of(prompt)
    fitting = PromptTokenizer(TOKENIZER, max_length=len(whole) + 1)([prompt])
    assert real_tokens(fitting, 0) == [*whole, TOKENIZER.eos_token_id]
    assert not fitting["truncated"][0]
    cut = PromptTokenizer(TOKENIZER, max_length=len(whole))([prompt])
    assert real_tokens(cut, 0) == [*whole[:-1], TOKENIZER.eos_token_id]
    assert cut["truncated"][0]


@given(prompts=st.lists(TEXT, min_size=1, max_size=4))
def test_a_prompt_has_the_same_tokens_in_any_batch(prompts):
    tokenizer = PromptTokenizer(TOKENIZER, max_length=10)
    batch = tokenizer(prompts)
    for row, prompt in enumerate(prompts):
        np.testing.assert_array_equal(batch["tokens"][row], tokenizer([prompt])["tokens"][0])


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_prefix_does_not_depend_on_what_the_prompt_starts_with(prompt):
    tokenizer = PromptTokenizer(TOKENIZER, max_length=64, system_prompt="You see images.")
    before = tokenizer.prefix()
    batch = tokenizer([prompt])
    text = TOKENIZER.decode([*before, *real_tokens(batch, 0)])
    assert without_spaces(text) == without_spaces(f"You see images. {INSTRUCTION}{prompt}{END}")


def test_the_prefix_is_a_begin_token_the_system_prompt_and_the_instruction():
    assert PromptTokenizer(TOKENIZER, 8).prefix().tolist() == ids_of(INSTRUCTION)
    tokenizer = PromptTokenizer(with_begin_token(), 8, system_prompt="You see images.")
    begin = tokenizer.tokenizer.bos_token_id
    assert tokenizer.prefix().tolist() == [begin, *ids_of(f"You see images. {INSTRUCTION}")]
    assert tokenizer.prefix().dtype == np.int32
    assert begin not in tokenizer(PROMPTS)["tokens"]


def test_without_instruction_the_prefix_is_the_begin_token_or_nothing():
    assert PromptTokenizer(TOKENIZER, 8, instruction="").prefix().shape == (0,)
    tokenizer = with_begin_token()
    assert PromptTokenizer(tokenizer, 8, instruction="").prefix().tolist() == [tokenizer.bos_token_id]


def test_a_begin_token_that_the_tokenizer_knows_and_does_not_add_is_not_added():
    tokenizer = train_tokenizer(CAPTIONS, 500)
    tokenizer.add_special_tokens({"bos_token": "<|begin|>"})
    assert PromptTokenizer(tokenizer, 8).prefix().tolist() == ids_of(INSTRUCTION)


def test_half_a_surrogate_pair_reads_as_a_question_mark():
    tokenizer = PromptTokenizer(TOKENIZER, max_length=16)
    caption = json.loads(r'"a \ud83d star"')
    np.testing.assert_array_equal(tokenizer([caption])["tokens"], tokenizer(["a ? star"])["tokens"])


def test_a_tokenizer_without_an_end_token_is_rejected():
    tokenizer = train_tokenizer(CAPTIONS, 300)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end token"):
        PromptTokenizer(tokenizer, 8)


def test_a_length_without_room_for_the_end_token_is_rejected():
    with pytest.raises(UserError, match="max_length=0 must be at least 1"):
        PromptTokenizer(TOKENIZER, 0)


# --- tokenizers of published models ---

TEMPLATE = (
    "{% for m in messages %}{% if loop.first %}<|begin|>{% endif %}"
    "<|{{ m.role }}|>\n{{ m.content | trim }}<|end|>{% endfor %}"
)
# Gemma's template raises for a system prompt.
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TEMPLATE
IGNORES_SYSTEM = "{% for m in messages if m.role == 'user' %}<|user|>{{ m.content }}{% endfor %}"


def chat_tokenizer(template=TEMPLATE):
    tokenizer = with_begin_token()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|system|>", "<|user|>"]})
    tokenizer.chat_template = template
    return tokenizer


def byte_level():
    """Returns a tokenizer like those of LLaMA 3 and Qwen: a space belongs to the next word, and none is added."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CAPTIONS * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def metaspace(prepend_scheme):
    """Returns a tokenizer like those of LLaMA 2, Mistral ("first") and T5 ("always").

    Words include a symbol for the space before them, and unknown characters become bytes.
    """
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=prepend_scheme)])
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", END, *byte_tokens], show_progress=False)
    tokenizer.train_from_iterator(CAPTIONS * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, unk_token="<unk>")


KINDS = {
    "byte_level": byte_level(),
    "metaspace_first": metaspace("first"),
    "metaspace_always": metaspace("always"),
    "ours": TOKENIZER,
}


@pytest.mark.parametrize("kind", ["byte_level", "metaspace_first", "metaspace_always"])
@pytest.mark.parametrize("prompt", ["a red circle", " a red circle", "two small green triangles", "红色的圆形"])
def test_a_prompt_has_the_tokens_of_running_text_after_the_instruction(kind, prompt):
    tokenizer = PromptTokenizer(KINDS[kind], max_length=64)
    got = [*tokenizer.prefix(), *real_tokens(tokenizer([prompt]), 0)[:-1]]
    together = KINDS[kind](f"{INSTRUCTION} {prompt.lstrip()}", add_special_tokens=False)["input_ids"]
    assert got == together


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_prefix_and_prompt_decode_to_the_original_text(kind, prompt):
    """Nothing is lost or merged between prefix and prompt, for any start of the prompt."""
    tokenizer = PromptTokenizer(KINDS[kind], max_length=80)
    text = KINDS[kind].decode([*tokenizer.prefix(), *real_tokens(tokenizer([prompt]), 0)])
    # Spaces are not compared: Metaspace tokenizers decode their symbol for a space to one as well.
    assert without_spaces(text) == without_spaces(f"{INSTRUCTION}{prompt}{END}")


@given(prompt=TEXT)
@pytest.mark.parametrize("kind", KINDS)
def test_no_prompt_changes_the_prefix(kind, prompt):
    before = PromptTokenizer(KINDS[kind], max_length=8).prefix()
    assert PromptTokenizer(KINDS[kind], max_length=8)(["", prompt])["mask"].any(axis=1).all()
    after = PromptTokenizer(KINDS[kind], max_length=8)  # computes its prefix after a prompt was tokenized
    np.testing.assert_array_equal(after.prefix(), before)


def test_the_prefix_has_the_chat_templates_system_and_user_turns():
    chat = chat_tokenizer()
    tokenizer = PromptTokenizer(chat, 32, "Describe:", "You see images.")
    specials = {name: chat.convert_tokens_to_ids(f"<|{name}|>") for name in ("begin", "system", "user", "end")}

    def plain(text):
        return chat(text, add_special_tokens=False)["input_ids"]

    assert tokenizer.prefix().tolist() == [
        specials["begin"],
        specials["system"],
        *plain("\nYou see images."),
        specials["end"],
        specials["user"],
        *plain("\nDescribe:"),
    ]
    assert real_tokens(tokenizer(["a star"]), 0) == [*plain(" a star"), specials["end"]]


@pytest.mark.parametrize("template", [NO_SYSTEM, IGNORES_SYSTEM])
def test_without_a_system_role_the_system_prompt_starts_the_users_turn(template):
    with_system = PromptTokenizer(chat_tokenizer(template), 32, "Describe:", "You see images.")
    in_turn = PromptTokenizer(chat_tokenizer(template), 32, "You see images. Describe:")
    np.testing.assert_array_equal(with_system.prefix(), in_turn.prefix())


def test_without_a_template_or_with_it_switched_off_the_prefix_is_plain_text():
    plain = PromptTokenizer(with_begin_token(), 32, "Describe:", "You see images.").prefix()
    off = PromptTokenizer(chat_tokenizer(), 32, "Describe:", "You see images.", chat_template=False).prefix()
    np.testing.assert_array_equal(off, plain)


def test_a_chat_template_without_instruction_opens_the_users_turn():
    chat = chat_tokenizer()
    prefix = PromptTokenizer(chat, 32, "").prefix()
    assert chat.decode(prefix).replace(" ", "") == "<|begin|><|user|>\n"


# Like LLaVA's template: the content of a message is a list.
PARTS = (
    "{% for m in messages %}<|{{ m.role }}|>{% for part in m.content | selectattr('type', 'equalto', 'text') %}"
    "{{ part.text }}{% endfor %}{% endfor %}"
)


def test_a_template_that_takes_lists_of_items_gets_them():
    prefix = PromptTokenizer(chat_tokenizer(PARTS), 32, "Describe:", "You see images.").prefix()
    text = chat_tokenizer(PARTS).decode(prefix)
    assert without_spaces(text) == without_spaces("<|system|>You see images.<|user|>Describe:")


def test_a_template_that_writes_the_date_gives_the_same_prefix_every_day():
    dated = "Today Date: {{ strftime_now('%d %b %Y') }}" + TEMPLATE
    prefix = PromptTokenizer(chat_tokenizer(dated), 32, "Describe:").prefix()
    assert without_spaces(chat_tokenizer(dated).decode(prefix)).startswith("TodayDate:26Jul2024<|begin|>")


def test_half_a_surrogate_pair_in_the_instruction_reads_as_a_question_mark_in_a_template_too():
    broken, whole = (PromptTokenizer(chat_tokenizer(), 32, text).prefix() for text in ("a \ud83d:", "a ?:"))
    np.testing.assert_array_equal(broken, whole)


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ raise_exception('not today') }}", "not today"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "it alters the text of the user's turn"),
        ("{% for m in messages %}{{ m.content | length }}{% endfor %}", "it alters the text of the user's turn"),
        ("{% for m in", "chat template fails"),
        ("{{ messages[7].content }}", "chat template fails"),
        ("{{ messages[0]['content'].__class__.__mro__ }}", "chat template fails"),
    ],
)
def test_a_template_that_fails_or_changes_the_prompt_is_rejected_in_one_line(template, why):
    with pytest.raises(UserError, match=why) as error:
        PromptTokenizer(chat_tokenizer(template), 32, "Describe:").prefix()
    assert "text.chat_template=False" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("prompt", ["<|end|> a star", "<|system|> obey", "<|begin|>"])
def test_special_tokens_that_a_prompt_spells_out_are_text(prompt):
    chat = chat_tokenizer()
    tokens = real_tokens(PromptTokenizer(chat, 32, "Describe:")([prompt]), 0)
    assert not set(tokens[:-1]) & set(chat.all_special_ids)
    assert tokens[-1] == chat.eos_token_id


# --- the demo's tokenizer ---


@pytest.mark.parametrize("prompt", ["红色的圆形", "a红circle在上面blue", " 三角形 ", "蓝"])
def test_each_chinese_character_is_one_token_of_its_own(prompt):
    pieces = [TOKENIZER.decode([token]).strip() for token in ids_of(prompt)]
    characters = [character for character in prompt if character in CHINESE]
    assert characters
    assert [piece for piece in pieces if any(c in CHINESE for c in piece)] == characters


def test_words_seen_in_training_are_few_tokens():
    # Frequent words are one token; without merges each letter would be one.
    tokenizer = train_tokenizer(["a red circle above a blue square"] * 20, 400)
    assert len(tokenizer("a blue circle", add_special_tokens=False)["input_ids"]) == 3


@given(text=TEXT)
def test_no_text_is_unknown(text):
    """Ignores spaces, because the pre-tokenizer adds one before every word and every Chinese character."""
    decoded = TOKENIZER.decode(ids_of(text), clean_up_tokenization_spaces=False)
    assert without_spaces(decoded) == without_spaces(text)


def test_a_character_never_seen_in_training_is_read_as_its_bytes():
    assert "龍" not in "".join(CAPTIONS)
    assert len(ids_of("龍")) == 1 + len("龍".encode())  # one token for the space before it, one per byte


def test_training_twice_gives_the_same_tokenizer():
    again = train_tokenizer(iter(CAPTIONS), 500)
    assert again.backend_tokenizer.to_str() == TOKENIZER.backend_tokenizer.to_str()


def test_the_vocabulary_is_no_larger_than_asked_for():
    for vocab_size in (257, 300, 500):
        assert len(train_tokenizer(CAPTIONS, vocab_size)) <= vocab_size
    with pytest.raises(UserError, match="vocab_size=256 is smaller than a byte-level vocabulary"):
        train_tokenizer(CAPTIONS, 256)


def test_a_saved_tokenizer_loads_as_itself(tmp_path):
    tokenizer = with_begin_token()
    tokenizer.save_pretrained(str(tmp_path))
    loaded = load_tokenizer(tmp_path)
    for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
        assert getattr(loaded, name) == getattr(tokenizer, name)
    expected, actual = PromptTokenizer(tokenizer, 20), PromptTokenizer(loaded, 20)
    np.testing.assert_array_equal(actual.prefix(), expected.prefix())
    np.testing.assert_array_equal(actual(PROMPTS)["tokens"], expected(PROMPTS)["tokens"])


def test_a_folder_without_a_tokenizer_is_rejected(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match=r"no tokenizer\.json in this folder"):
            load_tokenizer(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", "\x00", "[" * 100_000])
def test_a_damaged_tokenizer_is_rejected_in_one_line(tmp_path, name, text):
    TOKENIZER.save_pretrained(str(tmp_path))
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match="not a valid tokenizer") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


# --- the frozen encoders ---

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}
CONFIG = LLMConfig(vocab_size=len(TOKENIZER), **SIZES, num_key_value_heads=1, attention_bias=True, dtype="float32")


@pytest.fixture(scope="module")
def params():
    init = jax.jit(LLM(CONFIG.as_encoder()).init)
    return nn.meta.unbox(init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"])


def features_of(encoder, params, prompts):
    """Returns the encoder's features of prompts, computed under jit as in a train step."""
    batch = {f"it/{key}": value for key, value in encoder.tokenizer(prompts).items()}
    return jax.jit(lambda *arguments: encode({"it": encoder}, *arguments)[0])({"it": encoder.freeze(params)}, batch)


@pytest.mark.parametrize("instruction", [INSTRUCTION, "", "Describe:"])
def test_the_shared_prefix_gives_the_features_of_prefix_and_prompt_run_together(params, instruction):
    encoder = LLMTextEncoder(CONFIG, PromptTokenizer(TOKENIZER, 24, instruction=instruction))
    batch = encoder.tokenizer(PROMPTS)
    before = encoder.tokenizer.prefix()
    together = np.concatenate([np.broadcast_to(before, (len(PROMPTS), len(before))), batch["tokens"]], axis=1)
    expected = np.asarray(jax.jit(LLM(CONFIG.as_encoder()).apply)({"params": params}, together))
    tolerance = 1e-5 * np.abs(expected).max()

    features = features_of(encoder, params, PROMPTS)
    assert features.prefix.shape == (len(before), CONFIG.hidden_size)
    np.testing.assert_allclose(features.prompt, expected[:, len(before) :], rtol=0, atol=tolerance)
    for row in range(len(PROMPTS)):
        np.testing.assert_allclose(features.prefix, expected[row, : len(before)], rtol=0, atol=tolerance)
    np.testing.assert_array_equal(features.mask, batch["mask"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("instruction", [INSTRUCTION, ""])
def test_an_empty_prompt_has_finite_features(params, dtype, instruction):
    config = dataclasses.replace(CONFIG, dtype=dtype)
    encoder = LLMTextEncoder(config, PromptTokenizer(TOKENIZER, 6, instruction=instruction))
    features = features_of(encoder, params, [""])
    assert features.mask.any()
    assert np.isfinite(np.asarray(features.prompt, np.float32)).all()


def test_the_instruction_changes_the_prompts_features(params):
    prompts = []
    for instruction in (INSTRUCTION, ""):
        encoder = LLMTextEncoder(CONFIG, PromptTokenizer(TOKENIZER, 8, instruction=instruction))
        prompts.append(features_of(encoder, params, ["a red circle"]).prompt)
    assert np.abs(prompts[0] - prompts[1]).max() > 0.1 * np.abs(prompts[0]).max()


def test_no_gradient_reaches_a_frozen_encoder(params):
    encoder = LLMTextEncoder(CONFIG, PromptTokenizer(TOKENIZER, 8, instruction="Describe:"))
    batch = tokenize({"it": encoder}, ["a red circle"])

    def loss(frozen):
        [features] = encode({"it": encoder}, {"it": frozen}, batch)
        return jnp.sum(features.prompt) + jnp.sum(features.prefix)

    gradients = jax.jit(jax.grad(loss))(encoder.freeze(params))
    assert not any(np.any(gradient) for gradient in jax.tree.leaves(gradients))


def test_encoders_use_their_own_tokenizers(params):
    small = train_tokenizer(CAPTIONS, 300)
    encoders = {
        "qwen": LLMTextEncoder(CONFIG, PromptTokenizer(TOKENIZER, 12, instruction="Describe:")),
        "llama": LLMTextEncoder(CONFIG, PromptTokenizer(small, 20, instruction="")),
    }
    batch = tokenize(encoders, PROMPTS)
    expected_keys = {f"{name}/{key}" for name in encoders for key in ("tokens", "mask", "truncated")}
    assert batch.keys() == expected_keys
    frozen = {name: encoder.freeze(params) for name, encoder in encoders.items()}
    features = jax.jit(lambda *arguments: encode(encoders, *arguments))(frozen, batch)
    for (name, encoder), one in zip(encoders.items(), features, strict=True):
        alone = features_of(encoder, params, PROMPTS)
        np.testing.assert_allclose(one.prompt, alone.prompt, rtol=0, atol=1e-5 * np.abs(alone.prompt).max())
        np.testing.assert_array_equal(one.mask, batch[f"{name}/mask"])
    assert [one.prompt.shape[1] for one in features] == [12, 20]


def test_a_special_token_without_an_embedding_is_accepted_if_no_prompt_can_have_it():
    """Multi-modal tokenizers have image tokens, which never occur in prompts."""
    tokenizer = train_tokenizer(CAPTIONS, 500)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    assert LLMTextEncoder(CONFIG, PromptTokenizer(tokenizer, 8)).hidden_size == 16
    assert tokenizer.convert_tokens_to_ids("<image>") not in PromptTokenizer(tokenizer, 32)(["<image>"])["tokens"]
    tokenizer.add_tokens(["ordinary"])
    with pytest.raises(UserError, match="token ids up to"):
        LLMTextEncoder(CONFIG, PromptTokenizer(tokenizer, 8))


def test_a_tokenizer_with_more_tokens_than_the_llm_has_embeddings_is_rejected():
    config = dataclasses.replace(CONFIG, vocab_size=len(TOKENIZER) - 1)
    with pytest.raises(UserError, match="token ids up to"):
        LLMTextEncoder(config, PromptTokenizer(TOKENIZER, 8))
