"""Matrix products and convolutions with trained weights: precision, FSDP all-gather and gradient reduction.

A weight is stored in float32 and sharded over the FSDP axes. A product casts it to the compute dtype, all-gathers it
(half the bytes in bfloat16), and multiplies. In the backward pass each device has the weight's gradient from its own
samples; these partial gradients are reduced over the devices and scattered to the stored sharding. JAX's own transpose
of cast-then-gather would round them to the compute dtype first. Here the product that computes them returns float32,
which is then reduced, unless `reduce_gradients_in("bfloat16")` asks for half the bytes.
"""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lidit_jax.parallel.rules import GRADIENT_SCOPE, constrain

# Logical axes of weights that are sharded only in storage (FSDP) and gathered before use.
STORAGE_AXES = ("embed", "conv_out")
# Dtypes in which the gradients of bfloat16 products can be reduced over devices.
GRADIENT_DTYPES = ("float32", "bfloat16")

_IMAGE_LAYOUT = ("NHWC", "HWIO", "NHWC")
_gradient_dtype: contextvars.ContextVar[str] = contextvars.ContextVar("gradient_dtype", default="float32")


@contextlib.contextmanager
def reduce_gradients_in(dtype: str) -> Iterator[None]:
    """Sets the dtype in which the gradients of products traced in this context are reduced over devices.

    float32 products always reduce their gradients in float32, and so do biases, which are small.

    Args:
      dtype: one of `GRADIENT_DTYPES`.
    """
    token = _gradient_dtype.set(dtype)
    try:
        yield
    finally:
        _gradient_dtype.reset(token)


def product_precision(dtype: Any) -> jax.lax.Precision | None:
    """Returns HIGHEST for float32, which accelerators otherwise multiply as bfloat16 (TPU) or TF32 (GPU); else None."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def cast_and_gather(weight: jax.Array, axes: Sequence[str | None], dtype: Any) -> jax.Array:
    """Casts a weight to the compute dtype, then all-gathers its FSDP axes before the product.

    Without the second sharding constraint XLA may keep the weight sharded and all-gather the batch for every product
    instead; without the first it gathers before the cast, at twice the bytes.

    Args:
      weight: array of any shape.
      axes: logical axes of the stored weight.
      dtype: compute dtype.
    """
    return constrain(constrain(weight.astype(dtype), axes), _without_storage(axes))


def _without_storage(axes: Sequence[str | None]) -> tuple[str | None, ...]:
    return tuple(None if axis in STORAGE_AXES else axis for axis in axes)


def matmul(x: jax.Array, kernel: jax.Array, axes: tuple[str | None, str | None]) -> jax.Array:
    """Multiplies x [..., I] by a stored kernel [I, O] with the logical axes `axes`: [..., O] in the dtype of x."""
    return _multiply(_Matmul(axes, kernel.dtype, _gradient_dtype.get()), x, kernel)


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    axes: tuple[str | None, str | None],
    *,
    strides: tuple[int, int] = (1, 1),
    padding: str | Sequence[tuple[int, int]] = "SAME",
) -> jax.Array:
    """Convolves images or features with a stored kernel.

    Args:
      x: [B, H, W, I].
      kernel: [h, w, I, O].
      axes: logical axes of I and O.
      strides: vertical and horizontal stride.
      padding: padding of `jax.lax.conv_general_dilated`.

    Returns:
      [B, H', W', O] in the dtype of x.
    """
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
    product = _Convolution((None, None, *axes), kernel.dtype, _gradient_dtype.get(), strides, tuple(padding))
    return _multiply(product, x, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def add_bias(y: jax.Array, bias: jax.Array, stored_axis: str | None, used_axis: str | None) -> jax.Array:
    """Adds a stored bias to y. The gradient of the bias is summed and reduced over devices in float32.

    Args:
      y: [..., C].
      bias: [C].
      stored_axis: logical axis of the stored bias.
      used_axis: logical axis of the last axis of y.
    """
    bias = constrain(bias.astype(y.dtype), (stored_axis,))
    return y + constrain(bias, _without_storage((used_axis,)))


def _add_bias_forward(y, bias, stored_axis, used_axis):
    return add_bias(y, bias, stored_axis, used_axis), bias


def _add_bias_backward(stored_axis, used_axis, bias, cotangent):
    del used_axis
    with jax.named_scope(GRADIENT_SCOPE):
        gradient = jnp.sum(cotangent, axis=range(cotangent.ndim - 1), dtype=jnp.float32)
        return cotangent, constrain(gradient, (stored_axis,)).astype(bias.dtype)


add_bias.defvjp(_add_bias_forward, _add_bias_backward)


@dataclasses.dataclass(frozen=True)
class _Matmul:
    """The product of x [..., I] and kernel [I, O], both of the same dtype.

    Attributes:
      axes: logical axes of the kernel.
      stored_dtype: dtype of the stored kernel, and so of its gradient.
      gradient_dtype: dtype in which the gradient is reduced over devices, unless the dtype of x is wider.
    """

    axes: tuple[str | None, ...]
    stored_dtype: Any
    gradient_dtype: str

    def __call__(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jnp.matmul(x, kernel, precision=product_precision(x.dtype))

    def kernel_gradient(self, x: jax.Array, cotangent: jax.Array, dtype: Any, shape: Sequence[int]) -> jax.Array:
        """Returns the kernel's gradient, [I, O] in `dtype`; its sum over samples and tokens is not rounded before."""
        del shape
        rows = tuple(range(x.ndim - 1))
        return jax.lax.dot_general(
            x,
            cotangent,
            ((rows, rows), ((), ())),
            precision=product_precision(x.dtype),
            preferred_element_type=dtype,
        )


