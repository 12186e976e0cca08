"""The Colab notebook, run from top to bottom at toy size, and the attention maps in it."""

import ast
import base64
import glob
import importlib.metadata
import io
import logging
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import nbclient
import nbformat
import numpy as np
import pytest
from conftest import ROOT, tiny_config
from flax.traverse_util import flatten_dict
from IPython.core.inputtransformer2 import TransformerManager
from PIL import Image

from lidit_jax.errors import UserError
from lidit_jax.models.layers import Attention, LayerConfig
from lidit_jax.models.lidit import TextCondition, TextFeatures
from lidit_jax.models.lidit_config import LIDiTConfig
from lidit_jax.sample.attention_maps import attention_maps

NOTEBOOK = ROOT / "launch" / "colab.ipynb"
HEADS, WIDTH = 2, 16


def normal(seed, shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def random_params(module, *inputs):
    """Returns random parameters of the module; none is zero, so that every gate is open."""
    shapes = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), *inputs))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(0.5 * rng.normal(size=leaf.shape), leaf.dtype), shapes)


def text_features(seed, prefix):
    """Returns random features of two prompts, the second with two tokens of padding."""
    mask = jnp.asarray([[True] * 5, [True] * 3 + [False] * 2])
    return TextFeatures(normal(seed, (prefix, 12)), normal(seed + 1, (2, 5, 12)), mask)


def text_condition(**changes):
    config = LIDiTConfig(depth=1, hidden_size=WIDTH, num_heads=HEADS, dtype="float32", attention="xla", **changes)
    return TextCondition(config), ([text_features(0, prefix=3), text_features(10, prefix=2)], normal(20, (2, WIDTH)))


def assert_maps_make_the_outputs(module, params, inputs, maps):
    """Checks that maps times values, after the output projection, equal the outputs of the attentions."""
    _, captured = module.apply({"params": params}, *inputs, capture_intermediates=True)
    captured, params = flatten_dict(captured["intermediates"], sep="/"), flatten_dict(params, sep="/")
    queries = (name.removesuffix("query/kernel") for name in params if name.endswith("query/kernel"))
    assert maps.keys() == {name.rstrip("/") for name in queries}
    for path, weights in maps.items():
        start = f"{path}/" if path else ""
        (values,), (output,) = captured[f"{start}value/__call__"], captured[f"{start}__call__"]
        values = values.reshape(*values.shape[:2], HEADS, -1)
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, values).reshape(output.shape)
        y = y @ params[f"{start}out/kernel"] + params[f"{start}out/bias"]
        np.testing.assert_allclose(y, output, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"refiner_causal": True}, {"refiner_rotary": False}], ids=str)
def test_attention_maps_are_those_of_the_model(changes):
    module, inputs = text_condition(**changes)
    params = random_params(module, *inputs)
    maps = attention_maps(module, params, *inputs)
    assert len(maps) == 2 * 2 + 2  # two LTR blocks and one CR branch for each of two LLMs
    assert_maps_make_the_outputs(module, params, inputs, maps)


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_attention_maps_have_the_lengths_and_head_sizes_of_the_real_configs(remat):
    """A prefix of 64 tokens, prompts of 256, heads of 72 as in 1b.py, and rematerialised blocks."""
    mask = jnp.arange(256) < jnp.asarray([[256], [20]])
    text = [TextFeatures(normal(i, (64, 24)), normal(i + 2, (2, 256, 24)), mask) for i in range(2)]
    module = TextCondition(LIDiTConfig(depth=1, hidden_size=144, num_heads=2, dtype="float32", remat=remat))
    inputs = text, normal(20, (2, 144))
    maps = attention_maps(module, random_params(module, *inputs), *inputs)
    assert len(maps) == 6
    for weights in maps.values():
        assert weights.shape == (2, 2, 320, 320)
        np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-4)
        assert not weights[1, ..., 64 + 20 :].any()


def test_attention_maps_take_normalised_queries_and_a_context():
    module, inputs = Attention(LayerConfig(HEADS, qk_norm=True)), (normal(0, (2, 4, WIDTH)), normal(1, (2, 3, WIDTH)))
    params = random_params(module, *inputs)
    maps = attention_maps(module, params, *inputs)
    assert_maps_make_the_outputs(module, params, inputs, maps)


def test_attention_maps_have_rows_of_sum_one_and_nothing_on_padding():
    module, inputs = text_condition()
    maps = attention_maps(module, random_params(module, *inputs), *inputs)
    for weights in maps.values():
        np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-5)
        assert not weights[1, ..., -2:].any()
    own = maps["token_refiner_0/block_0/attention"]
    assert own.shape == (2, HEADS, 8, 8)
    assert (own[0, :, 0, 1:] > 0).all(), "the first token looks at all later ones"
    assert maps["collaborative_refiner/block_0_branch_0/cross_attention"].shape == (2, HEADS, 8, 7)


