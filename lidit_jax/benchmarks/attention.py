"""Benchmarks attention kernels, forward and backward: `python -m lidit_jax.benchmarks.attention [--tokens=1024 …]`.

The attention of `models/attention.py` by each implementation that the device has, and PyTorch's
`scaled_dot_product_attention`. Self-attention, or with --keys cross-attention; --padded gives every sample its own
number of keys. Inputs are random; the norms of the output and of the gradients are compared. FLOPs are those of the
matrix products, forward and backward, padding included.
"""

import functools
from collections.abc import Callable

import numpy as np
from absl import flags

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

_BATCH = shared_flags.define_batch(8, "samples")
_TOKENS = shared_flags.define_tokens("tokens", 256, "queries of a sample")
_KEYS = shared_flags.define_tokens("keys", 0, "keys of a sample; 0 is as many as queries", lowest=0)
_HEADS = shared_flags.define_tokens("heads", 16, "heads")
_HEAD_SIZE = shared_flags.define_tokens("head_size", 72, "width of a head")
_DTYPE = shared_flags.define_dtype("bfloat16")
_PADDED = flags.DEFINE_bool("padded", False, "give every sample its own number of keys, from one to all")
_TORCH = flags.DEFINE_bool("torch", True, "compare with PyTorch")
_CALLS = shared_flags.define_repeats("calls", 10, "calls per round")
_ROUNDS = shared_flags.define_rounds(5)
_JSON = shared_flags.define_json()


def main() -> None:
    import jax

    from lidit_jax.models.flops import FORWARD_AND_BACKWARD, attention_products

    keys = _KEYS.value or _TOKENS.value
    shapes = (_BATCH.value, _TOKENS.value, keys, _HEADS.value, _HEAD_SIZE.value)
    arguments = (shapes, _PADDED.value, _DTYPE.value, _CALLS.value)
    names = ["xla"] + {"gpu": ["cudnn"], "tpu": ["splash"]}.get(jax.default_backend(), [])
    contestants = [Contestant(name, functools.partial(ours, name, *arguments)) for name in names]
    if _TORCH.value:
        contestants.append(Contestant("PyTorch", functools.partial(pytorch, *arguments)))
    print(describe_host(*(["torch"] if _TORCH.value else [])), flush=True)
    results = contest(contestants, _ROUNDS.value)
    batch, queries, keys, heads, size = shapes
    flops = FORWARD_AND_BACKWARD * batch * attention_products(queries, keys, heads * size) * _CALLS.value
    what = (
        f"attention, batch {batch}, {queries} queries, {keys} keys{', padded' if _PADDED.value else ''}, {heads} heads "
        f"of {size}, {_DTYPE.value}"
    )
    print(f"{what}; median of {_ROUNDS.value} rounds of {_CALLS.value} calls")
    print(format_table(results, flops / 1e12, "TFLOP"))
    print(f"norms differ by {largest_difference(results):.1e} of the largest")
    rows = measurements(results, steps=_CALLS.value, tflops=flops / 1e12)
    write_figures(_JSON.value, what, _ROUNDS.value, rows)


def random_inputs(shapes: tuple[int, int, int, int, int], padded: bool) -> tuple[list[np.ndarray], np.ndarray]:
    """Returns query, key, value and the output's gradient, float32 [B, L, H, D], and the key mask, bool [B, Lk].

    Args:
      shapes: B, number of queries, number of keys, H, D.
      padded: whether the samples have different numbers of keys.
    """
    batch, queries, keys, heads, size = shapes
    random = np.random.default_rng(0)
    arrays = [
        random.standard_normal((batch, length, heads, size), np.float32) for length in (queries, keys, keys, queries)
    ]
    lengths = random.integers(1, keys + 1, batch) if padded else np.full(batch, keys)
    return arrays, np.arange(keys) < lengths[:, None]


def ours(
    implementation: str, shapes: tuple[int, int, int, int, int], padded: bool, dtype: str, calls: int
) -> Callable[[], np.ndarray]:
    """Prepares our attention; a round returns the norms of the output and of the three gradients, float32 [4]."""
    import jax
    import jax.numpy as jnp

    from lidit_jax.models.attention import dot_product_attention

    arrays, mask = random_inputs(shapes, padded)
    query, key, value, cotangent = (jnp.asarray(array, dtype) for array in arrays)
    key_mask = jnp.asarray(mask) if padded else None

    @jax.jit
    def forward_and_backward(query, key, value, cotangent, key_mask):
        def attend(query, key, value):
            return dot_product_attention(query, key, value, key_mask=key_mask, implementation=implementation)

        output, backward = jax.vjp(attend, query, key, value)
        return jnp.stack([jnp.linalg.norm(x.astype(jnp.float32)) for x in (output, *backward(cotangent))])

    def work() -> np.ndarray:
        for _ in range(calls):
            norms = forward_and_backward(query, key, value, cotangent, key_mask)
        return np.asarray(norms)

    return work


def pytorch(shapes: tuple[int, int, int, int, int], padded: bool, dtype: str, calls: int) -> Callable[[], np.ndarray]:
    """Prepares PyTorch's attention; see `ours`."""
    import torch

    from lidit_jax.benchmarks.contest import disable_tf32

    disable_tf32()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arrays, mask = random_inputs(shapes, padded)
    # [B, H, L, D]
    query, key, value, cotangent = (
        torch.from_numpy(array).to(device, getattr(torch, dtype)).transpose(1, 2).contiguous() for array in arrays
    )
    key_mask = torch.from_numpy(mask).to(device)[:, None, None, :] if padded else None
    leaves = [x.requires_grad_() for x in (query, key, value)]

    def work() -> np.ndarray:
        for _ in range(calls):
            output = torch.nn.functional.scaled_dot_product_attention(*leaves, attn_mask=key_mask)
            gradients = torch.autograd.grad(output, leaves, cotangent)
            norms = torch.stack([x.detach().float().norm() for x in (output, *gradients)])
        return norms.cpu().numpy()

    return work


if __name__ == "__main__":
    cli.run(main)