@dataclasses.dataclass(frozen=True)
class _Convolution:
    """The convolution of x [B, H, W, I] with kernel [h, w, I, O], both of the same dtype.

    Attributes:
      axes: logical axes of the kernel.
      stored_dtype: see `_Matmul`.
      gradient_dtype: see `_Matmul`.
      strides: vertical and horizontal stride.
      padding: rows above and below, columns left and right.
    """

    axes: tuple[str | None, ...]
    stored_dtype: Any
    gradient_dtype: str
    strides: tuple[int, int]
    padding: tuple[tuple[int, int], ...]

    def __call__(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            self.strides,
            self.padding,
            dimension_numbers=_IMAGE_LAYOUT,
            precision=product_precision(x.dtype),
        )

    def kernel_gradient(self, x: jax.Array, cotangent: jax.Array, dtype: Any, shape: Sequence[int]) -> jax.Array:
        """Returns the kernel's gradient, of `shape` and `dtype`.

        It is the convolution of x, its channels as the batch, with the cotangent as the kernel.
        """
        covered = [stride * (size - 1) for stride, size in zip(self.strides, cotangent.shape[1:3], strict=True)]
        padding = [
            (low, kernel + reach - size - low)
            for (low, _), kernel, reach, size in zip(self.padding, shape[:2], covered, x.shape[1:3], strict=True)
        ]
        return jax.lax.conv_general_dilated(
            x,
            cotangent,
            (1, 1),
            padding,
            rhs_dilation=self.strides,
            dimension_numbers=("CHWN", "IHWO", "HWNC"),
            precision=product_precision(x.dtype),
            preferred_element_type=dtype,
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply(product: _Matmul | _Convolution, x: jax.Array, kernel: jax.Array) -> jax.Array:
    return product(x, cast_and_gather(kernel, product.axes, x.dtype))


def _multiply_forward(product, x, kernel):
    # Keeping the gathered kernel as a residual lets a rematerialised block gather it once instead of once per use.
    gathered = cast_and_gather(kernel, product.axes, x.dtype)
    return product(x, gathered), (x, gathered)


def _multiply_backward(product, inputs, cotangent):
    x, kernel = inputs
    [x_cotangent] = jax.linear_transpose(lambda x: product(x, kernel), x)(cotangent)
    with jax.named_scope(GRADIENT_SCOPE):
        dtype = jnp.promote_types(x.dtype, product.gradient_dtype)
        gradient = product.kernel_gradient(x, cotangent, dtype, kernel.shape)
        return x_cotangent, constrain(gradient, product.axes).astype(product.stored_dtype)


_multiply.defvjp(_multiply_forward, _multiply_backward)
