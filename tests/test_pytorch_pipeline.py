"""The exported pipeline in PyTorch: the same images as in JAX, and the behaviour that users of diffusers expect."""

import ast
import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT
from diffusers import DiffusionPipeline
from diffusers.callbacks import PipelineCallback
from etils import epath
from random_workdirs import make_workdir, psnr, random_config, starting_noise

from lidit_jax import trained_model
from lidit_jax.diffusion.samplers import guided, sample
from lidit_jax.export.transformers_class import LLM_CLASSES, MULTIMODAL_CLASSES, T5_CLASSES
from lidit_jax.export.write import Request, export
from lidit_jax.pytorch import pipeline_lidit
from lidit_jax.text.encoders import encode, tokenize
from lidit_jax.text.prompts import PromptTokenizer
from lidit_jax.text.train_tokenizer import train_tokenizer

PROMPTS = ["a red circle", "", "红色圆形 above <|end|> a 😀 blue square that is much too long to fit"]
DDPM = {"name": "ddpm"}
V_ZERO_SNR = {"name": "ddpm", "prediction": "v", "zero_terminal_snr": True}
torch.set_num_threads(1)  # these models are too small to gain from threads
LEAST_PSNR = 60  # dB; with another prompt or seed it is below 30
# Generates the images of all jobs in a file, in a process that cannot import JAX.
WITHOUT_JAX = """
import importlib.abc, json, sys

class NoJax(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("jax", "jaxlib", "flax", "lidit_jax", "ml_collections", "orbax"):
            raise ImportError(f"{name} is not here")

sys.meta_path.insert(0, NoJax())
import numpy as np, torch
from diffusers import DiffusionPipeline

torch.set_num_threads(1)
for job in json.load(open(sys.argv[1])):
    pipe = DiffusionPipeline.from_pretrained(job["folder"], trust_remote_code=True, **job["load"])
    pipe.set_progress_bar_config(disable=True)
    latents = torch.from_numpy(np.load(job["latents"]))
    images = pipe(latents=latents, **job["call"]).images
    np.save(job["out"], np.stack([np.asarray(image) for image in images]))
assert not [name for name in sys.modules if name.split(".")[0] in ("jax", "flax", "lidit_jax")]
"""


def export_of(workdir, out, **options) -> Path:
    export(Request(workdir, epath.Path(out), **options))
    return Path(out)


