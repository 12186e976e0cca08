"""Complete runs of the tiny demo: training, resuming, sampling, fine-tuning, and users' mistakes."""

import dataclasses
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import ROOT, change_config, load_config, load_module, tiny_config
from etils import epath
from PIL import Image

from lidit_jax import trained_model
from lidit_jax.checkpoint_weights import load_weights
from lidit_jax.config import TO_FILL_IN, claim_workdir, flatten, read_workdir
from lidit_jax.config_fields import with_defaults
from lidit_jax.errors import UserError
from lidit_jax.experiment import Experiment
from lidit_jax.models import vae_tiling
from lidit_jax.models.vae_tiling import decode_in_tiles
from lidit_jax.sample.generate import Request, sample_to_folder
from lidit_jax.stages.run import run_stages
from lidit_jax.weights.huggingface_llm import load_llm_encoder

CHECKPOINTS = "training/lidit/checkpoints"


def test_a_run_leaves_a_self_contained_workdir(trained_workdir):
    names = {path.name for path in trained_workdir.iterdir()}
    assert {"config.json", "encoders", "vae", "training", "grid.png", "scores.json"} <= names
    assert json.loads((trained_workdir / "scores.json").read_text())["two objects"]["objects"]["total"] == 16
    assert Image.open(trained_workdir / "grid.png").size[0] > 100


def test_the_demos_llms_are_transformers_models(trained_workdir):
    import torch
    import transformers

    for name, kind in (("llama", "LlamaModel"), ("qwen", "Qwen2Model")):
        folder = trained_workdir / "encoders" / name
        model = transformers.AutoModel.from_pretrained(str(folder))
        assert type(model).__name__ == kind
        config, params = load_llm_encoder(folder)
        tokens = np.arange(6)[None]
        with torch.no_grad():
            expected = model(torch.from_numpy(tokens), output_hidden_states=True).hidden_states[-3].numpy()
        from lidit_jax.models.llm import LLM

        got = LLM(config.as_encoder()).apply({"params": params}, tokens)
        np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())


def test_a_second_start_trains_nothing_and_changes_no_weight(trained_workdir, tmp_path):
    before, step = load_weights(trained_workdir / CHECKPOINTS, "params")
    lines = (trained_workdir / "training/lidit/metrics.jsonl").read_text()
    written = (trained_workdir / "scores.json").stat().mtime
    run_stages(tiny_config(), trained_workdir)
    assert (trained_workdir / "scores.json").stat().mtime == written  # not evaluated again
    after, same = load_weights(trained_workdir / CHECKPOINTS, "params")
    assert step == same == 6
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert (trained_workdir / "training/lidit/metrics.jsonl").read_text() == lines


def test_encoders_from_folders_train_the_same_model(trained_workdir, tmp_path):
    config = tiny_config()
    for name in config.encoders:
        config.encoders[name].weights = str(trained_workdir / "encoders" / name)
    config.vae.weights = str(trained_workdir / "vae")
    del config.evaluate
    run_stages(config, epath.Path(tmp_path))
    assert not (tmp_path / "encoders").exists()
    expected, got = (load_weights(folder / CHECKPOINTS, "params")[0] for folder in (trained_workdir, tmp_path))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), got, expected)


def test_a_t5_takes_an_llms_place_in_a_run(trained_workdir, t5_folder, tmp_path):
    config = tiny_config()
    config.encoders = {"t5": {"weights": str(t5_folder), "dtype": "float32"}}
    config.vae.weights = str(trained_workdir / "vae")
    config.train.steps = 2
    del config.evaluate
    run_stages(config, epath.Path(tmp_path))
    params, step = load_weights(tmp_path / CHECKPOINTS, "params")
    assert step == 2
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    sample_to_folder(Request(epath.Path(tmp_path), epath.Path(tmp_path / "out"), prompt="a red circle"))
    assert Image.open(tmp_path / "out/00000.png").size == (32, 32)


