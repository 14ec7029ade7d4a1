"""The scenes world: what can be in a drawn image, and how a seed becomes a scene graph.

A scene is 2 to 6 objects on a plain background. Each object has a shape, a colour, a size, a fill and a place (a cell
of a 3 x 3 grid). The seed determines everything. Some objects are small, partly hidden by a neighbour, or close to the
background in colour. Every further claim about such an object is a risk, so that precision and recall pull in opposite
directions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np

SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (244, 132, 28),
    "yellow": (248, 214, 52),
    "green": (44, 150, 72),
    "blue": (40, 92, 204),
    "purple": (132, 60, 172),
    "pink": (240, 138, 182),
    "brown": (118, 74, 44),
}
SIZES: dict[str, float] = {"small": 8.5, "medium": 12.0, "large": 16.5}
"""Radius in pixels, in an image of 112 x 112 pixels."""
FILLS = ("solid", "striped", "hollow")
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (232, 232, 232),
    "gray": (168, 168, 172),
    "black": (34, 34, 36),
    "beige": (226, 206, 160),
}
PLACES = (
    "top left",
    "top",
    "top right",
    "left",
    "center",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)
"""Cells of the 3 x 3 grid in reading order."""
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
ATTRIBUTES = ("shape", "colour", "size", "fill", "place")

Split = Literal["train", "validation"]
SPLIT_SIZE = 2**31
_BASE_SIDE = 112


@dataclass(frozen=True)
class SceneConfig:
    """Settings of the scene generator; rates are probabilities."""

    side: int = _BASE_SIDE
    """Width and height in pixels: 112 to 224, a multiple of 28."""
    count_weights: tuple[float, ...] = (0.34, 0.30, 0.20, 0.10, 0.06)
    """Probabilities of 2, 3, 4, 5 and 6 objects."""
    occlusion_rate: float = 0.15
    """Probability that two neighbours are pushed together until one hides part of the other."""
    colour_jitter: int = 10
    """Largest change of each colour channel of an object, on a scale of 255. A background's brightness changes by half
    of it at most."""
    light: float = 16.0
    """Strength of the uneven light on the background, on a scale of 255."""
    noise: float = 3.0
    """Standard deviation of the pixel noise, on a scale of 255."""

    def __post_init__(self) -> None:
        if not 112 <= self.side <= 224 or self.side % 28:
            raise ValueError(f"side must be a multiple of 28 from 112 to 224, not {self.side}")
        if len(self.count_weights) != 5 or not math.isclose(sum(self.count_weights), 1.0, abs_tol=1e-6):
            raise ValueError("count_weights must be five probabilities (2 to 6 objects) that sum to 1")


@dataclass(frozen=True)
class SceneObject:
    """One drawn object, with its centre ``x`` and ``y`` and about half its extent, ``radius``, in pixels.

    Objects are drawn in the order of ``depth``, the lowest first.
    """

    shape: str
    colour: str
    size: str
    fill: str
    place: str
    x: float
    y: float
    radius: float
    depth: int

    def value(self, attribute: str) -> str:
        """Return the object's true value of one of ``ATTRIBUTES``."""
        return str(getattr(self, attribute))


@dataclass(frozen=True)
class Scene:
    """A scene graph: objects in reading order, the background, and the relations that follow from them."""

    seed: int
    config: SceneConfig
    background: str
    objects: tuple[SceneObject, ...]
    pixel_seed: int = field(repr=False, default=0)

    @property
    def side(self) -> int:
        """Width and height in pixels."""
        return self.config.side

    @cached_property
    def relations(self) -> frozenset[tuple[int, str, int]]:
        """All true (object index, relation, object index).

        Objects whose centres differ by at most a tenth of the side on an axis have no relation on that axis.
        """
        margin = 0.1 * self.side
        true: set[tuple[int, str, int]] = set()
        for i, a in enumerate(self.objects):
            for j, b in enumerate(self.objects):
                if a.x < b.x - margin:
                    true |= {(i, "left of", j), (j, "right of", i)}
                if a.y < b.y - margin:
                    true |= {(i, "above", j), (j, "below", i)}
        return frozenset(true)


