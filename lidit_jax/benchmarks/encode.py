"""Benchmarks prompt encoding against transformers: `python -m lidit_jax.benchmarks.encode`.

An LLM in Hugging Face's format, `--weights` or a random LLaMA of about 150M parameters, encodes the same prompts after
the same prefix in four ways, each up to the third-to-last block:

    plain                  ours, the prefix computed with every prompt
    shared prefix          ours, the prefix computed once (as in training and sampling)
    transformers           transformers' model
    transformers compiled  the same under `torch.compile`

Tokens per second count prompt tokens only, whether or not the prefix was computed again.
"""

import functools
import tempfile
from collections.abc import Callable

import numpy as np

from lidit_jax import cli
from lidit_jax.benchmarks import shared_flags
from lidit_jax.benchmarks.contest import (
    Contestant,
    contest,
    describe_host,
    format_table,
    largest_difference,
    measurements,
    write_figures,
)

_BATCH = shared_flags.define_batch(32, "prompts encoded at once")
_PREFIX = shared_flags.define_tokens("prefix", 40, "tokens of the prefix")
_PROMPT = shared_flags.define_tokens("prompt", 40, "tokens per prompt")
_ROUNDS = shared_flags.define_rounds(20)
_DTYPE = shared_flags.define_dtype("float32")
_WEIGHTS = shared_flags.define_weights("folder of an LLM; by default a random LLaMA of 150M parameters")
_JSON = shared_flags.define_json()

SIZES = {
    "vocab_size": 32_000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
}


def main() -> None:
    print(describe_host("torch", "transformers"))
    with tempfile.TemporaryDirectory() as temporary:
        folder = _WEIGHTS.value or temporary
        if not _WEIGHTS.value:
            save_model(folder)
        vocabulary, num_parameters = sizes(folder)
        random = np.random.default_rng(0)
        prefix = random.integers(0, vocabulary, _PREFIX.value, np.int32)
        prompts = random.integers(0, vocabulary, (_BATCH.value, _PROMPT.value), np.int32)
        prepare_functions = {
            "plain": plain,
            "shared prefix": shared_prefix,
            "transformers": functools.partial(transformers_model, compiled=False),
            "transformers compiled": functools.partial(transformers_model, compiled=True),
        }
        arguments = (folder, prefix, prompts, _DTYPE.value)
        contestants = [
            Contestant(name, functools.partial(prepare, *arguments)) for name, prepare in prepare_functions.items()
        ]
        results = contest(contestants, _ROUNDS.value)
    what = (
        f"{num_parameters / 1e6:.0f}M parameters in {_DTYPE.value}, prefix of {_PREFIX.value} tokens, {_BATCH.value} "
        f"prompts of {_PROMPT.value}"
    )
    tokens = _BATCH.value * _PROMPT.value
    print(f"{what}, median of {_ROUNDS.value} rounds")
    print(format_table(results, tokens, "tokens"))
    print(f"largest difference from plain: {largest_difference(results):.1e} of plain's largest value")
    write_figures(_JSON.value, what, _ROUNDS.value, measurements(results, steps=1, tokens=tokens))


def save_model(folder: str) -> None:
    """Saves a random LLaMA in Hugging Face's format."""
    import torch
    import transformers

    torch.manual_seed(0)
    transformers.LlamaModel(transformers.LlamaConfig(**SIZES)).save_pretrained(folder)


def sizes(folder: str) -> tuple[int, int]:
    """Returns the vocabulary size and the number of parameters of the model in a folder, without its weights.

    Raises:
      UserError: the folder holds no decoder-only LLM of a supported family.
    """
    import torch
    import transformers

    from lidit_jax.weights.huggingface_config import llm_config
    from lidit_jax.weights.safetensors_folder import CONFIG_FILE, read_config

    vocabulary = llm_config(read_config(folder), f"{folder}/{CONFIG_FILE}", dtype=_DTYPE.value).vocab_size
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(folder))
    return vocabulary, model.num_parameters()


def load(folder: str, dtype: str):
    """Loads the saved model; returns our Flax module and its parameters."""
    from lidit_jax.models.llm import LLM
    from lidit_jax.weights.huggingface_llm import load_llm_encoder

    config, params = load_llm_encoder(folder, dtype=dtype)
    return LLM(config.as_encoder()), params


def plain(folder: str, prefix: np.ndarray, prompts: np.ndarray, dtype: str) -> Callable[[], np.ndarray]:
    """Prepares our encoder without a shared prefix.

    Args:
      folder: of the saved model.
      prefix: token ids, int32 [P].
      prompts: token ids, int32 [B, L].
      dtype: to compute in.

    Returns:
      Function that returns the prompts' features, [B, L, hidden size].
    """
    import jax

    model, params = load(folder, dtype)
    tokens = np.concatenate([np.broadcast_to(prefix, (len(prompts), len(prefix))), prompts], axis=1)
    encode = jax.jit(lambda params, tokens: model.apply({"params": params}, tokens)[:, len(prefix) :])
    return lambda: np.asarray(encode(params, tokens))


def shared_prefix(folder: str, prefix: np.ndarray, prompts: np.ndarray, dtype: str) -> Callable[[], np.ndarray]:
    """Prepares our encoder with the prefix's keys and values computed once; arguments as in `plain`."""
    import jax

    model, params = load(folder, dtype)
    _, cache = jax.jit(lambda params: model.apply({"params": params}, prefix, method=type(model).prefix))(params)
    encode = jax.jit(lambda params, tokens, cache: model.apply({"params": params}, tokens, cache))
    return lambda: np.asarray(encode(params, prompts, cache))


def transformers_model(
    folder: str, prefix: np.ndarray, prompts: np.ndarray, dtype: str, *, compiled: bool
) -> Callable[[], np.ndarray]:
    """Prepares transformers' model without its last blocks and final norm; arguments as in `plain`."""
    import torch
    import transformers

    from lidit_jax.models.llm import BLOCKS_AFTER_FEATURE

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = transformers.AutoModel.from_pretrained(folder, dtype=getattr(torch, dtype)).eval().to(device)
    model.layers = model.layers[:-BLOCKS_AFTER_FEATURE]
    model.norm = torch.nn.Identity()
    tokens = np.concatenate([np.broadcast_to(prefix, (len(prompts), len(prefix))), prompts], axis=1)
    tokens = torch.from_numpy(tokens).long().to(device)
    model = torch.compile(model) if compiled else model

    @torch.inference_mode()
    def work():
        features = model(input_ids=tokens, use_cache=False).last_hidden_state[:, len(prefix) :]
        return features.float().cpu().numpy()

    return work


if __name__ == "__main__":
    cli.run(main)
