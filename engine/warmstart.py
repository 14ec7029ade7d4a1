"""The demo's warm start: a tiny captioner that sees well and writes badly, made from scratch.

Three supervised phases on drawn scenes: bare attribute lists, from which the model learns to see; clean captions, from which
it learns to write; then captions damaged at the stated rates of ``FlawRates``, from which it learns the flaws that
reinforcement learning has to remove. (Trained on flawed captions alone, a model of this size never learns to see.) Seeds
come from the training split.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from balcaprl.data.scenes.corpus import CaptionStyle, FlawRates, flawed_caption, training_caption
from balcaprl.data.scenes.render import render
from balcaprl.data.scenes.world import Scene, SceneConfig, make_scene

if TYPE_CHECKING:
    from collections.abc import Callable

INSTRUCTION = "Describe the image."
_CORPUS_SIZE = 4000


@dataclass(frozen=True)
class Phase:
    """One supervised phase."""

    style: CaptionStyle
    """``labels``: bare attribute lists. ``clean``: true, well-formed captions. ``flawed``: damaged at the stated rates."""
    steps: int
    lr: float
    """Peak learning rate; it warms up linearly and falls along a cosine."""
    final_lr_ratio: float = 0.05
    warmup_steps: int = 30


@dataclass(frozen=True)
class WarmstartConfig:
    """Everything that determines the warm start."""

    seed: int = 0
    scenes: SceneConfig = field(default_factory=SceneConfig)
    batch_size: int = 32
    """Captions of one step."""
    bucket: int = 8
    """Batches whose captions are sorted by length together, so that little is padding."""
    weight_decay: float = 0.01
    beta2: float = 0.98
    max_grad_norm: float = 1.0
    hidden_size: int = 192
    num_layers: int = 4
    vision_hidden_size: int = 128
    vision_depth: int = 3
    rates: FlawRates = field(default_factory=FlawRates)
    """Flaws of the last phase's captions."""
    phases: tuple[Phase, ...] = (
        Phase("labels", steps=1300, lr=1.5e-3),
        Phase("clean", steps=400, lr=1e-3),
        Phase("flawed", steps=200, lr=5e-4),
    )


class _CaptionBatches(IterableDataset):
    """Endless processed batches of (prompt, image, caption) for one phase; runs in a worker process."""

    def __init__(self, folder: Path, config: WarmstartConfig, phase: Phase, first_scene: int) -> None:
        self.folder, self.config, self.phase, self.first_scene = folder, config, phase, first_scene

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        torch.set_num_threads(1)
        processor = _load_processor(self.folder)
        size = self.config.batch_size * self.config.bucket
        index = self.first_scene

        def rng_of(scene: Scene) -> np.random.Generator:
            return np.random.default_rng([0x7EAC4, self.config.seed, scene.seed])

        while True:
            scenes = [make_scene(index + i, self.config.scenes) for i in range(size)]
            captions = [
                training_caption(scene, rng_of(scene), self.phase.style, self.config.rates)
                for scene in scenes
            ]
            order = sorted(range(size), key=lambda i: len(captions[i]))
            starts = np.random.default_rng([self.config.seed, index]).permutation(self.config.bucket)
            for start in starts * self.config.batch_size:
                rows = order[start : start + self.config.batch_size]
                yield _encode(processor, [render(scenes[i]) for i in rows], [captions[i] for i in rows])
            index += size


def _load_processor(folder: Path) -> Any:
    from balcaprl.torchvision_compat import ensure_importable

    ensure_importable()
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(folder)


def _encode(processor: Any, images: list[Any], captions: list[str]) -> dict[str, torch.Tensor]:
    """Processor output with ``labels`` (B, T): the caption and its end, -100 elsewhere."""
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": INSTRUCTION}]}
    prompt = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    end = processor.tokenizer.eos_token
    texts = [prompt + caption + end for caption in captions]
    batch = dict(processor(images=images, text=texts, return_tensors="pt", padding=True, padding_side="right"))
    lengths = [len(ids) for ids in processor.tokenizer([caption + end for caption in captions]).input_ids]
    ends = batch["attention_mask"].sum(1)
    positions = torch.arange(batch["input_ids"].shape[1])[None]
    is_caption = (positions < ends[:, None]) & (positions >= (ends - torch.tensor(lengths))[:, None])
    batch["labels"] = batch["input_ids"].where(is_caption, -100)
    return batch


def _learning_rate(phase: Phase, step: int) -> float:
    if step < phase.warmup_steps:
        return phase.lr * (step + 1) / phase.warmup_steps
    progress = (step - phase.warmup_steps) / max(1, phase.steps - phase.warmup_steps)
    return phase.lr * (phase.final_lr_ratio + (1 - phase.final_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))


def train_phase(
    model: Any, folder: Path, config: WarmstartConfig, phase: Phase, first_scene: int, report: Callable[[str], None]
) -> None:
    """Train ``model`` in place on one phase of captions."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=phase.lr, betas=(0.9, config.beta2), weight_decay=config.weight_decay
    )
    loader = DataLoader(
        _CaptionBatches(folder, config, phase, first_scene), batch_size=None, num_workers=1, prefetch_factor=4
    )
    model.train()
    started, losses, hits = time.monotonic(), [], []
    for step, batch in zip(range(phase.steps), loader):
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(phase, step)
        labels = batch.pop("labels")[:, 1:]
        hidden = model.model(**batch).last_hidden_state[:, :-1][labels != -100]
        targets = labels[labels != -100]
        logits = model.lm_head(hidden)
        loss = torch.nn.functional.cross_entropy(logits.float(), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        hits.append((logits.argmax(-1) == targets).float().mean().item())
        if (step + 1) % 20 == 0:
            report(
                f"{phase.style} {step + 1}/{phase.steps}: loss {np.mean(losses[-20:]):.3f}, "
                f"accuracy {np.mean(hits[-20:]):.3f}, {time.monotonic() - started:.0f} s"
            )


def build_warmstart(folder: Path, config: WarmstartConfig, report: Callable[[str], None] = print) -> Path:
    """Build the warm start's checkpoint folder from its configuration alone.

    Writes a stock transformers folder (bfloat16 weights) and ``warmstart.json``: the recipe and the weights' SHA-256.
    The weights are not expected to be the same bits on another kind of processor.
    """
    from balcaprl.policy.tiny import build_tiny_qwen

    corpus = [
        flawed_caption(make_scene(i, config.scenes), np.random.default_rng([1, i]), config.rates)
        for i in range(_CORPUS_SIZE)
    ]
    build_tiny_qwen(
        folder,
        [*corpus, *[INSTRUCTION] * 2],
        max_vocab_size=768,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        vision_hidden_size=config.vision_hidden_size,
        vision_depth=config.vision_depth,
        seed=config.seed,
    )
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    first_scene = 0
    for phase in config.phases:
        train_phase(model, folder, config, phase, first_scene, report)
        first_scene += phase.steps * config.batch_size
        model.to(torch.float32).save_pretrained(folder / "phases" / phase.style)
    model.to(torch.bfloat16).save_pretrained(folder)
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    recipe = {"config": asdict(config), "sha256": digest}
    (folder / "warmstart.json").write_text(json.dumps(recipe, indent=2) + "\n")
    return folder
