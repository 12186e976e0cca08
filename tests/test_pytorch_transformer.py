"""LI-DiT in PyTorch computes the same function as the Flax model, and behaves like any model of diffusers."""

import dataclasses
import functools
import importlib.util
import subprocess
import sys
from pathlib import Path

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import ROOT

from lidit_jax.models.lidit import LIDiT, TextFeatures
from lidit_jax.models.lidit_config import LIDiTConfig
from lidit_jax.pytorch import transformer_lidit
from lidit_jax.pytorch.transformer_lidit import LIDiTTransformer2DModel
from lidit_jax.weights.diffusers_lidit import FIELDS, save_lidit, torch_tensors

FILE = Path(transformer_lidit.__file__)
TINY = LIDiTConfig(
    depth=2, hidden_size=16, num_heads=2, patch_size=2, latent_channels=3, refiner_blocks=1, dtype="float32"
)


@dataclasses.dataclass(frozen=True)
class Text:
    """Sizes of one LLM's features.

    Attributes:
      width: feature width.
      before: tokens of the prefix.
      length: tokens of the prompts.
      shared: whether all prompts share the features of the prefix.
    """

    width: int
    before: int
    length: int
    shared: bool = True


LLAMA, QWEN, T5 = Text(24, 3, 7), Text(10, 2, 5), Text(8, 4, 6, shared=False)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Uses one thread: on arrays this small, synchronising threads costs more than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_inputs(config, texts, height=4, width=6, batch=3):
    """Returns random NumPy (latents, timesteps, features) for Flax; the last prompt is empty, only an end token."""
    random = np.random.default_rng(0)
    normal = functools.partial(random.standard_normal, dtype=np.float32)
    features = []
    for text in texts:
        lengths = np.array([text.length, *random.integers(1, text.length + 1, batch - 2), 1])
        instruction = (text.before, text.width) if text.shared else (batch, text.before, text.width)
        mask = np.arange(text.length) < lengths[:, None]
        features.append(TextFeatures(normal(instruction), normal((batch, text.length, text.width)), mask))
    return normal((batch, height, width, config.latent_channels)), np.array([0.0, 421.5, 999.0], np.float32), features


def random_params(config, inputs):
    """Returns random parameters without the zeros of initial gates, made by NumPy since `init` would compile."""
    shapes = flax.linen.unbox(jax.eval_shape(LIDiT(config).init, jax.random.key(0), *inputs)["params"])
    random = np.random.default_rng(3)
    return jax.tree.map(lambda x: 0.2 * random.standard_normal(x.shape, np.float32), shapes)


def pytorch_state(config, params):
    flat = flax.traverse_util.flatten_dict(params)
    return {name: torch.tensor(np.ascontiguousarray(x)) for name, x in torch_tensors(config, flat)}


def pytorch_model(config, params, texts):
    fields = {name: getattr(config, name) for name in FIELDS}
    model = LIDiTTransformer2DModel(**fields, text_widths=[text.width for text in texts])
    model.load_state_dict(pytorch_state(config, params))
    return model


def pytorch_inputs(latents, timesteps, features, dtype=torch.float32):
    """Returns the keyword arguments of the PyTorch model, with channels-first latents."""
    return {
        "hidden_states": torch.from_numpy(latents).permute(0, 3, 1, 2).to(dtype),
        "timestep": torch.from_numpy(timesteps),
        "encoder_hidden_states": [torch.from_numpy(llm.prompt).to(dtype) for llm in features],
        "encoder_attention_mask": [torch.from_numpy(llm.mask) for llm in features],
        "instruction_hidden_states": [torch.from_numpy(llm.prefix).to(dtype) for llm in features],
    }


def assert_close(actual, expected, tolerance):
    """Compares up to a fraction of the largest absolute value."""
    expected = np.asarray(expected, np.float32)
    actual = actual.detach().float().numpy() if isinstance(actual, torch.Tensor) else np.asarray(actual)
    assert np.abs(expected).max() > 0
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.fixture(scope="module")
def tiny():
    """Flax inputs, Flax parameters and PyTorch model with two LLMs, shared by all tests: do not modify them."""
    inputs = random_inputs(TINY, [LLAMA, QWEN])
    params = random_params(TINY, inputs)
    return inputs, params, pytorch_model(TINY, params, [LLAMA, QWEN])