def load(folder, **options):
    pipe = DiffusionPipeline.from_pretrained(str(folder), trust_remote_code=True, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Workdir of a model with two LLMs and rectified flow."""
    return make_workdir(tmp_path_factory.mktemp("run") / "two", random_config())


@pytest.fixture(scope="module")
def folder(workdir):
    return export_of(workdir, workdir / "../exported")


@pytest.fixture(scope="module")
def pipe(folder):
    return load(folder)


@pytest.fixture(scope="module")
def loaded(workdir):
    """The model in JAX: (experiment, pipeline, parameters)."""
    return load_on_one_device(workdir)


def load_on_one_device(workdir, weights="ema"):
    model = trained_model.load(workdir, weights, jax.devices()[:1])
    return model.experiment, model.pipeline, model.params


def generate_with_jax(loaded, prompts, height=32, width=32, **sampling):
    run, pipeline, params = loaded
    options = dataclasses.replace(run.sample, batch_size=len(prompts), **sampling)
    return pipeline(params, prompts, range(len(prompts)), height, width, options)


def seed(number):
    return torch.Generator().manual_seed(number)


def noise_for(loaded, count, height=32, width=32):
    return torch.tensor(starting_noise(range(count), height, width, loaded[0].vae_config))


def assert_same_images(ours, theirs):
    theirs = np.stack([np.asarray(image) for image in theirs])
    assert ours.shape == theirs.shape
    assert ours.std() > 20, "the images are flat"
    assert min(psnr(a, b) for a, b in zip(ours, theirs, strict=True)) >= LEAST_PSNR


# --- the same images -------------------------------------------------------------------------------------------------


def runs(t5_folder: Path):
    """Returns {name: (config, options of each export, height, width)}."""
    one = random_config(DDPM, "dpmpp_2m")
    del one.encoders.qwen
    t5 = random_config(V_ZERO_SNR, "ddim")
    t5.encoders = {
        "a_t5": {"weights": str(t5_folder), "dtype": "float32"},
        "llama": t5.encoders.llama.to_dict(),
        "z_t5": {"weights": str(t5_folder), "dtype": "float32"},
    }
    return {
        "euler, two LLMs": (random_config(), [{}], 32, 32),
        "heun, wide": (random_config(sampler="heun"), [{}], 32, 48),
        "dpmpp_2m, one LLM, tall": (one, [{"weights": "params"}], 48, 32),
        "ddim, two T5s and an LLM": (t5, [{}, {"text_encoders": "reference"}], 32, 32),
    }


def test_without_jax_the_same_noise_gives_the_same_images(tmp_path, t5_folder):
    """Covers every sampler but ddpm, which draws new noise at each step.

    `test_diffusers_scheduler` compares the steps of ddpm, given the same noise.
    """
    jobs, ours = [], []
    for name, (config, exports, height, width) in runs(t5_folder).items():
        workdir = make_workdir(tmp_path / name, config)
        loaded = load_on_one_device(workdir, exports[0].get("weights", "ema"))
        generated = generate_with_jax(loaded, PROMPTS, height, width)
        for options in exports:
            file = tmp_path / str(len(jobs))
            folder = export_of(workdir, tmp_path / f"folder{len(jobs)}", **options)
            np.save(f"{file}_noise.npy", noise_for(loaded, len(PROMPTS), height, width).numpy())
            custom = {"custom_pipeline": str(folder / "pipeline_lidit.py")} if len(jobs) % 2 else {}
            call = {"prompt": PROMPTS, "height": height, "width": width}
            files = {"latents": f"{file}_noise.npy", "out": f"{file}_images.npy"}
            jobs.append({"name": name, "folder": str(folder), "load": custom, "call": call, **files})
            ours.append(generated)
    generate_without_jax(tmp_path, jobs)
    for job, expected in zip(jobs, ours, strict=True):
        generated = np.load(job["out"])
        print(f"{job['name']}: {min(psnr(a, b) for a, b in zip(expected, generated, strict=True)):.1f} dB")
        assert_same_images(expected, generated)
        assert psnr(expected[0], expected[1]) < 30


def test_the_demo_after_a_few_steps_gives_the_same_images_without_jax(tmp_path, trained_workdir):
    loaded = load_on_one_device(trained_workdir)
    folder, noise = export_of(epath.Path(trained_workdir), tmp_path / "folder"), tmp_path / "noise.npy"
    np.save(noise, noise_for(loaded, len(PROMPTS)).numpy())
    call = {"prompt": PROMPTS, "num_inference_steps": 25}
    job = {"folder": str(folder), "load": {}, "call": call, "latents": str(noise), "out": str(tmp_path / "images.npy")}
    generate_without_jax(tmp_path, [job])
    assert_same_images(generate_with_jax(loaded, PROMPTS, steps=25), np.load(job["out"]))


def generate_without_jax(tmp_path, jobs):
    """Generates the images of the jobs in a process that cannot import JAX."""
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", WITHOUT_JAX, str(tmp_path / "jobs.json")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_without_guidance_the_images_are_those_of_the_prompt_alone(pipe, loaded):
    ours = generate_with_jax(loaded, PROMPTS, guidance_scale=1.0, steps=7)
    theirs = pipe(PROMPTS, latents=noise_for(loaded, 3), guidance_scale=1.0, num_inference_steps=7)
    assert_same_images(ours, theirs.images)


def test_the_latents_agree_before_they_are_decoded(pipe, loaded):
    run, pipeline, params = loaded
    noise = noise_for(loaded, 2)
    prompts = [*PROMPTS[:2], "", ""]
    text = encode(pipeline.encoders, pipeline.frozen["encoders"], tokenize(pipeline.encoders, prompts))
    predict = guided(lambda x, t: run.model.apply({"params": params}, x, t, text), 3.0)
    x = np.asarray(noise).transpose(0, 2, 3, 1)
    ours = jax.jit(lambda x: sample("euler", run.schedule, predict, x, 25))(x)
    theirs = pipe(PROMPTS[:2], latents=noise, output_type="latent").images
    ours = np.asarray(ours).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(theirs.numpy(), ours, rtol=0, atol=1e-3 * np.abs(ours).max())


def test_in_bfloat16_the_images_stay_close(folder, pipe, loaded):
    low = load(folder, dtype=torch.bfloat16)
    assert {x.dtype for x in (low.transformer, low.vae, low.text_encoder, low.text_encoder_2)} == {torch.bfloat16}
    noise = noise_for(loaded, 1)
    exact, near = (np.asarray(p("a red circle", latents=noise).images[0]) for p in (pipe, low))
    assert 20 < psnr(exact, near) < float("inf")


# --- prompts ---------------------------------------------------------------------------------------------------------


def byte_level():
    return train_tokenizer(["a red circle above a blue square", "Describe the objects:", "红色圆形"], 300)


def sentencepiece_like():
    """Returns a tokenizer that, like SentencePiece, prepends a space to every text and adds a begin token."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(["a red circle above a blue square", "Describe the objects:"], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


HARD_PROMPTS = [
    *(
        "",
        " ",
        "a",
        " a",
        "  two spaces",
        "tail ",
        "a red circle",
        "A RED CIRCLE",
        "红色圆形在蓝色方形上方",
        "😀👩‍👩‍👧 🇨🇳",
    ),
    *(
        "<|end|>",
        "a <|end|> b",
        "</s>",
        "<s>a</s>",
        "<unk>",
        "line\nbreak\ttab",
        "\x00",
        "ｆｕｌｌ　ｗｉｄｔｈ",
        "é e\u0301",
    ),
    *("half \ud83d of a pair", "العربية", "a red circle " * 40, "红" * 100, "<|end|>" * 30, "\u2028", "▁under"),
]


@pytest.mark.parametrize("make", [byte_level, sentencepiece_like])
@pytest.mark.parametrize("instruction", ["Describe the objects:", ""])
def test_prompts_have_the_tokens_of_training(make, instruction):
    ours = PromptTokenizer(make(), 12, instruction)
    facts = {"separator": ours.separator, "max_length": 12}
    expected = ours(HARD_PROMPTS)
    tokens, mask = pipeline_lidit.tokenize(ours.tokenizer, HARD_PROMPTS, facts)
    np.testing.assert_array_equal(tokens.numpy(), expected["tokens"])
    np.testing.assert_array_equal(mask.numpy(), expected["mask"])


def test_truncated_text_is_logged(pipe, caplog):
    with caplog.at_level(logging.WARNING):
        pipe.encode_prompt(["a red circle", "a red circle " * 5 + "and a green hexagon"])
    warnings = [record.getMessage() for record in caplog.records if "is ignored" in record.getMessage()]
    assert len(warnings) == 2  # one per encoder
    assert "and a green hexagon" in warnings[0]


def test_negative_prompts_are_one_for_all_or_one_per_prompt(pipe, loaded):
    noise = noise_for(loaded, 2)

    def generate(**options):
        return pipe(["red", "blue"], latents=noise, output_type="np", **options).images

    plain, same = generate(), generate(negative_prompt="")
    np.testing.assert_array_equal(plain, same)
    np.testing.assert_array_equal(generate(negative_prompt=None), same)
    for_all, each = generate(negative_prompt="a square"), generate(negative_prompt=["a square", ""])
    np.testing.assert_allclose(for_all[0], each[0], atol=1e-4)
    np.testing.assert_allclose(each[1], plain[1], atol=1e-4)
    assert np.abs(for_all[1] - plain[1]).max() > 0.01


def test_precomputed_features_give_the_same_images(pipe, loaded):
    noise = noise_for(loaded, 2)
    ready = {"prompt_embeds": pipe.encode_prompt(["red", "blue"]), "negative_prompt_embeds": pipe.encode_prompt("")}
    expected = pipe(["red", "blue"], latents=noise, output_type="np").images
    np.testing.assert_allclose(pipe(**ready, latents=noise, output_type="np").images, expected, atol=1e-5)


def test_without_encoders_precomputed_features_still_work(folder, pipe, loaded):
    nothing = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    bare = load(folder, **nothing)
    ready = {"prompt_embeds": pipe.encode_prompt("red"), "negative_prompt_embeds": pipe.encode_prompt("")}
    noise = noise_for(loaded, 1)
    expected = pipe("red", latents=noise, output_type="np").images
    np.testing.assert_allclose(bare(**ready, latents=noise, output_type="np").images, expected, atol=1e-5)
    with pytest.raises(ValueError, match="text_encoder is not loaded: .* or pass prompt_embeds"):
        bare("red")


# --- conventions of diffusers ----------------------------------------------------------------------------------------


def test_several_images_of_a_prompt_are_adjacent(pipe, loaded):
    noise = noise_for(loaded, 4)
    together = pipe(["red", "blue"], num_images_per_prompt=2, latents=noise, output_type="np").images
    assert len(together) == 4
    alone = pipe(["red", "red", "blue", "blue"], latents=noise, output_type="np").images
    np.testing.assert_allclose(together, alone, atol=1e-4)


def test_generators_make_images_reproducible(pipe):
    def generate(generator):
        return pipe(["red", "red"], generator=generator, output_type="np").images

    one = generate(seed(0))
    np.testing.assert_array_equal(one, generate(seed(0)))
    assert np.abs(one - generate(seed(1))).max() > 0.1
    listed = generate([seed(5), seed(6)])
    np.testing.assert_allclose(listed[1], pipe("red", generator=seed(6), output_type="np").images[0], atol=1e-4)
    with pytest.raises(ValueError, match="there are 3 generators for 2 images"):
        generate([seed(0), seed(1), seed(2)])


def test_the_ancestral_sampler_draws_its_noise_from_the_generator(tmp_path):
    config = random_config(DDPM, "ddpm")
    del config.encoders.qwen
    pipe = load(export_of(make_workdir(tmp_path / "run", config), tmp_path / "out"))
    call = {"latents": torch.zeros(1, 16, 4, 4), "output_type": "np", "num_inference_steps": 5}
    first, repeated, other = (pipe("red", generator=seed(n), **call).images for n in (0, 0, 1))
    np.testing.assert_array_equal(first, repeated)
    assert np.abs(first - other).max() > 0.01


@pytest.mark.parametrize(
    ("output_type", "kind", "shape"),
    [("np", np.ndarray, (2, 32, 48, 3)), ("pt", torch.Tensor, (2, 3, 32, 48)), ("latent", torch.Tensor, (2, 16, 4, 6))],
)
def test_output_types(pipe, output_type, kind, shape):
    images = pipe(["a", "b"], height=32, width=48, num_inference_steps=1, output_type=output_type).images
    assert isinstance(images, kind)
    assert tuple(images.shape) == shape
    [images] = pipe("a", height=32, width=48, num_inference_steps=1, return_dict=False)
    assert images[0].size == (48, 32)
    assert pipe("a", num_inference_steps=1).images[0].size == (32, 32)  # the training resolution


def test_callbacks_see_every_step_and_may_change_it_or_end_it(pipe):
    seen = []

    def watch(its_pipe, step, timestep, tensors):
        seen.append((step, float(timestep), sorted(tensors)))
        if step == 2:
            its_pipe._interrupt = True
        return {"latents": tensors["latents"] * 0}

    names = ["latents", "noise_pred"]
    call = {"num_inference_steps": 5, "output_type": "latent"}
    latents = pipe("a", callback_on_step_end=watch, callback_on_step_end_tensor_inputs=names, **call).images
    assert [step for step, *_ in seen] == [0, 1, 2]
    assert seen[0][1:] == (1000.0, names)
    assert not latents.any()

    class Halve(PipelineCallback):
        tensor_inputs = ["latents"]

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            return {"latents": callback_kwargs["latents"] / 2}

    halved = pipe("a", callback_on_step_end=Halve(1.0), generator=seed(0), **call).images
    assert (halved != pipe("a", generator=seed(0), **call).images).any()


def test_vae_slicing_and_tiling_can_be_switched(pipe):
    for name, switch in (("slicing", "use_slicing"), ("tiling", "use_tiling")):
        getattr(pipe, f"enable_vae_{name}")()
        assert getattr(pipe.vae, switch)
        getattr(pipe, f"disable_vae_{name}")()
        assert not getattr(pipe.vae, switch)


def test_another_scheduler_of_the_same_objective_works(folder):
    from diffusers import FlowMatchHeunDiscreteScheduler

    pipe = load(folder)
    pipe.scheduler = FlowMatchHeunDiscreteScheduler.from_config(pipe.scheduler.config)
    assert pipe("a", num_inference_steps=3, output_type="np").images.shape == (1, 32, 32, 3)


@pytest.mark.parametrize("by_reference", [False, True])
def test_a_loaded_pipeline_saves_all_of_its_components(workdir, tmp_path, by_reference):
    folder = export_of(workdir, tmp_path / "out")
    if by_reference:
        values = json.loads((folder / "model_index.json").read_text())
        elsewhere = tmp_path / "elsewhere"
        shutil.move(folder / "text_encoder", elsewhere)
        for file in (folder / "tokenizer").iterdir():
            shutil.copy(file, elsewhere)
        shutil.rmtree(folder / "tokenizer")
        values |= {"text_encoder": [None, None], "tokenizer": [None, None]}
        source = {"name": str(elsewhere), "revision": None, "class": "LlamaModel"}
        values["text_encoder_sources"] = {"text_encoder": source}
        (folder / "model_index.json").write_text(json.dumps(values))
    pipe = load(folder)
    pipe.save_pretrained(tmp_path / "saved")
    index = json.loads((tmp_path / "saved/model_index.json").read_text())
    assert index["text_encoder_sources"] == {}
    assert index["_class_name"] == ["pipeline_lidit", "LIDiTPipeline"]
    again = load(tmp_path / "saved")
    original, restored = (p("a red circle", generator=seed(0), output_type="np").images for p in (pipe, again))
    np.testing.assert_array_equal(restored, original)
    again.save_pretrained(tmp_path / "saved")  # overwrites the folder that it was loaded from


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "pass either prompt or prompt_embeds"),
        ({"prompt": "a", "prompt_embeds": ([], [], [])}, "pass either prompt or prompt_embeds"),
        ({"prompt": 3}, "prompt must be a string or a list of strings, not 3"),
        ({"prompt": []}, "prompt must be a string or a list of strings"),
        ({"prompt": ["a", None]}, "prompt must be a string or a list of strings"),
        ({"prompt": ["a", "b", "c"], "negative_prompt": ["x", "y"]}, "there are 2 negative prompts for 3 prompts"),
        ({"prompt_embeds": ([], [], [])}, "the output of encode_prompt, for 2 encoders"),
        ({"prompt": "a", "height": 40}, "height=40 is not a multiple of 16: use 32 or 48"),
        ({"prompt": "a", "width": 8}, "width=8 is not a multiple of 16: use 16 or 32"),
        ({"prompt": "a", "width": "32"}, "width='32' is not a multiple of 16"),
        ({"prompt": "a", "num_inference_steps": 0}, "num_inference_steps=0 must be an integer of at least 1"),
        ({"prompt": "a", "num_images_per_prompt": 0}, "num_images_per_prompt=0"),
        ({"prompt": "a", "output_type": "jpg"}, "output_type='jpg' is unknown: use one of pil, np, pt, latent"),
        ({"prompt": "a", "latents": torch.zeros(1, 4, 4, 16)}, r"latents have the shape .* need \(1, 16, 4, 4\)"),
        ({"prompt": "a", "callback_on_step_end_tensor_inputs": ["x"]}, "has 'x': use any of latents, noise_pred"),
    ],
)
def test_invalid_arguments_are_rejected_before_anything_runs(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format_version 2, its pipeline_lidit.py reads up to 1: use .* a newer lidit-jax"),
        ({"format_version": "1"}, "format_version '1'"),
        ({"encoders": None}, "no lidit object with encoders"),
        ({"encoders": []}, "lists 0 encoders"),
    ],
)
def test_a_folder_of_another_format_is_rejected(folder, tmp_path, changes, message):
    copy = shutil.copytree(folder, tmp_path / "copy")
    values = json.loads((copy / "model_index.json").read_text())
    values["lidit"] |= changes
    (copy / "model_index.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        load(copy)


def test_a_missing_encoder_is_named(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    values = json.loads((copy / "model_index.json").read_text())
    values["text_encoder"] = [None, None]
    values["text_encoder_sources"] = {"text_encoder": {"name": "/not/there", "revision": None, "class": "LlamaModel"}}
    (copy / "model_index.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="text_encoder is not in this folder but in /not/there, which does not exist"):
        load(copy)
    with pytest.raises(ValueError, match="text_encoder is not loaded"):
        load(copy, text_encoder_sources={})("a")


# --- the code --------------------------------------------------------------------------------------------------------


def test_the_classes_are_those_of_transformers_automodel():
    types = LLM_CLASSES | MULTIMODAL_CLASSES
    mapping = transformers.MODEL_MAPPING
    assert types == {name: mapping[transformers.CONFIG_MAPPING[name]].__name__ for name in types}
    for name in T5_CLASSES.values():
        assert hasattr(transformers, name)


def test_the_code_imports_pytorch_and_the_standard_library_alone():
    allowed = {"torch", "diffusers", "transformers", *sys.stdlib_module_names}
    for file in (ROOT / "lidit_jax/pytorch").glob("*_lidit.py"):
        imported = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{file}: a relative import"
                imported.add(node.module.split(".")[0])
        assert imported <= allowed, f"{file.name}: {imported - allowed}"
        assert "torch" in imported
