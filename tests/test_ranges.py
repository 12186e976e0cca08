"""Ranges of the numbers in configs: their messages, that every number has one, and what a wrong value ends in."""

import dataclasses
import functools
import math
import typing
from collections.abc import Iterator
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import pytest
from conftest import load_config
from etils import epath
from ml_collections import ConfigDict

from lidit_jax.config import build
from lidit_jax.data.data_config import DataConfig
from lidit_jax.diffusion.schedules import SCHEDULES
from lidit_jax.errors import UserError
from lidit_jax.evaluate.scenes import SceneEvaluation
from lidit_jax.experiment import Experiment
from lidit_jax.models.lidit_config import LIDiTConfig
from lidit_jax.models.llm import CausalLM, LLMConfig
from lidit_jax.models.rotary import RopeScaling
from lidit_jax.models.t5 import T5Config
from lidit_jax.models.vae_config import VAEConfig
from lidit_jax.models.vae_section import (
    AdversarialConfig,
    PerceptualConfig,
    ReconstructionEvaluation,
    VAESectionConfig,
)
from lidit_jax.parallel.mesh import MeshConfig, resolve_sizes
from lidit_jax.pipeline import SampleConfig
from lidit_jax.ranges import Count, Share, Size, above, at_least, below, check_ranges
from lidit_jax.text.load_encoder import EncoderConfig
from lidit_jax.text.prompts import TextConfig
from lidit_jax.train_config import TrainConfig

SECTIONS = (
    *(DataConfig, TextConfig, EncoderConfig, LLMConfig, RopeScaling, T5Config, TrainConfig, SampleConfig, MeshConfig),
    *(VAESectionConfig, VAEConfig, PerceptualConfig, AdversarialConfig, ReconstructionEvaluation, LIDiTConfig),
    *(SceneEvaluation, *SCHEDULES.values()),
)
# Checked elsewhere: `SceneLayout` has the number of shares that goes with the layout, `sample_size` is not used.
WITHOUT_RANGE = {"DataConfig.object_shares", "VAEConfig.sample_size"}
BAD_VALUES = (0, -1, 1e30, 10**30, math.nan, math.inf, "text", None, [1, 2])


@dataclasses.dataclass(frozen=True)
class Section:
    count: Count = 1
    size: Size = 1
    share: Share | None = None
    rate: Annotated[float, at_least(0), below(1)] = 0.0
    scale: Annotated[float, above(0)] = 1.0
    widths: tuple[Size, ...] = ()
    shares: typing.Mapping[str, Share] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        check_ranges(self, "section.")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("count", 0, "section.count=0 must be at least 1"),
        ("count", 2**31, "section.count=2147483648 must be at most 2147483647"),
        ("count", 1.0, "section.count=1.0 must be an integer"),
        ("count", True, "section.count=True must be an integer"),
        ("count", None, "section.count=None must be an integer"),
        ("size", 2**21, "section.size=2097152 must be at most 1048576"),
        ("size", -1, "section.size=-1 must be at least 1"),
        ("share", 1.5, "section.share=1.5 must be from 0 to 1"),
        ("share", "1", "section.share='1' must be a number"),
        ("rate", 1.0, "section.rate=1.0 must be below 1"),
        ("rate", math.nan, "section.rate=nan must be a finite number"),
        ("scale", 0, "section.scale=0 must be above 0"),
        ("scale", math.inf, "section.scale=inf must be a finite number"),
        ("scale", 1e-320, "section.scale=1e-320 must be 0 or at least 1.2e-38 in magnitude"),
        ("rate", -1e-45, "section.rate=-1e-45 must be 0 or at least 1.2e-38 in magnitude"),
        ("scale", 1e39, "section.scale=1e+39 must be at most 3.4e+38"),
        ("widths", (8, 0), "section.widths[1]=0 must be at least 1"),
        ("shares", {"txt": -1}, "section.shares.txt=-1 must be from 0 to 1"),
    ],
)
def test_a_number_out_of_its_range_is_rejected_with_the_range(field, value, message):
    with pytest.raises(UserError) as error:
        Section(**{field: value})
    assert str(error.value) == message
    with pytest.raises(UserError):
        dataclasses.replace(Section(), **{field: value})


def test_numbers_within_their_ranges_and_null_where_it_is_allowed_are_accepted():
    first = (1, 2**20, None, 0, 1e-30, (1, 2), {"txt": 1})
    assert tuple(vars(Section(*first)).values()) == first
    second = (2**31 - 1, 1, 0.0, 0.999, 3e38)
    assert tuple(vars(Section(*second)).values())[: len(second)] == second


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_number_of_a_section_has_a_range(section):
    for name, hint in typing.get_type_hints(section, include_extras=True).items():
        if f"{section.__name__}.{name}" not in WITHOUT_RANGE:
            assert not {int, float} & set(_types_without_range(hint)), name


