"""FLOPs of one instruction of a compiled program: matrix products, convolutions and the TPU attention kernel."""

import functools
import math
import re

import numpy as np

from lidit_jax.compile.hlo import Instruction, arrays, dims


def dot_flops(instruction: Instruction, computation: dict[str, Instruction]) -> float:
    left = dims(computation[instruction.operands[0]].shape)
    contracted = re.search(r"lhs_contracting_dims=\{([0-9,]*)\}", instruction.attributes)
    axes = [int(axis) for axis in contracted[1].split(",") if axis] if contracted else []
    return 2.0 * math.prod(dims(instruction.shape)) * math.prod(left[axis] for axis in axes)


def attention_flops(instruction: Instruction, computation: dict[str, Instruction]) -> float:
    """Returns the FLOPs of the TPU attention kernel (`models/splash_attention.py`), 0 for any other custom call.

    The kernel is recognised by its name. All of the query-key matrix counts, also under a causal mask, as for XLA's
    attention.
    """
    kernel = re.match(r"splash_mha_(fwd|dkv|dq)_", instruction.name)
    if not kernel:
        return 0.0
    shapes = [dims(computation[name].shape) for name in instruction.operands if name in computation]
    tokens = [shape for shape in shapes if len(shape) == 4]
    query, key = tokens[:2]  # [B, H, Lq, D], [B, K, Lk, D], or with the last two axes swapped
    # Forward: logits and output. Backward: logits again, and the gradients of weights, values and keys. The gradient of
    # the queries has a kernel of its own ("dq"), or is an output of the fused one for every block of keys, as
    # [B, blocks, H, Lq, D].
    results = [sizes for _, sizes in arrays(instruction.shape) if len(sizes) >= len(query)]
    is_fused = any(len(sizes) == len(query) + 1 for sizes in results)
    products = {"fwd": 2, "dkv": 5 if is_fused else 4, "dq": 3}[kernel[1]]
    key_length = key[2] if key[3] == results[0][-1] else key[3]  # results have their features last
    return 2.0 * products * math.prod(query) * key_length


def convolution_flops(instruction: Instruction, computation: dict[str, Instruction]) -> float:
    """Returns the FLOPs of a convolution, without products with padding or dilation holes, like XLA."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    shapes = *(computation[name].shape for name in instruction.operands[:2]), instruction.shape
    image, kernel, out = (
        dict(zip(label, dims(shape), strict=True)) for label, shape in zip(labels.groups(), shapes, strict=True)
    )
    spatial = [label for label in labels[2] if label.isdigit()]
    window = _window(instruction.attributes, len(spatial))
    positions = 1
    for axis, label in enumerate(spatial):
        positions *= _valid_positions(
            image[label], kernel[label], out[label], *(window[name][axis] for name in _WINDOW)
        )
    groups = re.search(r"batch_group_count=(\d+)", instruction.attributes)
    batch = image["b"] // (int(groups[1]) if groups else 1)
    return 2.0 * batch * positions * kernel["i"] * kernel["o"]


_WINDOW = ("stride", "pad", "lhs_dilate", "rhs_dilate")


def _window(attributes: str, rank: int) -> dict[str, list]:
    text = re.search(r"window=\{([^}]*)\}", attributes)
    given = dict(part.split("=") for part in text[1].split()) if text else {}
    window: dict[str, list] = {}
    for name in _WINDOW:
        default = ["0_0" if name == "pad" else "1"] * rank
        values = given[name].split("x") if name in given else default
        window[name] = [int(value.split("_")[0]) for value in values]
    return window


@functools.lru_cache(maxsize=4096)
def _valid_positions(
    image: int, kernel: int, out: int, stride: int, pad: int, image_dilation: int, dilation: int
) -> int:
    """Returns, for one axis, the number of (output, kernel) position pairs that meet a value of the image."""
    outputs = np.arange(out, dtype=np.int64) * stride - pad
    count = 0
    for tap in range(kernel):
        positions = outputs + tap * dilation
        inside = (positions >= 0) & (positions < (image - 1) * image_dilation + 1)
        count += int((inside & (positions % image_dilation == 0)).sum())
    return count