def test_an_encoder_that_does_not_fit_is_rejected_before_anything_is_trained(trained_workdir, tmp_path):
    config = tiny_config()
    config.encoders.qwen.weights = str(trained_workdir / "encoders" / "qwen")
    config.text.max_length = 5000
    with pytest.raises(UserError, match="more than the LLM's context of 4096: lower"):
        run_stages(config, epath.Path(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_sampling_needs_only_the_workdir_and_repeats_itself(trained_workdir, tmp_path, monkeypatch):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n\n红色圆形\n", encoding="utf-8")
    for out in ("a", "b"):
        sample_to_folder(Request(trained_workdir, epath.Path(tmp_path / out), prompts_file=str(prompts), num_images=2))
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["00000.png", "00001.png", "00002.png", "00003.png", "grid.png", "images.json"]
    for name in files[:-1]:
        np.testing.assert_array_equal(Image.open(tmp_path / "a" / name), Image.open(tmp_path / "b" / name))
    # An image depends on its prompt and seed, not on the rest of its batch.
    sample_to_folder(Request(trained_workdir, epath.Path(tmp_path / "c"), prompt="红色圆形", seed=2))
    alone = np.asarray(Image.open(tmp_path / "c" / "00000.png"), np.int32)
    together = np.asarray(Image.open(tmp_path / "a" / "00002.png"), np.int32)
    assert np.abs(alone - together).max() <= 1
    # Each file says how to generate it again, and so does the list.
    text = Image.open(tmp_path / "a" / "00002.png").text
    listed = json.loads((tmp_path / "a" / "images.json").read_text())
    assert (text["prompt"], text["seed"]) == ("红色圆形", "2") and json.loads(text["settings"]) == listed["settings"]
    assert listed["images"][2] == {"file": "00002.png", "prompt": "红色圆形", "seed": 2}
    # Images of an earlier call are replaced, all of them; if that fails, nothing is left of either.
    request = Request(trained_workdir, epath.Path(tmp_path / "a"), prompt="x")
    sample_to_folder(request)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["00000.png", "grid.png", "images.json"]

    def full(*arguments, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("lidit_jax.sample.generate.write_json", full)
    with pytest.raises(OSError, match="No space left"):
        sample_to_folder(request)
    assert not list((tmp_path / "a").iterdir())


def test_guidance_leads_away_from_a_negative_prompt(trained_workdir, tmp_path):
    def image(**options):
        sample_to_folder(Request(trained_workdir, epath.Path(tmp_path / "out"), prompt="a red circle", **options))
        return np.asarray(Image.open(tmp_path / "out" / "00000.png"))

    plain = image(guidance_scale=3.0)
    assert (image(guidance_scale=3.0, negative_prompt="a blue square") != plain).any()
    np.testing.assert_array_equal(image(guidance_scale=3.0, negative_prompt=""), plain)
    # At 1 the negative prompt's prediction has the weight 0.
    with pytest.raises(UserError, match="--negative_prompt has no effect without guidance"):
        image(guidance_scale=1.0, negative_prompt="a blue square")


def test_sampling_generates_sizes_that_training_never_saw(trained_workdir, tmp_path):
    request = Request(trained_workdir, epath.Path(tmp_path / "a"), prompt="", height=24, width=40, guidance_scale=1.0)
    sample_to_folder(request)
    assert Image.open(tmp_path / "a" / "00000.png").size == (40, 24)


@pytest.mark.parametrize("decode_pixels", [500, pytest.param(6000, marks=pytest.mark.slow)])
def test_images_decoded_in_slices_or_tiles_equal_those_decoded_at_once(
    trained_workdir, tmp_path, monkeypatch, decode_pixels
):
    tiles = []

    def spy(model, params, latents, tile):
        tiles.append(tile)
        return decode_in_tiles(model, params, latents, tile)

    monkeypatch.setattr(vae_tiling, "decode_in_tiles", spy)
    for out, pixels in (("once", None), ("parts", decode_pixels)):
        request = Request(trained_workdir, epath.Path(tmp_path / out), prompt="a red circle", num_images=2, height=96)
        sample_to_folder(dataclasses.replace(request, decode_pixels=pixels))
    once, parts = (np.asarray(Image.open(tmp_path / out / "00001.png"), np.int32) for out in ("once", "parts"))
    assert tiles == ([] if decode_pixels > 96 * 32 else [32])
    assert once.shape == (96, 32, 3)
    assert np.abs(once - parts).max() <= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "either --prompt"),
        ({"prompt": "x", "prompts_file": "y"}, "either --prompt"),
        ({"prompts_file": "missing.txt"}, "no such file"),
        ({"prompt": "x", "height": 33}, "height=33 is not a multiple of 8: use 32 or 40"),
        ({"prompt": "x", "width": 4}, "width=4 is not a multiple of 8"),
        ({"prompt": "x", "sampler": "ddim"}, "euler"),
        ({"prompt": "x", "sampler": "eular"}, "euler"),
        ({"prompt": "x", "steps": 0}, "steps"),
        ({"prompt": "x", "decode_pixels": 0}, "decode_pixels=0 must be at least 1"),
        ({"prompt": "x", "num_images": 0}, "num_images"),
        ({"prompt": "x", "seed": -1}, "seed"),
        ({"prompt": "x", "seed": 2**63}, f"seed={2**63} must be from 0 to {2**63 - 1}"),
        ({"prompt": "x", "seed": 2**63 - 1, "num_images": 2}, f"from 0 to {2**63 - 2}, for 2 images"),
        ({"prompt": "x", "height": 0}, "--height=0 must be at least 1"),
        ({"prompt": "x", "guidance_scale": float("nan")}, "--guidance=nan must be from 0 to 1000"),
        ({"prompt": "x", "guidance_scale": 1e38}, r"--guidance=1e\+38 must be from 0 to 1000"),
        ({"prompt": "x", "weights": "best"}, "ema or params"),
    ],
)
def test_invalid_sampling_requests_are_reported_before_weights_are_loaded(
    trained_workdir, tmp_path, monkeypatch, changes, message
):
    monkeypatch.setattr("lidit_jax.trained_model.load_weights", None)
    monkeypatch.setattr("lidit_jax.experiment.load_vae", None)
    with pytest.raises(UserError, match=message):
        sample_to_folder(Request(trained_workdir, epath.Path(tmp_path / "out"), **changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"\xff\x00bad", b"", b"\n \n"])