def test_the_notebook_is_valid_and_holds_no_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs
            assert cell.execution_count is None


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Returns a function that runs the install cell in `folder`; it returns the arguments of pip, or None."""

    def run(folder, *, repository="", installed=False, tpu=False, driver="", upgraded=()):
        source = TransformerManager().transform_cell(cell_with("install").source)
        assert 'REPOSITORY = ""' in source
        arguments, version = [], importlib.metadata.version

        def version_of(package):
            if package == "lidit-jax" and not (installed or arguments):
                raise importlib.metadata.PackageNotFoundError(package)
            return "0" if package in upgraded else version(package)

        def pip(magic, line):
            assert magic == "pip"
            arguments.extend(shlex.split(line.format(**namespace)))

        programs = Path(tempfile.mkdtemp(dir=tmp_path))
        if driver:
            (programs / "nvidia-smi").write_text(f"#!/bin/sh\necho {driver}\n")
            (programs / "nvidia-smi").chmod(0o755)
        (programs / "git").symlink_to(shutil.which("git"))
        monkeypatch.setenv("PATH", str(programs))
        monkeypatch.setattr(glob, "glob", lambda pattern: [pattern] if tpu else [])
        monkeypatch.setattr(importlib.metadata, "version", version_of)
        monkeypatch.setattr(sys, "path", [*sys.path])
        monkeypatch.chdir(folder)
        namespace = {"get_ipython": lambda: SimpleNamespace(run_line_magic=pip)}
        with warnings.catch_warnings():
            exec(source.replace('REPOSITORY = ""', f"REPOSITORY = {repository!r}"), namespace)
        return arguments or None

    return run


def cell_with(tag):
    [cell] = [cell for cell in nbformat.read(NOTEBOOK, 4).cells if tag in cell.metadata.get("tags", ())]
    return cell


def make_checkout(folder):
    (folder / "lidit_jax").mkdir(parents=True)
    (folder / "launch").mkdir()
    for name in ("lidit_jax/__init__.py", "launch/colab.ipynb", "setup.py"):
        (folder / name).touch()
    return folder


@pytest.mark.parametrize(
    ("machine", "requirement"),
    [
        ({}, "jax"),
        ({"tpu": True}, "jax[tpu]"),
        ({"driver": "580.65.06"}, "jax[cuda13]"),
        ({"driver": "550.54.15"}, "jax[cuda12]"),
    ],
    ids=str,
)
def test_the_checkout_around_the_notebook_is_installed_with_the_jax_of_the_machine(
    install, tmp_path, machine, requirement
):
    checkout = make_checkout(tmp_path / "a checkout")
    arguments = install(checkout / "launch", **machine)
    assert arguments == ["install", "--editable", str(checkout), requirement, "matplotlib"]
    assert sys.path[0] == str(checkout)


def test_an_installed_package_is_used_as_it_is(install, tmp_path):
    assert install(tmp_path, installed=True) is None


def test_outside_of_a_checkout_the_repository_is_cloned(install, tmp_path):
    repository = make_checkout(tmp_path / "repository")
    git = ["git", "-C", str(repository), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--message=a"]):
        subprocess.run([*git, *command], check=True)
    (tmp_path / "content").mkdir()
    arguments = install(tmp_path / "content", repository=str(repository))
    assert arguments[2] == str(tmp_path / "content" / "lidit-jax")
    assert (tmp_path / "content" / "lidit-jax" / "launch" / "colab.ipynb").exists()


@pytest.mark.parametrize(
    ("repository", "message"),
    [("", "^Set REPOSITORY, in this cell, to the git URL"), ("nowhere", "^nowhere could not be cloned .*nowhere")],
)
def test_without_the_code_the_notebook_stops_with_one_line(install, tmp_path, repository, message):
    with pytest.raises(Exception, match=message) as error:
        install(tmp_path, repository=repository)
    [line] = error.value._render_traceback_()
    assert "\n" not in line


@pytest.fixture
def upload(monkeypatch, tmp_path):
    """Returns a function that stands in for Colab's upload of `files`, which lie in the current folder afterwards."""

    def answer(*files):
        colab = SimpleNamespace(files=SimpleNamespace(upload=lambda: {str(file): b"" for file in files}))
        monkeypatch.setitem(sys.modules, "google.colab", colab)
        (tmp_path / "content").mkdir(exist_ok=True)
        return tmp_path / "content"

    return answer


@pytest.mark.parametrize("kind", ["zip", "gztar"])
@pytest.mark.parametrize("inner", ["repository", "."])
def test_in_colab_the_code_is_uploaded_once(install, upload, tmp_path, kind, inner):
    make_checkout(tmp_path / "archive" / "repository")
    root = tmp_path / "archive" / ("" if inner == "repository" else "repository")
    content = upload(shutil.make_archive(str(tmp_path / "lidit-jax"), kind, root))
    code = content / "lidit-jax"
    assert install(content)[2] == str(code)
    assert (code / "launch" / "colab.ipynb").exists()
    assert [path.name for path in content.iterdir()] == ["lidit-jax"]
    upload()  # a second run of the cell, after a restart, must not ask again
    assert install(content)[2] == str(code)