def scene_seed(split: Split, index: int) -> int:
    """Return the seed of the ``index``-th scene of a split; the two splits share no seed."""
    if not 0 <= index < SPLIT_SIZE:
        raise IndexError(f"scene index {index} is outside [0, {SPLIT_SIZE})")
    return index if split == "train" else SPLIT_SIZE + index


def make_scene(seed: int, config: SceneConfig | None = None) -> Scene:
    """Return the scene of a seed; the same seed and config always give the same scene."""
    config = config or SceneConfig()
    rng = np.random.default_rng([0x5CE7E, seed])
    count = int(rng.choice(5, p=config.count_weights)) + 2
    cells = np.sort(rng.choice(9, size=count, replace=False))
    kinds = rng.choice(len(SHAPES) * len(COLOURS), size=count, replace=False)
    sizes = rng.choice(list(SIZES), size=count)
    fills = rng.choice(FILLS, size=count)
    depths = rng.permutation(count)
    radii = [SIZES[size] * config.side / _BASE_SIDE * rng.uniform(0.94, 1.06) for size in sizes]
    centres = _place_centres(cells, radii, config, rng)
    colours = list(COLOURS)
    objects = tuple(
        SceneObject(
            shape=SHAPES[int(kinds[i]) % len(SHAPES)],
            colour=colours[int(kinds[i]) // len(SHAPES)],
            size=str(sizes[i]),
            fill=str(fills[i]),
            place=PLACES[int(cells[i])],
            x=centres[i][0],
            y=centres[i][1],
            radius=float(radii[i]),
            depth=int(depths[i]),
        )
        for i in range(count)
    )
    background = str(rng.choice(list(BACKGROUNDS)))
    return Scene(seed, config, background, objects, pixel_seed=int(rng.integers(2**31)))


def _place_centres(
    cells: np.ndarray, radii: list[float], config: SceneConfig, rng: np.random.Generator
) -> list[tuple[float, float]]:
    """Return a centre inside each object's cell; sometimes two neighbours are moved together until they overlap."""
    cell = config.side / 3
    centres: list[list[float]] = []
    for index, radius in zip(cells, radii, strict=True):
        row, column = divmod(int(index), 3)
        slack = max(0.0, min(0.25 * cell, cell / 2 - radius))
        dx, dy = rng.uniform(-slack, slack, size=2)
        centres.append([(column + 0.5) * cell + dx, (row + 0.5) * cell + dy])
    if rng.uniform() < config.occlusion_rate:
        pairs = [(i, j) for i in range(len(cells)) for j in range(i) if _adjacent(int(cells[i]), int(cells[j]))]
        if pairs:
            _overlap(centres, *pairs[int(rng.integers(len(pairs)))], cells=cells, radii=radii, cell=cell)
    return [(float(x), float(y)) for x, y in centres]


def _adjacent(a: int, b: int) -> bool:
    return abs(a // 3 - b // 3) + abs(a % 3 - b % 3) == 1


def _overlap(centres: list[list[float]], i: int, j: int, *, cells: np.ndarray, radii: list[float], cell: float) -> None:
    """Move objects i and j towards each other along their common axis; each centre stays in its own cell."""
    axis = 0 if int(cells[i]) // 3 == int(cells[j]) // 3 else 1
    first, second = (i, j) if centres[i][axis] < centres[j][axis] else (j, i)
    border = cell * (int(cells[second]) % 3 if axis == 0 else int(cells[second]) // 3)
    gap = max(0.12 * cell, 0.35 * (radii[i] + radii[j]))
    centres[first][axis] = max(centres[first][axis], border - gap)
    centres[second][axis] = min(centres[second][axis], border + gap)
    mean = (centres[i][1 - axis] + centres[j][1 - axis]) / 2
    centres[i][1 - axis] = centres[j][1 - axis] = mean