@pytest.fixture
def fresh(tiny):
    """PyTorch inputs and a model with the same weights, for tests that modify them."""
    inputs, params, _ = tiny
    return pytorch_inputs(*inputs), pytorch_model(TINY, params, [LLAMA, QWEN])


@pytest.mark.parametrize(
    ("texts", "changes", "height", "width"),
    [
        ([LLAMA], {}, 4, 4),
        ([LLAMA, QWEN], {}, 6, 2),
        ([LLAMA, QWEN, T5], {"collaborative_blocks": 2}, 4, 6),
        ([LLAMA, T5], {"fusion": "concatenate", "refiner_gated": False, "patch_size": 1}, 3, 5),
        ([LLAMA, Text(10, 0, 5)], {"refiner_rotary": False, "refiner_causal": True}, 2, 4),
        ([Text(10, 0, 1)], {"refiner_blocks": 0, "mlp_ratio": 2.5}, 2, 2),
        ([QWEN, T5], {"refiner_blocks": 2, "collaborative_blocks": 0, "refiner_causal": True}, 4, 4),
        ([LLAMA, QWEN], {"refiner_qk_norm": True, "position": "conv"}, 4, 6),
        ([LLAMA], {"position": "sincos", "position_grid": 3, "hidden_size": 18, "num_heads": 3}, 4, 6),
        ([LLAMA], {"position": "conv+sincos+rope", "position_grid": 5}, 4, 6),
        # Token grids and head sizes of the 1B and the 10B model.
        ([QWEN], {"position": "rope", "hidden_size": 144, "depth": 1}, 32, 32),
        ([QWEN], {"position": "sincos+rope", "hidden_size": 128, "depth": 1, "position_grid": 32}, 48, 80),
    ],
)
def test_predictions_are_those_of_flax(texts, changes, height, width):
    config = dataclasses.replace(TINY, **changes)
    inputs = random_inputs(config, texts, height, width)
    params = random_params(config, inputs)
    expected = jax.jit(LIDiT(config).apply)({"params": params}, *inputs)
    with torch.no_grad():
        actual = pytorch_model(config, params, texts)(**pytorch_inputs(*inputs)).sample
    assert_close(actual.permute(0, 2, 3, 1), expected, 1e-5)


def test_gradients_are_those_of_flax(tiny, fresh):
    inputs, params, _ = tiny
    target = np.random.default_rng(5).standard_normal(inputs[0].shape, np.float32)

    def loss(params):
        return jnp.mean((LIDiT(TINY).apply({"params": params}, *inputs) - target) ** 2)

    expected = pytorch_state(TINY, jax.device_get(jax.jit(jax.grad(loss))(params)))
    arguments, model = fresh
    loss_of(model, arguments, target).backward()
    for name, parameter in model.named_parameters():
        if "to_k.bias" in name and "dit" not in name:  # softmax ignores a constant added to all logits
            assert parameter.grad.abs().max() < 1e-6
        else:
            assert_close(parameter.grad, expected[name], 1e-3)


def loss_of(model, arguments, target):
    target = torch.from_numpy(target).permute(0, 3, 1, 2)
    return torch.nn.functional.mse_loss(model(**arguments, return_dict=False)[0].float(), target)


BLOCKS = ("LinguisticTokenRefinerBlock", "CollaborativeRefinerBranch", "LIDiTBlock")


def test_gradient_checkpointing_changes_no_gradient(fresh):
    arguments, model = fresh
    target, gradients = np.zeros((3, 4, 6, 3), np.float32), []
    runs = []
    blocks = [module for name, module in model.named_modules() if type(module).__name__ in BLOCKS]
    assert len(blocks) > TINY.depth + 2
    for block in blocks:
        block.register_forward_pre_hook(lambda *_: runs.append(1))
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        loss_of(model, arguments, target).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert len(runs) == len(blocks) * 3  # with checkpointing, each block runs twice
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("way", ["loaded in bfloat16", "autocast"])
def test_in_bfloat16_it_predicts_nearly_the_same(tiny, tmp_path, way):
    inputs, _, model = tiny
    with torch.no_grad():
        expected = model(**pytorch_inputs(*inputs)).sample
        if way == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                actual = model(**pytorch_inputs(*inputs)).sample
            assert actual.dtype == torch.float32
        else:
            model.save_pretrained(tmp_path)
            loaded = LIDiTTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
            assert loaded.dtype == torch.bfloat16
            actual = loaded(**pytorch_inputs(*inputs, dtype=torch.bfloat16)).sample
            assert actual.dtype == torch.bfloat16
            # Latents and features may have a higher precision, which the prediction then keeps.
            assert loaded(**pytorch_inputs(*inputs)).sample.dtype == torch.float32
    assert_close(actual, expected, 5e-2)
    assert not torch.equal(actual.float(), expected)


