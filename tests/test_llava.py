"""Multi-modal LLMs: logits against transformers, the written folder, and what does not fit together."""

import dataclasses
import json
import shutil

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from etils import epath
from test_vision import SIZES as VISION_SIZES
from test_vision import random_model, save_clip, save_siglip

from lidit_jax.errors import UserError
from lidit_jax.models.llava import Llava, LlavaConfig, image_features
from lidit_jax.models.llm import CausalLM
from lidit_jax.parallel.mesh import make_mesh
from lidit_jax.text.train_tokenizer import train_tokenizer
from lidit_jax.weights.huggingface_llava import (
    LlavaFiles,
    add_image_token,
    extend_vocabulary,
    llava_parameters,
    read_normalisation,
)
from lidit_jax.weights.huggingface_llm import load_causal_lm, load_llm_encoder
from lidit_jax.weights.huggingface_vision import load_vision_tower
from lidit_jax.weights.safetensors_folder import CONFIG_FILE

CAPTIONS = ["a red circle above a blue star", "a small green square left of a yellow triangle"] * 20
SIZES = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}
FAMILIES = {
    "llama": (transformers.LlamaConfig, {"rope_theta": 500_000.0}),
    "llama tied": (transformers.LlamaConfig, {"tie_word_embeddings": True}),
    "mistral": (transformers.MistralConfig, {"sliding_window": 4}),
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 16}),
    "gemma": (transformers.GemmaConfig, {"head_dim": 16}),
    "gemma2": (transformers.Gemma2Config, {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 4}),
    "phi3": (transformers.Phi3Config, {"pad_token_id": 0}),
}


def save_llm_of(folder, family="llama", **changes):
    """Saves a random LLM with its tokenizer."""
    config_class, own = FAMILIES[family]
    tokenizer = train_tokenizer(CAPTIONS, 290)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = config_class(**{**SIZES, **ids, **own, **changes})
    model = random_model(transformers.AutoModelForCausalLM.from_config, config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def make_llava(tmp_path, family="llama", tower="clip", **options):
    """Returns config, files, parameters and tower's parameters of a random multi-modal LLM."""
    save_llm_of(tmp_path / "llm", family)
    {"clip": save_clip, "siglip": save_siglip}[tower](tmp_path / "vision")
    llm, params = load_causal_lm(tmp_path / "llm")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "llm")
    token, size = add_image_token(tokenizer, llm)
    select = "default" if tower == "clip" else "full"
    vision, tower_params = load_vision_tower(tmp_path / "vision", layer=options.get("feature_layer", -2))
    config = LlavaConfig(dataclasses.replace(llm, vocab_size=size), vision, token, **{"select": select, **options})
    flat = {}
    random = np.random.default_rng(0)
    for path, leaf in llava_parameters(config).items():
        if path[0] != "language_model":
            flat[path] = random.normal(size=leaf.value.shape).astype(np.float32) * 0.2
    full = flax.traverse_util.unflatten_dict(flat) | {"language_model": extend_vocabulary(params, size)}
    files = LlavaFiles(
        config,
        epath.Path(tmp_path / "llm"),
        epath.Path(tmp_path / "vision"),
        tokenizer,
        *read_normalisation(epath.Path(tmp_path / "vision"), vision.is_clip),
    )
    return config, files, full, tower_params


def save(files, params, folder, **options):
    flat = flax.traverse_util.flatten_dict(params)
    folder.mkdir()
    files.save(
        epath.Path(folder),
        lambda path, block: np.asarray(flat[path] if block is None else flat[path][block]),
        **{"dtype": "float32", **options},
    )


def tokens_with_image(config, before=3, after=9, rows=2):
    random = np.random.default_rng(1)
    text = random.integers(0, 290, (rows, before + after))
    image = np.full((rows, config.tokens_per_image), config.image_token)
    return np.concatenate([text[:, :before], image, text[:, before:]], axis=1).astype(np.int32)


def their_logits(folder, tokens, images):
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
        return model(input_ids=torch.from_numpy(tokens).long(), pixel_values=pixels).logits.numpy()


@pytest.mark.parametrize(
    ("family", "tower", "options"),
    [
        *((family, "clip", {}) for family in FAMILIES),
        ("qwen2", "siglip", {}),
        ("llama", "clip", {"select": "full"}),
        ("llama", "siglip", {"feature_layer": -1}),
    ],
)
def test_the_written_folder_has_our_logits_in_transformers(tmp_path, family, tower, options):
    config, files, params, tower_params = make_llava(tmp_path, family, tower, **options)
    save(files, params, tmp_path / "llava")
    tokens = tokens_with_image(config)
    side = config.vision.image_size
    images = np.random.default_rng(2).normal(size=(2, side, side, 3)).astype(np.float32)
    features = image_features(config, tower_params, images)
    ours = jax.jit(Llava(config).apply)({"params": params}, tokens, features)
    theirs = their_logits(tmp_path / "llava", tokens, images)
    assert np.abs(theirs).max() > 0.1
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-4)


def test_the_written_folder_is_an_encoder_with_the_same_features(tmp_path):
    config, files, params, _ = make_llava(tmp_path, "qwen2")
    save(files, params, tmp_path / "llava", max_shard_bytes=20_000)
    assert len(list((tmp_path / "llava").glob("model-*.safetensors"))) > 3
    llm, encoder = load_llm_encoder(tmp_path / "llava")
    assert llm.vocab_size == config.llm.vocab_size
    ours = params["language_model"]["model"]
    jax.tree.map(np.testing.assert_array_equal, encoder["embed_tokens"], ours["embed_tokens"])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[:1]), encoder["layers"], ours["layers"])


