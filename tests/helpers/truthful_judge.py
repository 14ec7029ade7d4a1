"""A judge server that tells the truth about drawn scenes: it knows each scene by its picture, else by the caption."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image
from scripted_judge import Asked

from balcaprl.data.scenes.world import Scene
from balcaprl.rewards.scenes.judge import collect_claims, linguistic_scores
from balcaprl.rewards.scenes.parser import parse_caption
from balcaprl.types import Sample


def pixels_digest(image: Image.Image) -> str:
    return hashlib.sha256(np.asarray(image.convert("RGB")).tobytes()).hexdigest()


def truthful_answer(samples: Iterable[Sample], captions: Iterable[Sequence[str]]) -> Callable[[Asked], dict[str, Any]]:
    """The answer function for these samples and their captions; calls without an image are known by their caption."""
    by_pixels: dict[str, Scene] = {}
    by_text: dict[str, Scene] = {}
    for sample, texts in zip(samples, captions, strict=True):
        by_pixels[pixels_digest(sample.load_image())] = sample.facts
        for text in (sample.reference, *texts):
            assert by_text.setdefault(text, sample.facts) is sample.facts, "two scenes with the same text"

    def answer(asked: Asked) -> dict[str, Any]:
        text = asked.data.get("caption", asked.data.get("reference"))
        scene = by_text[text]
        if asked.image is not None:
            assert scene is by_pixels[pixels_digest(Image.open(io.BytesIO(asked.image)))], (
                "a caption beside another's image"
            )
        parsed = parse_caption(text)
        claims = collect_claims(scene, parsed)
        if asked.task == "decompose":
            return {"units": [f"{i}: {claim.text}" for i, claim in enumerate(claims.by_key.values())]}
        reply: dict[str, Any] = {}
        if asked.task in ("verify", "combined"):
            reply["assertions"] = [
                {
                    "text": f"{i}: {assertion.text}",
                    "quote": text[slice(*assertion.spans[0])],
                    "reason": "the scene graph",
                    "verified": assertion.verified,
                    "pointable": assertion.pointable,
                }
                for i, assertion in enumerate(claims.assertions())
            ]
        if asked.task in ("match", "combined"):
            reference = next(t for t, s in by_text.items() if s is scene)
            keys = list(collect_claims(scene, parse_caption(reference)).by_key)
            reply["units"] = {
                n: keys[int(u.partition(":")[0])] in claims.covered for n, u in asked.data["units"].items()
            }
        if asked.task in ("style", "combined"):
            reply |= zip(("clarity", "fluency", "coherence"), linguistic_scores(parsed, claims), strict=True)
        return reply

    return answer
