"""The Colab notebook, run from top to bottom at toy size, and the attention maps in it."""

import ast
import base64
import io

import flax.linen as nn
import jax
import jax.numpy as jnp
import nbclient
import nbformat
import numpy as np
import pytest
from conftest import ROOT, tiny_config
from flax.traverse_util import flatten_dict
from PIL import Image

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


def images(cell):
    """Returns the images that a cell displays."""
    found = (output.get("data", {}).get("image/png") for output in cell.outputs)
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in found if data]