def test_the_processor_makes_the_tokens_and_the_images_of_training(tmp_path):
    config, files, params, _ = make_llava(tmp_path)
    save(files, params, tmp_path / "llava")
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "llava")
    from PIL import Image

    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8).astype(np.uint8))
    made = processor(text="a <image> red circle", images=image, return_tensors="np")
    assert (made["input_ids"] == config.image_token).sum() == config.tokens_per_image
    assert made["pixel_values"].shape == (1, 3, 28, 28)


def test_a_head_that_is_missing_is_named(tmp_path):
    model = save_llm_of(tmp_path / "llm")
    model.model.save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match=r"bare has no output head \(lm_head.weight\): use the folder of a causal"):
        load_causal_lm(tmp_path / "bare")


@pytest.mark.parametrize("family", ["llama", "gemma", "phi3"])
def test_all_blocks_and_the_head_are_loaded_sharded(tmp_path, family):
    model = save_llm_of(tmp_path / "llm", family, hidden_size=128, intermediate_size=512)
    mesh = make_mesh({"data": 1, "fsdp": 4, "tensor": 2})
    config, params = load_causal_lm(tmp_path / "llm", mesh=mesh)
    up = params["model"]["layers"]["up_proj"]["kernel"]
    assert up.sharding.shard_shape(up.shape) == (3, 32, 256)
    tokens = np.arange(12, dtype=np.int32).reshape(2, 6)
    with torch.no_grad():
        theirs = model(input_ids=torch.from_numpy(tokens).long()).logits.numpy()
    ours = jax.jit(CausalLM(config).apply)({"params": params}, tokens)
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-4)


def test_new_rows_of_the_vocabulary_are_the_mean_of_the_others():
    random = np.random.default_rng(0)
    params = {
        "model": {"embed_tokens": jnp.asarray(random.normal(size=(5, 3)), jnp.float32), "layers": {}},
        "lm_head": {"kernel": jnp.asarray(random.normal(size=(3, 5)), jnp.float32)},
    }
    extended = extend_vocabulary(params, 8)
    embeddings, kernel = extended["model"]["embed_tokens"], extended["lm_head"]["kernel"]
    assert (embeddings.shape, kernel.shape) == ((8, 3), (3, 8))
    np.testing.assert_array_equal(embeddings[:5], params["model"]["embed_tokens"])
    np.testing.assert_allclose(embeddings[6], params["model"]["embed_tokens"].mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(kernel[:, 7], params["lm_head"]["kernel"].mean(axis=1), rtol=1e-6)


def test_an_image_token_that_the_vocabulary_has_room_for_takes_a_free_row(tmp_path):
    save_llm_of(tmp_path / "llm")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "llm")
    config, _ = load_causal_lm(tmp_path / "llm")
    known = len(tokenizer)
    token, size = add_image_token(tokenizer, config)
    assert (token, size) == (known, 300)
    assert add_image_token(tokenizer, config) == (token, size)  # a second time it is there
    full = dataclasses.replace(config, vocab_size=known)
    assert add_image_token(tokenizer, full) == (known, -(-(known + 1) // 64) * 64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"select": "cls"}, "select='cls' is unknown: use one of default, full"),
        ({"image_token": 300}, "image_token=300 is outside the vocabulary of 300 tokens"),
        ({"feature_layer": -9}, "layer -9 of a vision tower with 4 blocks"),
        ({"feature_layer": 0}, "layer 0 of a vision tower"),
    ],
)
def test_what_does_not_fit_together_is_named(tmp_path, changes, message):
    config, *_ = make_llava(tmp_path)
    with pytest.raises(UserError, match=message):
        dataclasses.replace(config, **changes)


def test_siglip_has_no_class_token_to_drop(tmp_path):
    config, *_ = make_llava(tmp_path, tower="siglip")
    with pytest.raises(UserError, match="which SigLIP does not have: use select='full'"):
        dataclasses.replace(config, select="default")


def test_real_numbers_of_image_tokens(tmp_path):
    config, *_ = make_llava(tmp_path)
    clip = dataclasses.replace(config.vision, image_size=336, patch_size=14)
    assert dataclasses.replace(config, vision=clip).tokens_per_image == 576
    siglip = dataclasses.replace(clip, image_size=384, is_clip=False)
    assert dataclasses.replace(config, vision=siglip, select="full").tokens_per_image == 729


def test_the_normalisation_is_the_towers_own(tmp_path):
    folder = epath.Path(tmp_path)
    assert read_normalisation(folder, False) == ((0.5,) * 3, (0.5,) * 3)
    assert read_normalisation(folder, True)[0][0] == pytest.approx(0.48145466)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}))
    assert read_normalisation(folder, True) == ((0.1, 0.2, 0.3), (1.0, 1.0, 1.0))
    for text in ("{", "[]", '{"image_std": [0, 1, 1]}', '{"image_mean": [1, 2]}', '{"image_mean": 3}'):
        file.write_text(text)
        with pytest.raises(UserError, match="preprocessor_config.json"):
            read_normalisation(folder, True)


def test_a_damaged_tower_is_refused_and_configs_keep_the_llms_own_values(tmp_path):
    _, files, params, _ = make_llava(tmp_path)
    save(files, params, tmp_path / "llava")
    values = json.loads((tmp_path / "llava" / CONFIG_FILE).read_text())
    assert values["text_config"]["rope_parameters"]["rope_theta"] == 500_000.0
    assert values["vision_config"]["num_hidden_layers"] == VISION_SIZES["num_hidden_layers"]
    shutil.rmtree(tmp_path / "vision")
    with pytest.raises(UserError, match="vision"):
        save(files, params, tmp_path / "again")