def test_files_without_prompts_are_rejected(trained_workdir, tmp_path, content):
    (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(UserError, match=r"prompts\.txt"):
        sample_to_folder(
            Request(trained_workdir, epath.Path(tmp_path / "out"), prompts_file=str(tmp_path / "prompts.txt"))
        )


def test_a_workdir_of_another_config_is_rejected_and_kept(trained_workdir):
    config = tiny_config()
    config.model.depth = 3
    before = (trained_workdir / "config.json").read_bytes()
    with pytest.raises(UserError, match=r"another config: model\.depth was 2, now 3"):
        run_stages(config, trained_workdir)
    assert (trained_workdir / "config.json").read_bytes() == before


def resumed(workdir, digests=None, **changes):
    """Claims a workdir of the tiny config again, with changed values by dotted key."""
    config = tiny_config()
    with config.unlocked():
        for key, value in changes.items():
            config.update_from_flattened_dict({key: value})
    claim_workdir(epath.Path(workdir), config, digests=digests)


def test_sampling_options_and_intervals_may_change_when_a_run_resumes(tmp_path):
    resumed(tmp_path)
    resumed(tmp_path, **{"sample.steps": 7, "sample.guidance_scale": 2.0, "train.log_every": 3, "train.keep": 1})
    assert read_workdir(epath.Path(tmp_path)).sample.steps == 7


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("model.remat", "full"), ("model.scan_unroll", 2), ("model.attention", "xla"), ("mesh.fsdp", 2)],
        *[("encoders.llama.model.remat", True), ("vae.evaluate", {"num_images": 8}), ("data.prefetch", 1)],
    ],
)
def test_how_a_run_computes_may_change_when_it_resumes(tmp_path, key, value):
    resumed(tmp_path)
    resumed(tmp_path, **{key: value})
    recorded = flatten(read_workdir(epath.Path(tmp_path)))
    expected = {f"{key}.{field}": one for field, one in value.items()} if isinstance(value, dict) else {key: value}
    assert expected.items() <= recorded.items()


