"""Anti-aliased rendering of scenes of shapes."""

import functools

import numpy as np

from lidit_jax.data.shapes.scene import BACKGROUND, COLORS, Scene, SceneObject


def _star() -> list[tuple[float, float]]:
    # A five-pointed star, moved down to be centred vertically between its top and its feet.
    angles, reach = np.arange(6) * np.pi / 5, np.where(np.arange(6) % 2, 0.5, 1.05)
    return list(zip(reach * np.sin(angles), 0.1 - reach * np.cos(angles), strict=True))


# Right half (x >= 0) of each outline, from top to bottom, with y down, within [-1, 1]; all shapes are symmetric about
# x = 0.
_HALF_OUTLINES = {
    "square": [(0, -0.88), (0.88, -0.88), (0.88, 0.88), (0, 0.88)],
    "triangle": [(0, -0.92), (1, 0.82), (0, 0.82)],
    "star": _star(),
    "cross": [(0, -1), (0.34, -1), (0.34, -0.34), (1, -0.34), (1, 0.34), (0.34, 0.34), (0.34, 1), (0, 1)],
}


def _edges(outline: list[tuple[float, float]]) -> tuple[np.ndarray, ...]:
    """Returns start x, start y, step x, step y, 1 / length² and step x / step y of all edges, [edges, 1, 1] each."""
    points = np.array(outline, np.float32)
    start, step = points[:-1], np.diff(points, axis=0)
    slope = np.divide(step[:, 0], step[:, 1], out=np.zeros(len(step), np.float32), where=step[:, 1] != 0)
    columns = (*start.T, *step.T, 1 / (step**2).sum(axis=1), slope)
    return tuple(column.astype(np.float32)[:, None, None] for column in columns)


_COLORS = {color: np.array(value, np.float32) for color, value in COLORS.items()}
_EDGES = {shape: _edges(outline) for shape, outline in _HALF_OUTLINES.items()}


def coverage(shape: str, dx: np.ndarray, dy: np.ndarray, radius: float) -> np.ndarray:
    """Computes the coverage of each pixel by a shape, from its signed distance clipped to one pixel's width.

    Args:
      shape: one of `SHAPES`.
      dx: [W], pixel centres relative to the shape's centre, in pixels to the right.
      dy: [H], pixel centres relative to the shape's centre, in pixels downwards.
      radius: radius in pixels.

    Returns:
      float32 [H, W], 0 to 1.
    """
    x = np.abs(dx, dtype=np.float32)[None, :] / np.float32(radius)
    y = np.asarray(dy, np.float32)[:, None] / np.float32(radius)
    distance = np.sqrt(x * x + y * y) - 1 if shape == "circle" else _polygon_distance(_EDGES[shape], x, y)
    return _clip(0.5 - distance * np.float32(radius))


def _polygon_distance(edges: tuple[np.ndarray, ...], x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Returns the signed distance (negative inside) of points x [1, W] >= 0, y [H, 1] to a polygon's right half.

    Args:
      edges: see `_edges`.
      x: [1, W].
      y: [H, 1].

    Returns:
      float32 [H, W].
    """
    start_x, start_y, step_x, step_y, inverse_length, slope = edges
    px, py = x - start_x, y - start_y  # [E, 1, W], [E, H, 1]
    t = _clip((px * step_x + py * step_y) * inverse_length)  # [E, H, W]
    squared = (px - t * step_x) ** 2 + (py - t * step_y) ** 2
    # Even-odd rule with a ray to the right, which never crosses the mirrored left half.
    crosses_row = (py >= 0) != (py >= step_y)
    inside = np.logical_xor.reduce(crosses_row & (px < py * slope), axis=0)
    distance = np.sqrt(squared.min(axis=0))
    return np.where(inside, -distance, distance)


def _clip(values: np.ndarray) -> np.ndarray:
    """Clips values to 0..1 in place. On arrays this small, the call overhead of `np.clip` exceeds its run time."""
    np.maximum(values, 0, out=values)
    return np.minimum(values, 1, out=values)


@functools.lru_cache(maxsize=8)
def _blank(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), BACKGROUND, np.uint8)


def render(scene: Scene, height: int, width: int) -> np.ndarray:
    """Renders a scene with anti-aliasing on the plain background, from back to front.

    If the aspect ratios of image and canvas differ, the canvas is centred along the longer side, so that neither shapes
    nor relations are distorted.

    Args:
      scene: the scene.
      height: height of the image in pixels.
      width: width of the image in pixels.

    Returns:
      uint8 [height, width, 3].
    """
    image = _blank(height, width).copy()
    scale, left, top = scene.canvas.in_pixels(height, width)
    for item in sorted(scene.objects, key=lambda item: -item.depth):
        _render_object(image, item, left + item.x * scale, top + item.y * scale, item.radius * scale)
    return image


def _render_object(image: np.ndarray, item: SceneObject, x: float, y: float, radius: float) -> None:
    height, width, _ = image.shape
    left, right = max(int(x - radius), 0), min(int(x + radius) + 2, width)
    top, bottom = max(int(y - radius), 0), min(int(y + radius) + 2, height)
    # Pixel k covers [k, k + 1], so its centre is at k + 0.5.
    dx = np.arange(left, right, dtype=np.float32) + np.float32(0.5 - x)
    dy = np.arange(top, bottom, dtype=np.float32) + np.float32(0.5 - y)
    alpha = coverage(item.shape, dx, dy, radius)[..., None]
    patch = image[top:bottom, left:right]
    blended = patch + alpha * (_COLORS[item.color] - patch)
    patch[:] = blended + np.float32(0.5)
