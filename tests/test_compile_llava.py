"""The compile report of a multi-modal LLM's training, on CPU devices in place of a TPU slice."""

import jax
import pytest
from conftest import load_config

from lidit_jax.compile import compile_llava
from lidit_jax.compile.compile_llava import abstract_networks
from lidit_jax.errors import UserError
from lidit_jax.llava_run import fill_in_paths, llava_section
from lidit_jax.parallel.chips import TPUS
from lidit_jax.parallel.mesh import make_mesh
from lidit_jax.parallel.rules import ShardingRules
from lidit_jax.weights.huggingface_llava import llava_parameters
from lidit_jax.weights.loading import Placement, abstract_parameters


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(compile_llava, "topology_devices", lambda *_: (jax.devices(), TPUS["v5e"]))


def tiny_config():
    config = load_config("llava")
    config.llava.llm.model.update(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=3)
    config.llava.llm.model.update(num_attention_heads=4, num_key_value_heads=2)
    config.llava.vision.model.update(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4)
    config.llava.vision.model.update(image_size=56)
    for stage in (config.llava.align, config.llava.tune):
        stage.data.resolution, stage.max_length, stage.train.batch_size = 56, 128, 8
    config.llava.update(dtype="float32", remat=False)
    config.mesh.update(data=2, fsdp=2, tensor=2)
    return config


# In "align" the compiler computes the products of attention again in the backward pass.
@pytest.mark.parametrize(("stage", "most"), [("align", 1.17), ("tune", 1.03)])
def test_the_report_has_the_parts_and_the_flops_of_a_stage(on_cpu, stage, most):
    report = compile_llava.compile_llava(tiny_config(), "v5e:2x4", stage=stage)
    frozen = ["tower", "language_model"] if stage == "align" else ["tower"]
    assert [name for name in report.parts if name in ("tower", "language_model")] == frozen
    assert report.batch_size == 8 and report.fits
    assert report.parts["optimiser"] > 1.9 * report.parts["weights"]
    assert 0.98 < report.flops_ratio < most
    shares = report.shares()
    assert {"vision tower", "projector", "LLM", "output head"} <= shares.keys()
    assert shares["the rest"][0] < 0.02 * report.cost.flops < shares["vision tower"][0] < shares["LLM"][0]
    assert "128 tokens" in "\n".join(report.lines())


def test_an_8b_llm_is_sharded_and_has_the_published_sizes():
    config = load_config("llava")
    fill_in_paths(config)
    networks = abstract_networks(llava_section(config))
    assert (networks.tokens_per_image, networks.tower.num_hidden_layers) == (576, 23)
    boxed = llava_parameters(networks)
    assert 8.0e9 < sum(leaf.value.size for leaf in boxed.values()) < 8.1e9
    placement = Placement(make_mesh({"fsdp": -1}), ShardingRules())
    tree = abstract_parameters(boxed, placement, dtype="float32")
    replicated = [leaf.size for leaf in jax.tree.leaves(tree) if leaf.sharding.is_fully_replicated]
    assert max(replicated) * 4 < 1e6


@pytest.mark.parametrize(
    ("change", "stage", "message"),
    [
        (lambda config: config.llava.__delitem__("align"), "align", "the config has no stage llava.align"),
        (lambda config: config.llava.llm.__delitem__("model"), "tune", "llava.llm has neither weights nor model"),
        (lambda config: config.llava.vision.__delitem__("model"), "tune", "llava.vision has neither weights nor model"),
        (lambda config: config.update({"data": {}}), "tune", "config key data is unknown beside llava"),
        (lambda config: config.__delitem__("seed"), "tune", "config key seed is missing"),
    ],
)
def test_a_config_that_cannot_be_compiled_is_refused(on_cpu, change, stage, message):
    config = tiny_config()
    with config.unlocked():
        change(config)
    with pytest.raises(UserError, match=message):
        compile_llava.compile_llava(config, "v5e:2x4", stage=stage)