@pytest.mark.parametrize(
    ("key", "value"),
    [("model.dtype", "bfloat16"), ("train.accumulate", 2), ("data.captions.keep", 2.0), ("vae.kl_weight", 0.5)],
)
def test_what_a_run_computes_may_not_change_when_it_resumes(tmp_path, key, value):
    resumed(tmp_path, **{"data.captions.keep": 1.0})  # a caption named as a field of another section
    with pytest.raises(UserError, match=f"{key} was .*, where --config.start_from="):
        resumed(tmp_path, **{"data.captions.keep": 1.0} | {key: value})


def test_an_entry_named_as_a_field_is_compared(tmp_path):
    resumed(tmp_path, **{"data.mixture": {"mesh": {"num_examples": 8}}})
    with pytest.raises(UserError, match=r"data\.mixture\.mesh\.num_examples was 8, now 9"):
        resumed(tmp_path, **{"data.mixture": {"mesh": {"num_examples": 9}}})


def test_a_change_of_the_training_names_start_from(tmp_path):
    resumed(tmp_path)
    words = "train.batch_size was 8, now 16; give --config.train.batch_size=8 or use another --workdir, where "
    with pytest.raises(UserError, match=re.escape(f"{words}--config.start_from={tmp_path} begins with its weights")):
        resumed(tmp_path, **{"train.batch_size": 16})
    with pytest.raises(UserError, match="use another --workdir$"):  # start_from needs the same model
        resumed(tmp_path, **{"model.depth": 3})


@pytest.mark.parametrize("key", ["data.path", "data.data_dir", "encoders.llama.weights", "vae.weights"])
def test_files_that_moved_are_accepted_if_their_digests_are_equal(tmp_path, key):
    resumed(tmp_path, {key: "d1"}, **{key: "/old/folder"})
    resumed(tmp_path, {key: "d1"}, **{key: "/new/folder"})
    with pytest.raises(UserError, match=re.escape(f"{key} was '/new/folder', now '/other'")):
        resumed(tmp_path, {key: "d2"}, **{key: "/other"})
    with pytest.raises(UserError, match="now ''"):
        resumed(tmp_path, {}, **{key: ""})


def test_digests_of_an_interrupted_claim_do_not_count(tmp_path):
    resumed(tmp_path, {"data.path": "d1"}, **{"data.path": "/old"})
    (tmp_path / "config.json").unlink()
    resumed(tmp_path, {"data.path": "d2"}, **{"data.path": "/new"})
    resumed(tmp_path, {"data.path": "d2"}, **{"data.path": "/newer"})
    assert json.loads((tmp_path / "digests.json").read_text()) == {"data.path": "d2"}


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.unlink() or file.mkdir(),
        lambda file: file.write_text("[" * 200_000),
        lambda file: file.write_text('{"a": ' * 200 + "1" + "}" * 200),
        lambda file: file.write_bytes(b"\xff\xfe"),
        lambda file: file.write_text('{"model.depth": 1}'),
        lambda file: file.write_text('{"model": {"__class__": 1}}'),
        lambda file: file.write_text('{"seed": 1, "seed": '),
    ],
)
def test_a_damaged_config_of_a_workdir_is_said_in_one_line(tmp_path, damage):
    resumed(tmp_path)
    damage(tmp_path / "config.json")
    with pytest.raises(UserError, match=r"config\.json: not a run's file \([^\n]*\); restore it"):
        read_workdir(epath.Path(tmp_path))


