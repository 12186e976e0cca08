"""Vision towers against transformers: hidden states, loading, and what is refused."""

import json

import jax
import numpy as np
import pytest
import torch
import transformers
from conftest import change_config

from lidit_jax.errors import UserError
from lidit_jax.models.vision import VisionConfig, VisionTower
from lidit_jax.parallel.mesh import make_mesh
from lidit_jax.weights.huggingface_vision import load_vision_tower, read_vision_config

SIZES = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4, "num_attention_heads": 3}


def random_model(cls, config):
    torch.manual_seed(0)
    model = cls(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms start at constants
            parameter.normal_(0, 0.3) if parameter.ndim == 1 else parameter.mul_(3)
    return model


def save_clip(folder, image_size=28, patch_size=14, **sizes):
    config = transformers.CLIPVisionConfig(image_size=image_size, patch_size=patch_size, **{**SIZES, **sizes})
    model = random_model(transformers.CLIPVisionModel, config)
    model.save_pretrained(folder)
    return model


def save_siglip(folder, image_size=28, patch_size=14, **sizes):
    config = transformers.SiglipVisionConfig(image_size=image_size, patch_size=patch_size, **{**SIZES, **sizes})
    model = random_model(transformers.SiglipVisionModel, config)
    model.save_pretrained(folder)
    return model


TOWERS = {"clip": save_clip, "siglip": save_siglip}


def hidden_states(model, images):
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    with torch.no_grad():
        states = model(pixel_values=pixels, output_hidden_states=True).hidden_states
    return [state.numpy() for state in states]


def images_of(config, count=2):
    shape = (count, config.image_size, config.image_size, 3)
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("layer", [1, 3, -1, -2])
def test_hidden_states_match_transformers(tmp_path, name, layer):
    model = TOWERS[name](tmp_path / "tower")
    config, params = load_vision_tower(tmp_path / "tower", layer=layer)
    images = images_of(config)
    features = jax.jit(VisionTower(config.up_to(layer)).apply)({"params": params}, images)
    np.testing.assert_allclose(features, hidden_states(model, images)[layer], atol=1e-5, rtol=1e-5)


# Patch and head counts of CLIP ViT-L/14 at 336 px (577 tokens, heads of 64) and SigLIP SO400M at 384 px (729, of 72).
@pytest.mark.parametrize(("name", "size", "width", "heads"), [("clip", 336, 128, 2), ("siglip", 384, 144, 2)])
def test_real_numbers_of_patches_match_transformers(tmp_path, name, size, width, heads):
    sizes = {"hidden_size": width, "num_attention_heads": heads, "num_hidden_layers": 2}
    model = TOWERS[name](tmp_path / "tower", image_size=size, patch_size=14, **sizes)
    config, params = load_vision_tower(tmp_path / "tower", layer=-2)
    images = images_of(config, 1)
    features = jax.jit(VisionTower(config.up_to(-2)).apply)({"params": params}, images)
    assert features.shape == (1, config.num_tokens, width)
    np.testing.assert_allclose(features, hidden_states(model, images)[-2], atol=2e-5, rtol=1e-5)


def test_the_tower_of_a_folder_with_two_encoders_is_read(tmp_path):
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**SIZES, "image_size": 28, "patch_size": 14}
    config = transformers.CLIPConfig(text_config={**text, "vocab_size": 30}, vision_config=vision)
    model = random_model(transformers.CLIPModel, config)
    model.save_pretrained(tmp_path / "clip")
    ours, params = load_vision_tower(tmp_path / "clip", layer=-2)
    images = images_of(ours)
    features = VisionTower(ours.up_to(-2)).apply({"params": params}, images)
    np.testing.assert_allclose(features, hidden_states(model.vision_model, images)[-2], atol=1e-5, rtol=1e-5)


def test_a_tower_is_loaded_sharded(tmp_path):
    save_clip(tmp_path / "tower", hidden_size=64, num_attention_heads=4, intermediate_size=512)
    alone = load_vision_tower(tmp_path / "tower", layer=-2)[1]
    mesh = make_mesh({"data": 1, "fsdp": 4, "tensor": 2})
    params = load_vision_tower(tmp_path / "tower", layer=-2, mesh=mesh)[1]
    assert params["layers"]["fc1"]["kernel"].sharding.shard_shape((3, 64, 512)) == (3, 16, 256)
    jax.tree.map(np.testing.assert_array_equal, alone, params)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "vit"}, "model_type 'vit' is not a supported vision tower"),
        ({"hidden_act": "mish"}, "hidden_act='mish' is not supported"),
        ({"num_attention_heads": 5}, r"hidden size \(48\) is not a multiple of the number of attention heads"),
        ({"patch_size": 0}, "patch_size=0 is not a positive integer"),
        ({"patch_size": 29}, "patch_size=29 is above image_size=28"),
        ({"num_channels": 1}, "num_channels=1"),
        ({"image_size": 42}, "position_embedding.* has shape"),
        ({"hidden_size": None}, "hidden_size is missing"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, changes, message):
    save_clip(tmp_path)
    change_config(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        load_vision_tower(tmp_path)


def test_a_block_that_the_tower_lacks_is_refused(tmp_path):
    save_siglip(tmp_path)
    assert read_vision_config(tmp_path, dtype="float32").up_to(-4).num_hidden_layers == 1
    for layer in (0, 5, -5, -6):
        with pytest.raises(UserError, match=f"layer {layer} of a vision tower with 4 blocks: use 1 to 4"):
            load_vision_tower(tmp_path, layer=layer)


def test_a_damaged_folder_is_refused(tmp_path):
    save_clip(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": 3}))
    with pytest.raises(UserError, match="vision_config is missing or not an object"):
        load_vision_tower(tmp_path)


def test_tokens_are_counted():
    config = VisionConfig(**SIZES, image_size=336, patch_size=14)
    assert (config.num_patches, config.num_tokens) == (576, 577)
