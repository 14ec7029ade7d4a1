"""Computes the output of a frozen image tower once per batch, for all its uses: policy, reference and later epochs.

The projection into the text model stays trainable when the tower is frozen, so only the projection's input can be
cached. Other stock code (window order, splitting) surrounds the projections. That code therefore runs with stand-ins
for the projections, which return their input, and the real projections are applied to the result.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from balcaprl.policy.families import Family, ImageFeatures


class _HandThrough(nn.Module):
    """Stands in for a projection: returns its input, with the tower rows of one image token grouped on an axis.

    The input is (..., tower width). The output is the input if a token has one row, otherwise (N, rows, tower width).
    """

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, x: Tensor) -> Tensor:
        return x if self.rows == 1 else x.reshape(-1, self.rows, x.shape[-1])


@contextmanager
def _projections_replaced(projections: list[tuple[nn.Module, str]], rows: int) -> Iterator[list[nn.Module]]:
    """Replace the projections in the model within the context; yields the originals."""
    originals: list[nn.Module] = []
    for parent, name in projections:
        module = parent._modules[name]
        assert module is not None  # the family names only modules that exist
        originals.append(module)
        parent._modules[name] = _HandThrough(rows)
    try:
        yield originals
    finally:
        for (parent, name), module in zip(projections, originals, strict=True):
            parent._modules[name] = module


def is_frozen(modules: list[nn.Module]) -> bool:
    """Whether there is a tower and none of its parameters is trained."""
    parameters = [p for module in modules for p in module.parameters()]
    return bool(parameters) and not any(p.requires_grad for p in parameters)


def frozen_tower_features(
    family: Family, model: Any, image_inputs: dict[str, Tensor], cache: dict[Any, ImageFeatures]
) -> ImageFeatures:
    """Compute ``family.image_features``, with the frozen tower's part taken from ``cache`` if it is there.

    ``cache`` belongs to these image inputs. A key consists of the tower's modules and whether autocast is on, so a
    reference policy that holds the same frozen modules uses the same entry.
    """
    tower, projections = family.vision_modules(model), family.projections(model)
    key = (*(id(module) for module in tower), torch.is_autocast_enabled(next(tower[0].parameters()).device.type))
    rows = family.projected_rows(model.config)
    if key not in cache:
        with _projections_replaced(projections, rows), torch.no_grad():
            cache[key] = family.image_features(model, image_inputs)
    modules = [parent._modules[name] for parent, name in projections]
    raw = [cache[key].embeds, *cache[key].deepstack]
    if rows > 1:
        raw = [x.flatten(0, 1) for x in raw]
    embeds, *deepstack = (module(x) for module, x in zip(modules, raw, strict=True))  # type: ignore[misc]
    return ImageFeatures(embeds, tuple(deepstack))
