"""Loading an exported folder: sampling from it, and training that starts from it."""

import json
import logging

import jax
import numpy as np
import pytest
from conftest import tiny_config
from etils import epath
from PIL import Image

from lidit_jax.checkpoint_weights import load_weights
from lidit_jax.errors import UserError
from lidit_jax.export import write
from lidit_jax.export.read import load_exported, start_from_exported
from lidit_jax.sample.generate import Request, sample_to_folder
from lidit_jax.stages.run import run_stages

CHECKPOINTS = "training/lidit/checkpoints"


@pytest.fixture(scope="module")
def exported(trained_workdir, tmp_path_factory):
    folder = epath.Path(tmp_path_factory.mktemp("exported") / "folder")
    write.export(write.Request(trained_workdir, folder))
    return folder


def config_of_a_run():
    config = tiny_config()
    config.start_from = ""
    del config.evaluate
    config.train.update(steps=1, learning_rate=1e-12)
    return config


def test_the_weights_are_bit_identical(trained_workdir, exported):
    params = load_exported(exported).params
    expected, _ = load_weights(trained_workdir / CHECKPOINTS, "ema")
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_a_folder_and_its_run_give_the_same_images(trained_workdir, exported, tmp_path):
    asked = {"prompt": "a red circle", "num_images": 2, "steps": 3}
    sample_to_folder(Request(epath.Path(trained_workdir), epath.Path(tmp_path / "run"), **asked))
    sample_to_folder(Request(None, epath.Path(tmp_path / "folder"), from_torch=exported, **asked))
    for name in ("00000.png", "00001.png"):
        of_run, of_folder = (np.asarray(Image.open(tmp_path / of / name)) for of in ("run", "folder"))
        np.testing.assert_array_equal(of_run, of_folder)


def test_a_run_starts_from_a_folder(trained_workdir, exported, tmp_path):
    workdir = epath.Path(tmp_path / "run")
    config = start_from_exported(config_of_a_run(), exported)
    run_stages(config, workdir)
    assert not (workdir / "encoders").exists() and not (workdir / "vae").exists()  # those of the export are used
    got, step = load_weights(workdir / CHECKPOINTS, "params")
    expected, _ = load_weights(trained_workdir / CHECKPOINTS, "ema")
    assert step == 1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, expected)


def test_weights_that_the_config_names_are_kept(exported, trained_workdir):
    config = config_of_a_run()
    config.vae.weights = str(trained_workdir / "vae")
    started = start_from_exported(config, exported)
    assert started.vae.weights == str(trained_workdir / "vae")
    assert started.encoders.llama.weights == str(exported / "text_encoder")
    assert config.start_from == ""  # the given config is not modified


def test_other_models_are_rejected(exported):
    config = config_of_a_run()
    config.model.depth = 3
    with pytest.raises(UserError, match=r"config key model\.depth is 3, in .* it is 2: give --config\.model\.depth=2"):
        start_from_exported(config, exported)
    config = config_of_a_run()
    config.encoders.other = config.encoders.llama
    with pytest.raises(UserError, match="the config's encoders are llama, other, qwen, those of .* are llama, qwen"):
        start_from_exported(config, exported)


def test_another_objective_is_logged(exported, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("lidit_jax"), "propagate", True)
    config = config_of_a_run()
    config.diffusion.shift = 2.0
    start_from_exported(config, exported)
    assert "was trained with diffusion.shift=" in caplog.text


@pytest.mark.parametrize("start", ["nothing", "empty"])
def test_a_missing_start_is_reported_before_anything_is_trained(tmp_path, start):
    (tmp_path / "empty").mkdir()
    config = config_of_a_run()
    config.start_from = str(tmp_path / start)
    with pytest.raises(UserError, match="no finished checkpoint there"):
        run_stages(config, epath.Path(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_other_folders_are_rejected(exported, tmp_path):
    with pytest.raises(UserError, match=r"the folder has no model_index\.json"):
        load_exported(epath.Path(tmp_path))
    out = epath.Path(tmp_path / "out")
    with pytest.raises(UserError, match="give either --workdir=DIR of a training run or --from_torch=DIR of an export"):
        sample_to_folder(Request(epath.Path(tmp_path), out, from_torch=exported, prompt="x"))
    for option in ({"weights": "params"}, {"encoders": {"llama": "x"}}, {"vae": "x"}):
        with pytest.raises(UserError, match="go with --workdir: an export has its own weights"):
            sample_to_folder(Request(None, out, from_torch=exported, prompt="x", **option))
    index = json.loads((exported / "model_index.json").read_text())
    index["lidit"]["format_version"] = 99
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="newer"):
        sample_to_folder(Request(None, out, from_torch=epath.Path(tmp_path), prompt="x"))
    assert not out.exists()
