"""Sections of a config become dataclasses once, with the sections within them."""

import dataclasses
import re
import subprocess
import sys

import pytest
from conftest import ROOT, load_config, tiny_config
from etils import epath
from ml_collections import ConfigDict

from lidit_jax import config as config_module
from lidit_jax.config import build, flatten
from lidit_jax.data.data_config import DataConfig
from lidit_jax.errors import UserError
from lidit_jax.experiment import Experiment
from lidit_jax.models.llm import LLMConfig
from lidit_jax.models.vae_config import VAEConfig
from lidit_jax.models.vae_section import VAESectionConfig
from lidit_jax.print_config import format_config, marked_keys
from lidit_jax.text.load_encoder import EncoderConfig
from lidit_jax.train_config import TrainConfig

TRAIN = {"steps": 3, "batch_size": 8, "learning_rate": 1e-3}


def test_sections_within_a_section_become_the_dataclasses_of_its_fields():
    section = ConfigDict({"model": {"block_out_channels": [32, 64]}, "train": TRAIN, "adversarial": {"weight": 0.5}})
    vae = build(VAESectionConfig, section, "vae")
    assert vae.model == VAEConfig(block_out_channels=(32, 64)) and vae.train == TrainConfig(**TRAIN)
    assert vae.adversarial.weight == 0.5 and vae.perceptual.weights == "" and vae.evaluate is None


def test_a_section_that_is_absent_or_null_stays_none():
    assert build(VAESectionConfig, {}, "vae").train is None
    assert build(VAESectionConfig, {"train": None}, "vae").train is None


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"train": TRAIN | {"step": 3}}, "config key vae.train.step is unknown; did you mean 'steps'?"),
        ({"train": {"steps": 3}}, "config key vae.train.batch_size is missing"),
        ({"train": TRAIN | {"steps": "3"}}, "config key vae.train.steps is '3': it must be of type int"),
        ({"train": TRAIN | {"steps": 0}}, "vae.train.steps=0 must be at least 1"),
        ({"train": 3}, "config key vae.train is 3: it must be of type dict or null"),
        ({"adversarial": {"layers": 0}}, "vae.adversarial.layers=0 must be from 1 to 8"),
        ({"evaluate": {"sheet": 0}}, "vae.evaluate.sheet=0 must be at least 1"),
        ({"model": {"block_out_channels": (8, 16)}}, "vae.model.block_out_channels is (8, 16); it must be multiples"),
        ({"perceptual": None}, "config key vae.perceptual is None: it must be of type dict"),
        ({"perceptual": {1: 2}}, "config key vae.perceptual.1 is unknown; known are weights, "),
    ],
)
def test_errors_name_the_whole_key(section, words):
    with pytest.raises(UserError) as error:
        build(VAESectionConfig, section, "vae")
    assert str(error.value).startswith(words)


def test_errors_of_an_encoder_name_its_entry():
    with pytest.raises(UserError, match="^encoders.qwen.family='gpt': use one of llama, qwen2"):
        build(EncoderConfig, {"family": "gpt"}, "encoders.qwen")
    with pytest.raises(UserError, match="^encoders.qwen.dtype='float16' is not supported"):
        build(EncoderConfig, {"dtype": "float16"}, "encoders.qwen")


def test_a_dtype_of_an_llm_that_its_encoder_would_ignore_is_rejected():
    sizes = load_config("shapes").encoders.qwen.model
    with pytest.raises(UserError, match="^encoders.qwen.model: leave out dtype='text'; that of the encoder, 'float32'"):
        build(EncoderConfig, {"dtype": "float32", "model": {**sizes, "dtype": "text"}}, "encoders.qwen")
    for dtype in (LLMConfig.dtype, "float32"):  # a workdir's config.json states the default
        built = build(EncoderConfig, {"dtype": "float32", "model": {**sizes, "dtype": dtype}}, "encoders.qwen")
        assert built.language_model.dtype == "float32"


def test_an_llm_to_train_has_the_biases_of_its_family():
    sizes = load_config("shapes").encoders.qwen.model
    qwen = build(EncoderConfig, {"family": "qwen2", "dtype": "float32", "model": sizes}, "encoders.qwen")
    assert qwen.language_model == LLMConfig(**sizes, attention_bias=True, dtype="float32")


def test_an_experiment_builds_each_section_once(tmp_path, monkeypatch):
    built = []

    def counted(cls, values, where, **more):
        built.append(where)
        return build(cls, values, where, **more)

    monkeypatch.setattr(config_module, "build", counted)
    monkeypatch.setattr("lidit_jax.experiment.build", counted)
    experiment = Experiment(tiny_config(), epath.Path(tmp_path))
    before = sorted(built)
    assert len(before) == len(set(before)) and {"vae.model", "vae.train", "encoders.llama.train"} <= set(before)
    experiment.trainings(), experiment.size_multiple(), experiment.check_image_sizes(64)
    assert dataclasses.is_dataclass(experiment.encoders["llama"].language_model)
    assert sorted(built) == before