def test_autocast_trains_float32_weights(fresh):
    arguments, model = fresh
    dtypes = {}
    for name in ("dit.blocks.0.self_attention.to_q", "dit.output", "timestep_embedder.linear_out"):
        model.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: dtypes.update({name: output.dtype})
        )
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, arguments, np.zeros((3, 4, 6, 3), np.float32))
    loss.backward()
    assert list(dtypes.values()) == [torch.float32, torch.bfloat16, torch.float32]
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())


def test_layers_of_float32_compute_in_it_when_loaded_in_bfloat16(fresh):
    arguments, model = fresh
    outputs = {}
    for name in ("timestep_embedder", "text_condition.pooled_texts.1", "dit.final_modulation", "dit.output"):
        model.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: outputs.update({name: output})
        )
    with torch.no_grad():
        model.to(torch.bfloat16)(**arguments)
    tensors = [x for output in outputs.values() for x in (output if isinstance(output, tuple) else [output])]
    assert len(outputs) == 4
    assert all(x.dtype == torch.float32 for x in tensors)


def test_saving_and_loading_gives_the_same_model(tiny, tmp_path):
    inputs, _, model = tiny
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = LIDiTTransformer2DModel.from_pretrained(tmp_path)
    assert {key: value for key, value in loaded.config.items() if not key.startswith("_")} == {
        key: value for key, value in model.config.items() if not key.startswith("_")
    }
    arguments = pytorch_inputs(*inputs)
    with torch.no_grad():
        assert torch.equal(loaded(**arguments).sample, model(**arguments, return_dict=False)[0])


def test_one_timestep_serves_the_whole_batch(tiny):
    inputs, _, model = tiny
    arguments = pytorch_inputs(*inputs)
    with torch.no_grad():
        expected = model(**arguments | {"timestep": torch.full((3,), 7.0)}).sample
        for timestep in (7, 7.0, torch.tensor(7), torch.tensor([7.0])):
            assert torch.equal(model(**arguments | {"timestep": timestep}).sample, expected)


def test_padding_changes_nothing(tiny):
    inputs, _, model = tiny
    arguments = pytorch_inputs(*inputs)
    changed = [
        torch.where(mask[..., None], x, 9.0)
        for x, mask in zip(arguments["encoder_hidden_states"], arguments["encoder_attention_mask"], strict=True)
    ]
    with torch.no_grad():
        expected = model(**arguments).sample
        assert_close(model(**arguments | {"encoder_hidden_states": changed}).sample, expected, 1e-6)


def test_compiled_as_one_graph_it_predicts_the_same(tiny):
    inputs, _, model = tiny
    arguments = pytorch_inputs(*inputs)
    with torch.no_grad():
        # Only tracing can fail; the "eager" backend runs the trace without compiling C++ for a minute.
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert_close(compiled(**arguments).sample, model(**arguments).sample, 1e-6)
        with torch.autocast("cpu", torch.bfloat16):
            compiled(**arguments)