def test_an_upload_without_the_code_stops_with_one_line_and_leaves_nothing(install, upload, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    whole = Path(shutil.make_archive(str(tmp_path / "other"), "zip", tmp_path / "other"))
    cut = tmp_path / "cut.tar.gz"
    cut.write_bytes(Path(shutil.make_archive(str(tmp_path / "all"), "gztar", tmp_path / "other")).read_bytes()[:20])
    damaged = tmp_path / "damaged.zip"
    damaged.write_bytes(b"PK\x03\x04 and nothing more")
    for files, message in {
        (): "^0 files were uploaded instead of one",
        (whole, cut): "^2 files were uploaded",
        (whole,): "other.zip holds no lidit_jax/",
        (cut,): "cut.tar.gz could not be unpacked",
        (damaged,): "damaged.zip could not be unpacked",
    }.items():
        content = upload(*files)
        with pytest.raises(Exception, match=message) as error:
            install(content)
        assert len(error.value._render_traceback_()) == 1
        assert list(content.iterdir()) == []
    (content / "lidit-jax").mkdir()
    with pytest.raises(Exception, match="lidit-jax exists and is no checkout"):
        install(content)


def test_a_package_that_was_imported_before_its_upgrade_needs_a_restart(install, tmp_path):
    with pytest.raises(Exception, match="^numpy was upgraded: choose Runtime > Restart session, then run all cells"):
        install(make_checkout(tmp_path / "checkout"), upgraded=("numpy",))


@pytest.mark.parametrize("keep", [False, True])
def test_the_run_is_kept_on_drive_if_the_user_agrees(monkeypatch, keep):
    mounted = []
    monkeypatch.setitem(sys.modules, "google.colab", SimpleNamespace(drive=SimpleNamespace(mount=mounted.append)))
    namespace = {"WORKDIR": "runs/shapes", "KEEP_ON_DRIVE": keep}
    exec(cell_with("workdir").source, namespace)
    drive = "/content/drive/MyDrive/lidit-jax/"
    assert str(namespace["workdir"]) == f"{drive if keep else ''}runs/shapes"
    assert mounted == ["/content/drive"] * keep


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"train.steps": 3, "evaluate": None, "vae.model.block_out_channels": (8, 8, 16, 16)}, None),
        ({"train.step": 3}, "config key train.step is unknown; did you mean 'steps'"),
        ({"trian.steps": 3}, "config key trian is unknown; did you mean 'train'"),
        ({"train.steps": "x"}, "config key train.steps"),
    ],
    ids=str,
)
def test_changes_are_checked_like_those_of_the_command_line(monkeypatch, changes, error):
    runs = []
    monkeypatch.setattr("lidit_jax.stages.run.run_stages", lambda config, workdir: runs.append(config))
    monkeypatch.setattr(logging, "basicConfig", lambda **options: None)
    namespace = {"CHANGES": changes, "workdir": None}
    if error:
        with pytest.raises(UserError, match=error) as caught:
            exec(cell_with("train").source, namespace)
        [line] = caught.value._render_traceback_()
        assert line == f"error: {caught.value}"
    else:
        exec(cell_with("train").source, namespace)
        assert (runs[0].train.steps, runs[0].vae.model.block_out_channels) == (3, (8, 8, 16, 16))
        assert "evaluate" not in runs[0]


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    config = tiny_config()
    config.train.sample_every = 3
    changes = {
        "WORKDIR": str(tmp_path / "run"),
        "CHANGES": flatten_dict(config.to_dict(), sep="."),
        "SEEDS": [0, 1],
        "STEPS": 2,
    }
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (place,) = (i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ()))
    known = {target.id for line in ast.parse(notebook.cells[place].source).body for target in line.targets}
    assert changes.keys() <= known
    injected = "\n".join(f"{name} = {value!r}" for name, value in changes.items())
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(injected))

    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))  # ignore the user's own start-up files
    nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()  # raises if a cell raises

    printed = {cell.id: text(cell) for cell in notebook.cells if cell.cell_type == "code"}
    assert "is installed" in printed["install"]
    assert "lidit 6/6 (100%)" in printed["train"]
    assert not [name for name, lines in printed.items() if "Warning" in lines]
    shown = {cell.id: images(cell) for cell in notebook.cells if cell.cell_type == "code"}
    assert {name: len(found) for name, found in shown.items() if found} == {
        "progress": 2,
        "draw": 1,
        "token_refiner": 1,
        "collaborative": 1,
    }
    for found in shown.values():
        for image in found:
            assert min(image.size) > 100
            assert np.asarray(image.convert("L")).std() > 5, "it is blank"


def text(cell):
    """Returns what a cell prints."""
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def images(cell):
    """Returns the images that a cell displays."""
    found = (output.get("data", {}).get("image/png") for output in cell.outputs)
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in found if data]
