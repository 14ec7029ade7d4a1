"""Provides drawn scenes as samples of a dataset."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from balcaprl.data.scenes.caption import reference_caption
from balcaprl.data.scenes.render import render
from balcaprl.data.scenes.world import SPLIT_SIZE, SceneConfig, Split, make_scene, scene_seed
from balcaprl.types import Sample


def scene_sample(split: Split, index: int, *, instruction: str, config: SceneConfig | None = None) -> Sample:
    """Return the ``index``-th scene of a split as a sample; its scene graph is in ``facts``."""
    scene = make_scene(scene_seed(split, index), config)
    return Sample(
        sample_id=f"{split}-{index}",
        load_image=partial(render, scene),
        reference=reference_caption(scene),
        instruction=instruction,
        facts=scene,
    )


@dataclass(frozen=True)
class SceneSource:
    """All scenes of a split, drawn when they are asked for."""

    split: Split
    instruction: str
    config: SceneConfig

    def __len__(self) -> int:
        return SPLIT_SIZE

    def __getitem__(self, index: int) -> Sample:
        return scene_sample(self.split, index, instruction=self.instruction, config=self.config)


def scene_samples(split: Split, *, instruction: str, config: SceneConfig | None = None) -> SceneSource:
    """Return the scenes of a split, indexed from 0; training and validation share no seed."""
    return SceneSource(split, instruction, config or SceneConfig())