@pytest.mark.parametrize("diffusion", [{"name": ["ddpm"]}, {"name": {}}, [], None, "ddpm"])
def test_a_forged_section_of_a_workdirs_config_differs(tmp_path, diffusion):
    resumed(tmp_path)
    change_config(tmp_path, diffusion=diffusion)
    with pytest.raises(UserError, match="was created with another config: diffusion"):
        resumed(tmp_path)


def test_forged_digests_do_not_count(tmp_path):
    resumed(tmp_path, {"data.path": "d1"}, **{"data.path": "/old"})
    (tmp_path / "digests.json").write_text('{"vae.weights": [1], "data.path": {}}')
    with pytest.raises(UserError, match="data.path was '/old', now '/new'"):
        resumed(tmp_path, {"data.path": "d1"}, **{"data.path": "/new"})
    resumed(tmp_path, {"data.path": "d1"}, **{"data.path": "/old"})


def test_relative_and_absolute_paths_are_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    resumed(tmp_path / "run", **{"start_from": "runs/first", "data.path": "./shards"})
    resumed(tmp_path / "run", **{"start_from": f"{tmp_path}/runs/first/", "data.path": f"{tmp_path}/shards"})
    with pytest.raises(UserError, match="start_from was"):
        resumed(tmp_path / "run", **{"start_from": "runs/second", "data.path": "shards"})


def test_the_digests_name_every_file_of_the_config(trained_workdir, tmp_path):
    config = tiny_config()
    config.encoders.llama.weights = str(trained_workdir / "encoders/llama")
    config.vae.weights = str(trained_workdir / "vae")
    with config.unlocked():
        config.data.mixture = {"a": {"path": "x", "data_dir": "y", "class_names": "z"}}
    digests = Experiment(config, epath.Path(tmp_path)).named_digests("data")
    for field in ("path", "data_dir", "class_names"):
        assert digests.pop(f"data.mixture.a.{field}") == "data"
    assert sorted(digests) == ["encoders.llama.weights", "vae.weights"]


def test_sampling_takes_encoders_from_where_they_moved(trained_workdir, tmp_path):
    workdir, moved = epath.Path(tmp_path / "run"), tmp_path / "moved"
    shutil.copytree(trained_workdir, workdir)
    shutil.move(workdir / "encoders/llama", moved)
    change_config(
        workdir,
        encoders=json.loads((workdir / "config.json").read_text())["encoders"]
        | {"llama": {"weights": "/gone/llama", "dtype": "float32"}},
    )
    with pytest.raises(UserError, match="no such folder; if it was moved, give --encoder=llama=FOLDER"):
        trained_model.load(workdir)
    step = trained_model.load(workdir, encoders={"llama": str(moved)}).step
    assert step == 6
    with pytest.raises(UserError, match="trained with other weights"):
        trained_model.load(workdir, encoders={"llama": str(workdir / "encoders/qwen")})
    with pytest.raises(UserError, match="the run has no encoder 'bert'; it has llama, qwen"):
        trained_model.load(workdir, encoders={"bert": str(moved)})


def test_sampling_takes_the_vae_from_where_it_moved(trained_workdir, tmp_path):
    workdir, moved = epath.Path(tmp_path / "run"), str(tmp_path / "moved")
    shutil.copytree(trained_workdir, workdir)
    shutil.move(workdir / "vae", moved)
    vae = json.loads((workdir / "config.json").read_text())["vae"]
    change_config(workdir, vae=vae | {"weights": "/gone/vae"})
    with pytest.raises(UserError, match="vae.weights=/gone/vae: no such folder; if it was moved, give --vae=FOLDER"):
        trained_model.load(workdir)
    assert trained_model.load(workdir, vae=moved).step == 6
    config_file = Path(moved) / "config.json"
    config_file.write_text(config_file.read_text() + " ")
    with pytest.raises(UserError, match=f"--vae={moved}: the run was trained with other weights"):
        trained_model.load(workdir, vae=moved)