def test_untrained_it_predicts_zero_and_can_learn():
    torch.manual_seed(0)
    fields = {name: getattr(TINY, name) for name in FIELDS}
    model = LIDiTTransformer2DModel(**fields, text_widths=[24, 10])
    inputs = random_inputs(TINY, [LLAMA, QWEN])
    loss = loss_of(model, pytorch_inputs(*inputs), np.ones_like(inputs[0]))
    assert loss == 1.0
    loss.backward()
    assert model.dit.output.weight.grad.abs().max() > 0
    ours = jax.jit(LIDiT(TINY).init)(jax.random.key(0), *inputs)["params"]
    for name, expected in pytorch_state(TINY, jax.device_get(flax.linen.unbox(ours))).items():
        actual = model.get_parameter(name).detach()
        assert actual.std(correction=0).item() == pytest.approx(expected.std(correction=0).item(), rel=0.25), name
        assert (actual.mean() - expected.mean()).abs() < 0.1, name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_states": torch.zeros(3, 3, 5, 6)}, "5 x 6 are not divisible by patch_size=2"),
        ({"hidden_states": torch.zeros(3, 4, 6, 3)}, r"hidden_states must be \[batch, 3, height, width\]"),
        ({"encoder_hidden_states": [torch.zeros(3, 7, 24)]}, "must be a list of 2, one for each LLM, but is 1"),
        ({"encoder_attention_mask": torch.ones(3, 7)}, "must be a list of 2, one for each LLM, but is a tensor"),
        (
            {"encoder_hidden_states": [torch.zeros(3, 7, 24), torch.zeros(3, 5, 11)]},
            r"encoder_hidden_states\[1\] must be \[3, length, 10\]",
        ),
        (
            {"encoder_attention_mask": [torch.ones(3, 6), torch.ones(3, 5)]},
            r"encoder_attention_mask\[0\] must be \[3, 7\], not \[3, 6\]",
        ),
        (
            {"instruction_hidden_states": [torch.zeros(3, 24), torch.zeros(2, 2, 10)]},
            r"instruction_hidden_states\[1\] must be \[length, 10\] or \[3, length, 10\]",
        ),
        ({"instruction_hidden_states": [torch.zeros(24), torch.zeros(2, 10)]}, r"instruction_hidden_states\[0\]"),
    ],
)
def test_inputs_of_wrong_shapes_are_rejected(tiny, changes, message):
    inputs, _, model = tiny
    with pytest.raises(ValueError, match=message):
        model(**pytorch_inputs(*inputs) | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 17}, "not divisible by num_heads=2"),
        ({"hidden_size": 6}, "odd, but rotary"),
        ({"fusion": "sum"}, "use one of collaborative, concatenate"),
        ({"format_version": 3}, "has format_version 3, but this transformer_lidit.py reads up to 2"),
        ({"position": "table"}, "join conv, sincos, rope by"),
        ({"position": "rope", "hidden_size": 12}, "not divisible by 4, for 'rope'"),
    ],
)
def test_an_invalid_config_is_rejected(changes, message):
    with pytest.raises(ValueError, match=message):
        LIDiTTransformer2DModel(depth=1, num_heads=2, text_widths=[4], **({"hidden_size": 8} | changes))


def test_it_needs_no_jax(tmp_path):
    """Checks that the exported module alone loads, predicts and saves."""
    save_lidit(tmp_path, TINY, flax.traverse_util.flatten_dict(random_params(TINY, random_inputs(TINY, [LLAMA]))))
    (tmp_path / FILE.name).write_bytes(FILE.read_bytes())
    script = """
import importlib.abc, importlib.util, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in ("jax", "jaxlib", "flax", "lidit_jax"):
            raise ImportError(name)

folder = sys.argv[1]
sys.meta_path.insert(0, Refuse())
spec = importlib.util.spec_from_file_location("transformer_lidit", f"{folder}/transformer_lidit.py")
module = importlib.util.module_from_spec(spec)
sys.modules["transformer_lidit"] = module
spec.loader.exec_module(module)
import torch
model = module.LIDiTTransformer2DModel.from_pretrained(folder)
mask = torch.ones(1, 5, dtype=torch.bool)
output = model(torch.randn(1, 3, 4, 4), 5, [torch.randn(1, 5, 24)], [mask], [torch.randn(2, 24)]).sample
assert output.shape == (1, 3, 4, 4) and output.isfinite().all()
"""
    environment = {"PATH": "", "HOME": str(tmp_path), "USE_FLAX": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_file_imports_only_what_an_exported_folder_may_use():
    spec = importlib.util.spec_from_file_location("alone", FILE)
    assert spec is not None
    imports = [
        line.split()[1].split(".")[0] for line in FILE.read_text().splitlines() if line.startswith(("import", "from"))
    ]
    assert set(imports) <= {"torch", "diffusers"} | sys.stdlib_module_names
    assert FILE.is_relative_to(ROOT)