@pytest.mark.parametrize("seed", [-1, 2**32, 0.5, "0", None])
def test_a_seed_that_would_not_count_in_full_is_rejected(seed):
    config = tiny_config()
    with config.ignore_type():
        config.seed = seed
    with pytest.raises(UserError, match=f"^seed={seed!r} must be (an integer|from 0 to 4294967295)$"):
        Experiment(config, epath.Path("unused"))


# --- configs that start from another, and where a value comes from ------------------------------------------------


def test_10b_differs_from_1b_only_in_what_its_file_states():
    small, large = (flatten(load_config(name)) for name in ("1b", "10b"))
    differing = {key for key in small | large if small.get(key) != large.get(key)}
    assert differing == {
        *("mesh.data", "data.resolution", "data.min_side", "model.depth", "model.hidden_size", "model.num_heads"),
        *("model.position_grid", "train.steps", "train.batch_size", "text.num_lengths", "model.remat"),
    }


def test_the_papers_values_are_marked():
    config_1b = {
        *("data.resolution", "data.min_aesthetic", "data.drop_low_quality_captions", "text.instruction"),
        *("vae.model.latent_channels", "model.depth", "model.hidden_size", "model.num_heads", "model.patch_size"),
        *("model.latent_channels", "model.refiner_blocks", "model.refiner_gated", "model.refiner_causal"),
        *("model.fusion", "model.collaborative_blocks", "model.dtype", "diffusion.name", "diffusion.prediction"),
        *("train.steps", "train.batch_size", "encoders.llama3.model", "encoders.qwen.model"),
    }
    assert marked_keys(ROOT / "configs/1b.py") == config_1b == marked_keys(ROOT / "configs/10b.py")
    # Fine-tuning at 1024 px: the paper states neither its target nor its length.
    changed = {"diffusion.prediction", "train.steps"}
    assert marked_keys(ROOT / "configs/10b_1024.py") == config_1b - changed


def test_every_field_is_printed_with_its_source():
    config = load_config("10b")
    config.train.batch_size = 64
    printed = format_config(config, ROOT / "configs/10b.py", ["train.batch_size"])
    rows = {line.split()[0]: line.split() for line in printed.splitlines()}
    assert rows["model.depth"] == ["model.depth", "48", "paper"]
    assert rows["mesh.data"] == ["mesh.data", "8", "ours"]
    assert rows["mesh.tensor"] == ["mesh.tensor", "1", "default"]
    assert rows["encoders.llama3.model.hidden_size"] == ["encoders.llama3.model.hidden_size", "4096", "paper"]
    assert rows["train.batch_size"] == ["train.batch_size", "64", "command", "line"]
    assert rows["data.num_threads"] == ["data.num_threads", str(DataConfig.num_threads), "default"]
    assert rows["data.path"][1] == "''"
    assert rows["encoders.qwen.model.attention_bias"][1] == "True"
    assert set(flatten(config)) <= set(rows)


def test_numbers_of_llava_are_named_so():
    rows = [line.split() for line in format_config(load_config("llava"), ROOT / "configs/llava.py", []).splitlines()]
    sources = {row[0]: row[-1] for row in rows}
    for key in ("align.train.learning_rate", "tune.train.batch_size", "tune.train.schedule", "align.data.resolution"):
        assert sources[f"llava.{key}"] == "LLaVA"
    assert (sources["llava.align.max_length"], sources["llava.remat"], sources["seed"]) == ("ours", "default", "ours")


@pytest.mark.parametrize("name", ["shapes", "scenes", "emoji", "vae", "ablation", "llava"])
def test_every_config_can_be_printed(name):
    argument = ["table2_collaborative_refiner"] if name == "ablation" else []
    config = load_config(name, *argument)
    if name == "ablation":
        for encoder in config.encoders.values():
            encoder.weights = "somewhere"
        config.vae.weights = "somewhere"
    assert set(flatten(config)) <= {
        line.split()[0] for line in format_config(config, ROOT / f"configs/{name}.py", []).splitlines()
    }


def test_print_config_prints_and_trains_nothing(tmp_path):
    command = [sys.executable, "-m", "lidit_jax.main", "--config=configs/scenes.py:128", "--print_config"]
    done = subprocess.run(
        [*command, "--config.train.steps=7", f"--workdir={tmp_path / 'run'}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^train\.steps +7 +command line$", done.stdout, re.MULTILINE)
    assert re.search(r"^data\.resolution +128 +ours$", done.stdout, re.MULTILINE)
    assert not (tmp_path / "run").exists()