def _types_without_range(hint: Any) -> Iterator[Any]:
    if typing.get_origin(hint) is Annotated:
        return
    yield hint
    for argument in typing.get_args(hint):
        yield from _types_without_range(argument)


# --- wrong values in configs ---------------------------------------------------------------------------------------


def complete_config(name: str) -> ConfigDict:
    """Returns a config in which all fields of all sections are stated."""
    config = load_config(name)
    config.data.path = config.data.get("path") or "shards"
    with config.unlocked():
        for encoder in config.get("encoders", {}).values():
            encoder.model.rope_scaling = {"rope_type": "yarn", "original_max_position_embeddings": 8}
        config.vae.evaluate = {}
    run = Experiment(config, epath.Path("workdir"), only_shapes=True)
    values = config.to_dict() | {"data": dataclasses.asdict(run.data), "vae": dataclasses.asdict(run.vae)}
    if run.has_lidit:
        sections = {"text": run.text, "model": run.model.config, "train": run.train, "sample": run.sample}
        values |= {section: dataclasses.asdict(config) for section, config in sections.items()}
        values["encoders"] = {name: dataclasses.asdict(encoder) for name, encoder in run.encoders.items()}
        values["diffusion"] |= dataclasses.asdict(run.schedule)
        values["evaluate"] = dataclasses.asdict(build(SceneEvaluation, values.get("evaluate", {}), "evaluate"))
    return ConfigDict(values)


def numbers_of(config: ConfigDict, prefix: str = "") -> Iterator[tuple[ConfigDict, str, str]]:
    """Yields the section, the key in it and the whole key of each number, and of each null that may be one."""
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from numbers_of(value, f"{prefix}{key}.")
        elif not isinstance(value, str | bool):
            yield config, key, f"{prefix}{key}"


def experiment_of(config: ConfigDict) -> Experiment:
    """Builds everything that a config describes, as a run does before it writes or compiles anything."""
    run = Experiment(config, epath.Path("workdir"), only_shapes=True)
    resolve_sizes(config.mesh, 1)
    if "evaluate" in config:
        build(SceneEvaluation, config.evaluate, "evaluate")
    return run


@pytest.mark.parametrize(
    ("name", "prefixes"),
    [
        ("shapes", ("",)),
        ("scenes", ("data", "evaluate")),
        ("1b", ("data", "diffusion", "sample", "mesh")),
        ("vae", ("data", "vae")),
    ],
)
def test_a_wrong_number_in_a_config_ends_in_one_line_that_names_its_key(name, prefixes):
    config = complete_config(name)
    experiment_of(config)
    with config.unlocked(), config.ignore_type():
        if "qwen" in config.get("encoders", {}):
            del config.encoders.qwen  # has the fields of the other one
        for section, key, where in list(numbers_of(config)):
            if not where.startswith(prefixes):
                continue
            right = section[key]
            for wrong in BAD_VALUES:
                section[key] = wrong
                try:
                    experiment_of(config)
                except UserError as error:
                    assert "\n" not in str(error) and len(str(error)) < 300
                    assert key in str(error), (where, wrong, str(error))
                else:  # some numbers are right, and so is null where a field may be absent
                    assert not isinstance(wrong, str) and wrong not in (math.nan, math.inf), (where, wrong)
            section[key] = right


@pytest.mark.parametrize(
    "changes",
    [
        {"depth": 1000, "hidden_size": 2**20, "num_heads": 2**18, "mlp_ratio": 1000, "refiner_mlp_ratio": 1e-5},
        {"refiner_blocks": 0, "collaborative_blocks": 0, "position_grid": 2**31 - 1, "scan_unroll": 2**31 - 1},
    ],
)
def test_a_model_of_extreme_accepted_sizes_can_be_built(changes):
    config = load_config("shapes")
    config.model.update(changes)
    params = jax.eval_shape(functools.partial(experiment_of(config).model.init_params, [8, 8]), jax.random.key(0))
    assert jax.tree.leaves(params)


def test_a_language_model_of_extreme_accepted_sizes_can_be_built():
    config = load_config("shapes")
    sizes = {"vocab_size": 2**20, "num_hidden_layers": 1000, "num_attention_heads": 64, "num_key_value_heads": 1}
    with config.unlocked():
        config.encoders.llama.model.update(sizes | {"rope_theta": 1e12, "rms_norm_eps": 1})
    llm = CausalLM(experiment_of(config).encoders["llama"].language_model)
    params = jax.eval_shape(llm.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    assert max(leaf.shape[0] for leaf in jax.tree.leaves(params)) == 2**20  # the embedding's


def test_a_vae_of_extreme_accepted_sizes_can_be_built():
    config = load_config("shapes")
    config.vae.model.update(latent_channels=2**20, norm_num_groups=16)
    config.model.latent_channels = 2**20
    run = experiment_of(config)
    params = jax.eval_shape(run.autoencoder(run.vae_config).init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    assert max(max(leaf.shape) for leaf in jax.tree.leaves(params)) == 2 * 2**20  # mean and log-variance
