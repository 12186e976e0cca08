"""Shared fixtures, small configs, and what most test files use."""

import ctypes
import gc
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

import environment  # noqa: F401  must come before JAX is imported
import hypothesis
import numpy as np
import pytest
from ml_collections import ConfigDict

from lidit_jax.data.shapes.layout import sample_scene
from lidit_jax.data.shapes.scene import Scene
from lidit_jax.sample.image_list import png_text

# Examples have no deadline, so that tests do not fail on a slow or busy machine.
hypothesis.settings.register_profile("no_deadline", deadline=None)
hypothesis.settings.load_profile("no_deadline")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module", autouse=True)
def release_compiled_programs():
    """Drops the programs that a test file has compiled."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
        gc.collect()
        _return_memory()


@pytest.fixture(autouse=True)
def return_memory():
    """Keeps a worker below 2 GB: returns freed memory and, if that is not enough, drops compiled programs."""
    yield
    if _resident_bytes() > 1.5e9:
        _return_memory()
    if _resident_bytes() > 1.7e9 and "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
        gc.collect()
        _return_memory()


def _return_memory() -> None:
    """Returns freed memory to the system: the C library keeps what XLA's compiler has freed, several gigabytes."""
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def _resident_bytes() -> int:
    """Returns the memory of this process, which only Linux tells; 0 elsewhere."""
    file = Path("/proc/self/statm")
    return int(file.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if file.exists() else 0


def load_module(name: str) -> ModuleType:
    """Imports configs/NAME.py, whose name need not be a Python identifier."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_config(name: str, *argument: str) -> ConfigDict:
    """Returns the config of `--config=configs/NAME.py`."""
    return load_module(name).get_config(*argument)


def tiny_config() -> ConfigDict:
    """Returns the demo's config at minimal size: it trains in seconds, and its samples are noise."""
    config = load_config("shapes")
    config.data.num_examples = 1000
    config.text.max_length = 12
    for encoder in config.encoders.values():
        encoder.model.update(hidden_size=16, intermediate_size=32, num_hidden_layers=3, vocab_size=300)
        encoder.model.update(num_attention_heads=2, num_key_value_heads=1)
        encoder.train.update(steps=3, batch_size=8, log_every=1)
    config.vae.model.update(block_out_channels=(8, 8, 8, 8))
    config.vae.train.update(steps=3, batch_size=8, log_every=1)
    config.model.update(depth=2, hidden_size=16, num_heads=2, refiner_blocks=1, scan_unroll=1)
    config.train.update(steps=6, batch_size=8, log_every=1, checkpoint_every=2, sample_every=0, warmup_steps=2)
    config.sample.update(steps=2, batch_size=8, decode_tile=32)
    for section in (config.train, config.vae.train, *(encoder.train for encoder in config.encoders.values())):
        section.tensorboard = False  # TensorFlow takes seconds to import
    config.evaluate.update(two_objects=8, held_out_pairs=0, three_objects=0, four_objects=0)
    return config


def scene_of(seed: int, num_objects: int | None = None, pairs: str = "all") -> Scene:
    return sample_scene(np.random.default_rng(seed), num_objects, pairs)


def png_texts(count: int) -> list[dict[str, str]]:
    """Returns the texts of the PNG files of a prompt's images."""
    return [png_text("a prompt", seed, {"steps": 2}) for seed in range(count)]


DELETED = object()


def change_config(folder: Path, **changes) -> None:
    """Sets keys of a folder's config.json; the value `DELETED` removes a key."""
    values = json.loads((folder / "config.json").read_text()) | changes
    values = {key: value for key, value in values.items() if value is not DELETED}
    (folder / "config.json").write_text(json.dumps(values))


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory):
    """Folder of a tiny T5 encoder and its tokenizer, saved by transformers; shared, so tests must not modify it."""
    import torch
    import transformers

    from lidit_jax.text.train_tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("t5") / "tiny"
    sizes = {"vocab_size": 300, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    torch.manual_seed(0)
    transformers.T5EncoderModel(transformers.T5Config(**sizes)).save_pretrained(folder)
    train_tokenizer(["a red circle above a blue square", "Describe the objects:"], 300).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def trained_workdir(tmp_path_factory):
    """Workdir of a finished run of the tiny demo; shared by a worker's tests, which must not modify it."""
    from etils import epath
    from filelock import FileLock

    from lidit_jax.stages.run import run_stages

    # The first worker to come here trains it, into the folder of the test run.
    root = tmp_path_factory.getbasetemp()
    trained = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "trained_workdir"
    with FileLock(f"{trained}.lock"):
        if not trained.exists():
            unfinished = tmp_path_factory.mktemp("unfinished")
            run_stages(tiny_config(), epath.Path(unfinished))
            unfinished.rename(trained)
    workdir = tmp_path_factory.mktemp("trained") / "run"
    shutil.copytree(trained, workdir)
    return epath.Path(workdir)


@pytest.fixture(scope="session")
def vgg_tensors():
    """The tensors of `lpips.LPIPS(net="vgg").state_dict()`, with random values."""
    from lidit_jax.models.lpips import VGG16_LAYERS

    rng, tensors, channels = np.random.default_rng(0), {}, 3
    for index, layer in enumerate(VGG16_LAYERS):
        for number, width in layer:
            name = f"net.slice{index + 1}.{number}"
            scale = np.sqrt(2 / (9 * channels))
            tensors[f"{name}.weight"] = (scale * rng.normal(size=(width, channels, 3, 3))).astype(np.float32)
            tensors[f"{name}.bias"] = (0.05 * rng.normal(size=width)).astype(np.float32)
            channels = width
        tensors[f"lin{index}.model.1.weight"] = rng.uniform(size=(1, channels, 1, 1)).astype(np.float32)
    tensors["scaling_layer.shift"] = np.zeros((1, 3, 1, 1), np.float32)
    return tensors


@pytest.fixture(scope="session")
def lpips_file(vgg_tensors, tmp_path_factory):
    from safetensors.numpy import save_file

    file = tmp_path_factory.mktemp("lpips") / "vgg.safetensors"
    save_file(vgg_tensors, file)
    return file


@pytest.fixture(scope="session")
def stored(tmp_path_factory):
    """Data configs of the same images in every storage format."""
    from stored_data import data_of, write_array_records, write_folder, write_parquet, write_tars, write_tfds

    folder = tmp_path_factory.mktemp("stored")
    return {
        "tar": data_of("tar", write_tars(folder / "tar")),
        "embedded": data_of("parquet", write_parquet(folder / "embedded")),
        "array_record": data_of("array_record", write_array_records(folder / "records")),
        "tfds": data_of("tfds", write_tfds(folder / "tfds")),
        **{kind: data_of("folder", write_folder(folder / kind, kind)) for kind in ("jsonl", "csv", "parquet")},
    }
