"""Drawn scenes: images whose whole content is known, so that a judge can be exact."""

from balcaprl.data.scenes.corpus import FlawRates, flawed_caption
from balcaprl.data.scenes.samples import SceneSource, scene_sample, scene_samples
from balcaprl.data.scenes.world import Scene, SceneConfig, SceneObject, make_scene, scene_seed

__all__ = [
    "FlawRates",
    "Scene",
    "SceneConfig",
    "SceneObject",
    "SceneSource",
    "flawed_caption",
    "make_scene",
    "scene_sample",
    "scene_samples",
    "scene_seed",
]
