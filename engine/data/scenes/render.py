"""Draws a scene: each object from its signed distance field, so that edges are antialiased without supersampling."""

from __future__ import annotations

from functools import cache, lru_cache

import numpy as np
from PIL import Image

from balcaprl.data.scenes.world import BACKGROUNDS, COLOURS, Scene, SceneObject


def render(scene: Scene) -> Image.Image:
    """Return the scene as a square RGB image of ``scene.side`` pixels a side; a scene always gives the same pixels."""
    rng = np.random.default_rng(scene.pixel_seed)
    jitter = scene.config.colour_jitter
    background = np.asarray(BACKGROUNDS[scene.background]) + rng.integers(-jitter, jitter + 1) / 2
    canvas = background.astype(np.float32) + _light(scene.side, scene.config.light)
    for item in sorted(scene.objects, key=lambda o: o.depth):
        colour = np.asarray(COLOURS[item.colour]) + rng.integers(-jitter, jitter + 1, size=3)
        _draw(canvas, item, colour.astype(np.float32))
    canvas += rng.standard_normal(canvas.shape, np.float32) * scene.config.noise
    return Image.fromarray(np.clip(canvas + 0.5, 0, 255).astype(np.uint8), "RGB")


@lru_cache(maxsize=8)
def _light(side: int, strength: float) -> np.ndarray:
    """Return light from above and a warm tint from the left, so that top and bottom differ as in real pictures."""
    ramp = np.linspace(strength, -strength, side, dtype=np.float32)
    light = np.repeat(np.repeat(ramp[:, None, None], side, 1), 3, 2)
    light[..., 0] += ramp[None, :]
    light[..., 2] -= ramp[None, :]
    return light


def _draw(canvas: np.ndarray, item: SceneObject, colour: np.ndarray) -> None:
    """Blend one object into the canvas; only the pixels around it are computed."""
    side = canvas.shape[0]
    reach = item.radius * 1.3 + 2
    x0, x1 = max(0, int(item.x - reach)), min(side, int(item.x + reach) + 1)
    y0, y1 = max(0, int(item.y - reach)), min(side, int(item.y + reach) + 1)
    dx = np.arange(x0, x1, dtype=np.float32)[None, :] + 0.5 - np.float32(item.x)
    dy = np.arange(y0, y1, dtype=np.float32)[:, None] + 0.5 - np.float32(item.y)
    alpha = _fill_alpha(item, _signed_distance(item.shape, dx, dy, item.radius), dx, dy)[..., None]
    patch = canvas[y0:y1, x0:x1]
    patch += alpha * (colour - patch)


def _fill_alpha(item: SceneObject, distance: np.ndarray, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """Return the share of each pixel, from 0 to 1, that the object covers with its fill."""
    inside = np.clip(0.5 - distance, 0, 1)
    if item.fill == "solid":
        return inside
    line = max(1.5, 0.16 * item.radius)
    outline = inside - np.clip(0.5 - (distance + line), 0, 1)
    if item.fill == "hollow":
        return outline
    period = max(4.0, 0.5 * item.radius)
    phase = np.abs(np.mod((dx + dy) / np.float32(np.sqrt(2)), period) - period / 2)
    stripes = np.clip(0.5 + period / 4 - phase, 0, 1)
    return np.maximum(outline, inside * stripes)


def _signed_distance(shape: str, dx: np.ndarray, dy: np.ndarray, radius: float) -> np.ndarray:
    """Return the distance in pixels to the shape's edge, negative inside, for a grid of offsets from the centre."""
    if shape == "circle":
        return np.hypot(dx, dy) - np.float32(0.95 * radius)
    return _polygon_distance(_polygon(shape) * np.float32(radius), dx, dy)


@cache
def _polygon(shape: str) -> np.ndarray:
    """Return the vertices (N, 2) of a unit shape; y points downwards."""
    if shape == "square":
        return np.array([(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)], np.float32)
    if shape == "diamond":
        return np.array([(0, -1.2), (0.85, 0), (0, 1.2), (-0.85, 0)], np.float32)
    if shape == "triangle":
        return np.array([(0, -1.1), (1.08, 0.85), (-1.08, 0.85)], np.float32)
    if shape == "star":
        angles = np.pi * (np.arange(10) / 5 - 0.5)
        radii = np.where(np.arange(10) % 2 == 0, 1.2, 0.5)
        return np.stack([radii * np.cos(angles), radii * np.sin(angles)], 1).astype(np.float32)
    if shape == "cross":
        a, b = 0.36, 1.05
        return np.array(
            [
                (-a, -b),
                (a, -b),
                (a, -a),
                (b, -a),
                (b, a),
                (a, a),
                (a, b),
                (-a, b),
                (-a, a),
                (-b, a),
                (-b, -a),
                (-a, -a),
            ],
            np.float32,
        )
    raise ValueError(f"no such shape: {shape}")


def _polygon_distance(vertices: np.ndarray, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """Return the signed distance to a simple polygon: to its nearest edge, with the sign from the even-odd rule."""
    start, end = vertices, np.roll(vertices, -1, axis=0)
    edge = end - start
    px = dx[None] - start[:, 0, None, None]
    py = dy[None] - start[:, 1, None, None]
    ex, ey = edge[:, 0, None, None], edge[:, 1, None, None]
    along = np.clip((px * ex + py * ey) / (ex * ex + ey * ey), 0, 1)
    nearest = np.sqrt(((px - along * ex) ** 2 + (py - along * ey) ** 2).min(0))
    crosses = (py >= 0) != (py >= ey)
    left_of = (ex * py - ey * px) * np.sign(ey) < 0
    inside = (crosses & left_of).sum(0) % 2 == 1
    return np.where(inside, -nearest, nearest)
