"""The scenes world: deterministic, varied, and true to its own captions."""

from collections import Counter

import numpy as np
import pytest

from balcaprl.data.scenes import SceneConfig, make_scene, scene_sample, scene_samples, scene_seed
from balcaprl.data.scenes.caption import reference_caption
from balcaprl.data.scenes.corpus import FlawRates, flawed_caption, label_list
from balcaprl.data.scenes.render import render
from balcaprl.data.scenes.world import BACKGROUNDS, COLOURS, FILLS, INVERSE, PLACES, SHAPES, SIZES

NO_FLAWS = FlawRates(**dict.fromkeys(FlawRates.__dataclass_fields__, 0.0))


def test_same_seed_gives_the_same_scene_pixels_and_reference():
    for seed in (0, 7, 2**31 + 5):
        first, second = make_scene(seed), make_scene(seed)
        assert first == second
        assert reference_caption(first) == reference_caption(second)
        assert np.array_equal(np.asarray(render(first)), np.asarray(render(second)))


def test_everything_that_can_be_drawn_is_drawn():
    scenes = [make_scene(seed) for seed in range(600)]
    items = [item for scene in scenes for item in scene.objects]
    assert {o.shape for o in items} == set(SHAPES)
    assert {o.colour for o in items} == set(COLOURS)
    assert {o.size for o in items} == set(SIZES)
    assert {o.fill for o in items} == set(FILLS)
    assert {o.place for o in items} == set(PLACES)
    assert {s.background for s in scenes} == set(BACKGROUNDS)
    counts = Counter(len(s.objects) for s in scenes)
    assert set(counts) == {2, 3, 4, 5, 6}
    assert all(len({(o.colour, o.shape) for o in s.objects}) == len(s.objects) for s in scenes)


def test_splits_share_no_seed():
    assert scene_seed("train", 2**31 - 1) < scene_seed("validation", 0)
    with pytest.raises(IndexError, match="scene index"):
        scene_seed("train", 2**31)
    train = {scene_samples("train", instruction="x")[i].facts.seed for i in range(50)}
    validation = {scene_samples("validation", instruction="x")[i].facts.seed for i in range(50)}
    assert not train & validation


@pytest.mark.parametrize("side", [112, 168, 224])
def test_objects_lie_in_their_cells_at_every_size(side):
    for seed in range(100):
        scene = make_scene(seed, SceneConfig(side=side))
        assert render(scene).size == (side, side)
        for item in scene.objects:
            column, row = int(item.x // (side / 3)), int(item.y // (side / 3))
            assert PLACES[3 * row + column] == item.place


def test_some_neighbours_overlap_and_most_do_not():
    def overlaps(scene):
        return any(
            np.hypot(a.x - b.x, a.y - b.y) < 0.85 * (a.radius + b.radius)
            for i, a in enumerate(scene.objects)
            for b in scene.objects[:i]
        )

    share = np.mean([overlaps(make_scene(seed)) for seed in range(500)])
    assert 0.01 < share < 0.25


def test_every_object_changes_its_pixels():
    """Nothing is drawn outside the image or in its background's own colour."""
    for seed in range(60):
        scene = make_scene(seed)
        pixels = np.asarray(render(scene)).astype(int)
        for item in scene.objects:
            x, y, r = int(item.x), int(item.y), int(item.radius) + 1
            patch = pixels[max(0, y - r) : y + r, max(0, x - r) : x + r]
            assert patch.std(axis=(0, 1)).max() > 6


def test_edges_are_antialiased():
    config = SceneConfig(noise=0.0, light=0.0, colour_jitter=0, occlusion_rate=0.0)
    pixels = np.asarray(render(make_scene(3, config)))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 40


def test_relations_are_antisymmetric():
    for seed in range(100):
        relations = make_scene(seed).relations
        assert all((b, INVERSE[name], a) in relations for a, name, b in relations)
        assert not any((b, name, a) in relations for a, name, b in relations)


@pytest.mark.parametrize(
    "bad", [{"side": 100}, {"side": 115}, {"count_weights": (1.0,)}, {"count_weights": (0.5,) * 5}]
)
def test_bad_configs_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        SceneConfig(**bad)


def test_a_sample_carries_image_reference_and_graph():
    sample = scene_sample("validation", 3, instruction="Describe the image.")
    assert sample.load_image().mode == "RGB"
    assert sample.reference == reference_caption(sample.facts)
    assert sample.sample_id == "validation-3"


def test_without_flaws_the_corpus_tells_every_attribute():
    for seed in range(30):
        scene = make_scene(seed)
        caption = flawed_caption(scene, np.random.default_rng(seed), NO_FLAWS).lower()
        for item in scene.objects:
            assert f"{item.size} {item.fill} {item.colour} {item.shape}" in caption
        assert all(item.shape in label_list(scene) for item in scene.objects)


def test_each_rate_acts_alone():
    """A rate of 1 changes captions; all others at 0 leave them clean."""
    scenes = [make_scene(seed) for seed in range(20)]

    def captions(rates):
        return [flawed_caption(scene, np.random.default_rng(scene.seed), rates) for scene in scenes]

    clean = captions(NO_FLAWS)
    for name in FlawRates.__dataclass_fields__:
        flawed = captions(FlawRates(**{**NO_FLAWS.__dict__, name: 1.0}))
        assert flawed != clean, name