def without_position(workdir, copy):
    """Copies a run's config.json as earlier versions wrote it, without `model.position`."""
    values = json.loads((workdir / "config.json").read_text())
    for field in ("position", "position_grid", "refiner_qk_norm"):
        del values["model"][field]
    copy.mkdir()
    (copy / "config.json").write_text(json.dumps(values))
    return epath.Path(copy)


def test_a_workdir_from_before_model_position_has_conv(trained_workdir, tmp_path):
    old = without_position(trained_workdir, tmp_path / "old")
    assert read_workdir(old).model.position == "conv"
    config = tiny_config()
    config.model.position = "conv"
    claim_workdir(old, config)
    assert json.loads((old / "config.json").read_text())["model"]["position"] == "conv"


@pytest.mark.parametrize("encode", ["in_step", "ahead"])
def test_a_workdir_from_when_text_had_encode_is_resumed(tmp_path, encode):
    old = tiny_config()
    with old.text.unlocked():
        old.text.encode = encode
    claim_workdir(epath.Path(tmp_path), old)
    claim_workdir(epath.Path(tmp_path), tiny_config())
    assert "encode" not in read_workdir(epath.Path(tmp_path)).text
    assert "encode" not in json.loads((tmp_path / "config.json").read_text())["text"]


def test_an_old_workdir_is_not_resumed_with_another_position(trained_workdir, tmp_path):
    old = without_position(trained_workdir, tmp_path / "old")
    config = tiny_config()
    config.model.position = "sincos"
    with pytest.raises(UserError, match=r"position was 'conv', now 'sincos'; give --config\.model\.position=conv or"):
        claim_workdir(old, config)


def test_a_config_without_a_position_is_rejected(tmp_path):
    config = tiny_config()
    del config.model.position
    with pytest.raises(UserError, match=r"config key model\.position is missing"):
        Experiment(config, epath.Path(tmp_path))


@pytest.mark.parametrize(("field", "value"), [("position", "sincos"), ("position_grid", 7), ("refiner_causal", True)])
def test_fine_tuning_does_not_start_from_a_model_that_computes_something_else(trained_workdir, tmp_path, field, value):
    config = tiny_config()
    theirs = with_defaults(config)["model"][field]
    config.start_from = str(trained_workdir)
    with config.unlocked():
        config.model[field] = value
    restore = re.escape(f"give --config.model.{field}={theirs}")
    with pytest.raises(UserError, match=rf"model\.{field} is {value!r}, in .*: {restore}"):
        run_stages(config, epath.Path(tmp_path / "tuned"))
    assert not (tmp_path / "tuned").exists()


def test_a_config_that_is_to_start_from_another_run_asks_for_it(tmp_path):
    assert load_config("10b_1024").start_from == TO_FILL_IN
    config = tiny_config()
    config.start_from = TO_FILL_IN
    with pytest.raises(UserError, match="give --config.start_from=DIR"):
        run_stages(config, epath.Path(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_workdir_without_a_run_is_reported(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        sample_to_folder(Request(epath.Path(tmp_path), epath.Path(tmp_path / "out"), prompt="x"))


def test_changed_frozen_weights_are_rejected(trained_workdir, tmp_path):
    import shutil

    workdir = epath.Path(tmp_path / "copy")
    shutil.copytree(trained_workdir, workdir)
    file = workdir / "encoders/llama/config.json"
    file.write_text(file.read_text() + "\n")
    config = tiny_config()
    config.train.steps = 7
    with pytest.raises(UserError, match="frozen"):
        run_stages(config, workdir)


@pytest.mark.slow
def test_fine_tuning_starts_from_the_averaged_weights_of_another_run(trained_workdir, tmp_path):
    config = tiny_config()
    config.start_from = str(trained_workdir)
    for name in config.encoders:
        config.encoders[name].weights = str(trained_workdir / "encoders" / name)
    config.vae.weights = str(trained_workdir / "vae")
    config.train.update(steps=1, learning_rate=1e-12)
    del config.evaluate
    run_stages(config, epath.Path(tmp_path / "tuned"))
    tuned, _ = load_weights(tmp_path / "tuned" / CHECKPOINTS, "params")
    start, _ = load_weights(trained_workdir / CHECKPOINTS, "ema")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), tuned, start)


@pytest.mark.parametrize("name", ["shapes", "scenes", "1b", "10b", "10b_1024", "emoji"])
def test_configs_are_complete_except_for_paths(name, tmp_path):
    config = load_config(name)
    config.data.path = config.data.get("path", "") or "shards"
    for encoder in config.encoders.values():
        if encoder.get("train") is None:
            encoder.weights = "folder"
    if config.vae.get("train") is None:
        config.vae.weights = "folder"
    assert Experiment(config, epath.Path(tmp_path)).model.config.depth >= 4


@pytest.mark.parametrize("name", ["shapes", "scenes", "emoji"])
def test_an_override_of_one_encoder_leaves_the_others_as_they_are(name):
    config = load_config(name)
    config.encoders.llama.train.steps = 7
    config.encoders.llama.model.hidden_size = 8
    assert config.encoders.qwen.train.steps != 7
    assert config.encoders.qwen.model.hidden_size != 8


def test_every_ablation_row_is_a_config(tmp_path):
    for row in load_module("ablation").ROWS:
        config = load_config("ablation", row)
        config.data.path = "shards"
        for encoder in config.encoders.values():
            encoder.weights = "folder"
        config.vae.weights = "folder"
        Experiment(config, epath.Path(tmp_path))
    with pytest.raises(UserError, match="table2_baseline"):
        load_config("ablation", "table9")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.sample.update(sampler="ddpm"), "euler"),
        (lambda c: c.data.update(resolution=33), "33"),
        (lambda c: c.data.update(source="tar", path=""), "data.path is empty"),
        (lambda c: c.data.update(source="tar", path="/nowhere/at/all"), "/nowhere/at/all"),
        (lambda c: c.data.update(source="web"), "shapes, tar"),
        (lambda c: c.encoders.llama.update(family="gpt"), "llama, qwen2"),
        (lambda c: c.encoders.llama.update(dtype="bf16"), "encoders.llama.dtype='bf16' is not supported: use one of"),
        (lambda c: c.vae.update(dtype="float"), "vae.dtype='float' is not supported"),
        (lambda c: c.model.update(dtype="int8"), "model.dtype='int8' is not supported"),
        (lambda c: c.diffusion.update(name="flow"), "rectified_flow"),
        (lambda c: c.mesh.update(data=3), "mesh"),
        (lambda c: c.train.update(batch_size=0), "batch_size"),
        (
            lambda c: c.train.update(batch_size=12),
            "^train: a micro-batch of 12 is not divisible by 8 batch shards: .* of 8",
        ),
        (lambda c: c.encoders.qwen.train.update(batch_size=9), "^encoders.qwen.train: a micro-batch of 9 is not"),
        (lambda c: c.data.update(max_aspect=100.0), "max_aspect=100 at resolution=32 needs a side under 8"),
        (
            lambda c: c.vae.model.update(latent_channels=4),
            "4 latent channels, model.latent_channels=16: make them equal",
        ),
        (lambda c: (c.vae.model.update(layers_per_block=8), c.sample.update(decode_tile=32)), "use 44 or more"),
    ],
)
def test_an_invalid_config_is_rejected_before_anything_is_written(tmp_path, change, message):
    config = tiny_config()
    with config.unlocked():
        change(config)
    with pytest.raises(UserError, match=message):
        run_stages(config, epath.Path(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_key_that_a_config_file_misspells_names_the_nearest():
    config = tiny_config()
    with config.unlocked():
        config.model.dept = 4
    with pytest.raises(UserError, match=r"model\.dept is unknown; did you mean 'depth'"):
        Experiment(config, epath.Path("unused"))


def command(*arguments, **kwargs):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, **kwargs
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lidit_jax.main", "--config=configs/shapes.py", "--config.modle.depth=3"], "did you mean 'model'"),
        (["lidit_jax.main", "--config=configs/shapes.py", "--config.train.stesp=3"], "did you mean 'steps'"),
        (["lidit_jax.main", "--config=configs/shape.py", "--workdir=x"], "did you mean 'shapes'"),
        (["lidit_jax.main", "--config=configs/shapes.py"], "--workdir is required"),
        (["lidit_jax.main", "--config=configs/shapes.py", "--config.train.steps=many"], "train.steps"),
        (["lidit_jax.main", "--config=configs/ablation.py:table9", "--workdir=x"], "table2_baseline"),
        (["lidit_jax.sample", "--workdri=x"], "did you mean --workdir"),
        (["lidit_jax.sample", "--workdir=nowhere", "--prompt=x", "--out=out"], "no config.json"),
        (["lidit_jax.preview", "--config=configs/emoji.py", "--out=sheet.jpg"], "name a .png"),
    ],
)
@pytest.mark.slow
def test_a_users_mistake_ends_in_one_line_and_exit_code_2(arguments, message):
    result = command(*arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_like_an_uninterrupted_one(trained_workdir, tmp_path):
    """SIGKILL at several points of the run: while the small networks train, and between LI-DiT's steps."""
    workdir = tmp_path / "killed"
    config_file = tmp_path / "tiny.py"
    config_file.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT / 'tests')!r})\nfrom conftest import tiny_config as get_config\n"
    )
    arguments = [sys.executable, "-m", "lidit_jax.main", f"--config={config_file}", f"--workdir={workdir}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def start():
        return subprocess.Popen(arguments, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)

    for moment in ("vae 2/3", "lidit 3/6"):
        process = start()
        for line in process.stderr:
            if line.startswith(moment):
                process.send_signal(signal.SIGKILL)
                break
        process.wait()
        time.sleep(0.1)
    process = start()
    output = process.stderr.read()
    assert process.wait() == 0, output

    for weights in ("params", "ema"):
        whole, _ = load_weights(trained_workdir / CHECKPOINTS, weights)
        resumed, _ = load_weights(workdir / CHECKPOINTS, weights)
        jax.tree.map(np.testing.assert_array_equal, whole, resumed)

    def losses(folder):
        lines = (epath.Path(folder) / "training/lidit/metrics.jsonl").read_text().splitlines()
        return {entry["step"]: entry["loss"] for entry in map(json.loads, lines)}

    assert losses(workdir) == losses(trained_workdir)


@pytest.mark.skipif(not (ROOT.parent / "shared/data/fxemoji").is_dir(), reason="needs ../shared/data/fxemoji")
@pytest.mark.slow
def test_the_emoji_config_trains_on_tar_shards_in_several_buckets(tmp_path):
    config, tiny = load_config("emoji"), tiny_config()
    config.data.update(path=str(ROOT.parent / "shared/data/fxemoji"), index_dir=str(tmp_path / "indexes"))
    for name in config.encoders:
        config.encoders[name] = tiny.encoders.llama.copy_and_resolve_references()
    config.vae.model.update(tiny.vae.model)
    config.vae.train.update(tiny.vae.train)
    config.model.update(tiny.model)
    config.train.update(steps=12, batch_size=8, sample_every=0, log_every=1)
    config.sample.update(tiny.sample)
    run_stages(config, epath.Path(tmp_path / "run"))
    sample_to_folder(Request(epath.Path(tmp_path / "run"), epath.Path(tmp_path / "out"), prompt="bear face"))
    assert Image.open(tmp_path / "out/00000.png").size == (64, 64)
