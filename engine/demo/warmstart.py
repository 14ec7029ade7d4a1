"""The demo's warm start: trains from scratch a tiny captioner that sees well and writes badly.

It is trained on drawn scenes in four supervised phases:

1. The image tower learns to see, through a linear head that is thrown away.
2. Bare attribute lists teach the text model to read what the tower saw.
3. Clean captions teach the text model to write.
4. Captions damaged at the rates of ``FlawRates`` teach it the flaws that reinforcement learning has to remove.

A model of this size that is trained only on flawed captions never learns to see. The seeds of the scenes come from the
training split.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.utils.data import DataLoader, IterableDataset

from balcaprl.assets import DEMO_TOKENIZER
from balcaprl.config import OptimConfig
from balcaprl.data.scenes.corpus import CaptionStyle, FlawRates, training_caption
from balcaprl.data.scenes.render import render
from balcaprl.data.scenes.world import COLOURS, FILLS, SHAPES, SIZES, Scene, SceneConfig, make_scene
from balcaprl.files.ownership import claim_folder

if TYPE_CHECKING:
    from collections.abc import Callable

PhaseStyle = Literal["tower", "labels", "clean", "flawed"]
INSTRUCTION = "Describe the image."


@dataclass(frozen=True)
class Phase:
    """One supervised phase."""

    style: PhaseStyle
    """``tower``: no captions, but targets that say what is in each part of the image. ``labels``: bare attribute lists.
    ``clean``: true, well-formed captions. ``flawed``: captions damaged at the stated rates."""
    steps: int
    lr: float
    """Peak learning rate, which is reached by a linear warm-up and followed by a cosine decay."""
    final_lr_ratio: float = 0.05
    warmup_steps: int = 30


_GRID_CLASSES = {"shape": SHAPES, "colour": tuple(COLOURS), "size": tuple(SIZES), "fill": FILLS}


@dataclass(frozen=True)
class WarmstartConfig:
    """Everything that determines the warm start."""

    seed: int = 0
    scenes: SceneConfig = field(default_factory=SceneConfig)
    tower_scenes: SceneConfig = field(default_factory=lambda: SceneConfig(count_weights=(0, 0, 0, 0, 1)))
    """Scenes on which the tower is trained; they are crowded, so that each image shows more."""
    batch_size: int = 32
    """Number of images, or of images with captions, per step."""
    bucket: int = 8
    """Number of batches made from captions that are sorted by length together, so that there is little padding."""
    weight_decay: float = 0.01
    beta2: float = 0.98
    max_grad_norm: float = 1.0
    hidden_size: int = 192
    num_layers: int = 4
    vision_hidden_size: int = 128
    vision_depth: int = 3
    rates: FlawRates = field(default_factory=FlawRates)
    """Rates of the flaws in the last phase's captions."""
    tower: Phase = Phase("tower", steps=2000, lr=2e-3)
    phases: tuple[Phase, ...] = (
        Phase("labels", steps=650, lr=1.5e-3),
        Phase("clean", steps=600, lr=1e-3),
        Phase("flawed", steps=300, lr=7e-4),
    )


def grid_targets(scene: Scene, tokens: int) -> torch.Tensor:
    """What each image token shows, as (tokens * tokens, 7): presence of an object, row, column and its four attributes.

    An object belongs to the token that holds its centre; the attributes of empty tokens are -100.
    """
    targets = torch.full((tokens, tokens, 3 + len(_GRID_CLASSES)), -100)
    targets[..., 0] = 0
    targets[..., 1] = torch.arange(tokens)[:, None]
    targets[..., 2] = torch.arange(tokens)[None, :]
    for item in scene.objects:
        row, column = (int(v * tokens / scene.side) for v in (item.y, item.x))
        targets[row, column, 0] = 1
        for index, (attribute, classes) in enumerate(_GRID_CLASSES.items()):
            targets[row, column, 3 + index] = classes.index(item.value(attribute))
    return targets.flatten(0, 1)


class _ImageBatches(IterableDataset):
    """Endless batches of processed images with ``grid_targets``; runs in a worker process."""

    def __init__(self, folder: Path, config: WarmstartConfig, first_scene: int) -> None:
        self.folder, self.config, self.first_scene = folder, config, first_scene

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        torch.set_num_threads(1)
        processor = _load_processor(self.folder)
        for start in itertools.count(self.first_scene, self.config.batch_size):
            scenes = [make_scene(start + i, self.config.tower_scenes) for i in range(self.config.batch_size)]
            batch = dict(processor.image_processor(images=[render(s) for s in scenes], return_tensors="pt"))
            batch["targets"] = torch.cat([grid_targets(s, s.side // 28) for s in scenes])
            yield batch


def train_tower(
    model: Any, folder: Path, config: WarmstartConfig, phase: Phase, first_scene: int, report: Callable[[str], None]
) -> None:
    """Train the image tower to tell what is in each token's part of the image.

    The tower learns through a linear head that is thrown away afterwards.
    """
    tokens = config.tower_scenes.side // 28
    sizes = [2, tokens, tokens, *(len(classes) for classes in _GRID_CLASSES.values())]
    tower = model.model.visual
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        head = torch.nn.Linear(config.hidden_size, sum(sizes))
    optimizer = _make_optimizer([*tower.parameters(), *head.parameters()], config)
    loader = DataLoader(_ImageBatches(folder, config, first_scene), batch_size=None, num_workers=1, prefetch_factor=4)
    started, hits = time.monotonic(), []
    for step, batch in zip(range(phase.steps), loader, strict=False):
        features = tower(batch["pixel_values"], grid_thw=batch["image_grid_thw"]).pooler_output
        scores = head(features).split(sizes, dim=-1)
        targets = batch["targets"].unbind(-1)
        loss = sum(torch.nn.functional.cross_entropy(s, t) for s, t in zip(scores, targets, strict=True))
        _update(optimizer, phase, step, loss, config)
        hits.append([float((s.argmax(-1) == t)[t >= 0].float().mean()) for s, t in zip(scores, targets, strict=True)])
        if (step + 1) % 50 == 0:
            report(
                f"tower {step + 1}/{phase.steps}: {np.mean(hits[-20:], 0).round(3)}, {time.monotonic() - started:.0f} s"
            )


def _make_optimizer(parameters: Any, config: WarmstartConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=1.0, betas=(0.9, config.beta2), weight_decay=config.weight_decay)


def _update(optimizer: torch.optim.AdamW, phase: Phase, step: int, loss: Any, config: WarmstartConfig) -> None:
    schedule = OptimConfig(
        lr=phase.lr, schedule="cosine", warmup_steps=phase.warmup_steps, min_lr_ratio=phase.final_lr_ratio
    )
    for group in optimizer.param_groups:
        group["lr"] = schedule.learning_rate(step, phase.steps)
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], config.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


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
                training_caption(scene, rng_of(scene), cast(CaptionStyle, self.phase.style), self.config.rates)
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

    return AutoProcessor.from_pretrained(folder, trust_remote_code=False)


def _encode(processor: Any, images: list[Any], captions: list[str]) -> dict[str, torch.Tensor]:
    """Return the processor's output and ``labels`` (B, T): the ids of the caption and its end token, -100 elsewhere."""
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


def train_phase(
    model: Any, folder: Path, config: WarmstartConfig, phase: Phase, first_scene: int, report: Callable[[str], None]
) -> None:
    """Train ``model`` in place on one phase of captions."""
    optimizer = _make_optimizer(model.parameters(), config)
    loader = DataLoader(
        _CaptionBatches(folder, config, phase, first_scene), batch_size=None, num_workers=1, prefetch_factor=4
    )
    model.train()
    started, losses, hits = time.monotonic(), [], []
    for step, batch in zip(range(phase.steps), loader, strict=False):
        labels = batch.pop("labels")[:, 1:]
        hidden = model.model(**batch).last_hidden_state[:, :-1][labels != -100]
        targets = labels[labels != -100]
        logits = model.lm_head(hidden)
        loss = torch.nn.functional.cross_entropy(logits.float(), targets)
        _update(optimizer, phase, step, loss, config)
        losses.append(loss.item())
        hits.append((logits.argmax(-1) == targets).float().mean().item())
        if (step + 1) % 20 == 0:
            report(
                f"{phase.style} {step + 1}/{phase.steps}: loss {np.mean(losses[-20:]):.3f}, "
                f"accuracy {np.mean(hits[-20:]):.3f}, {time.monotonic() - started:.0f} s"
            )


def build_warmstart(folder: Path, config: WarmstartConfig, report: Callable[[str], None] = print) -> Path:
    """Build the warm start's checkpoint folder from nothing but its configuration.

    Writes a stock transformers folder (bfloat16 weights) and ``warmstart.json``, which holds the configuration and the
    SHA-256 of the weights. The model after each phase is kept in ``<folder>.phases``, so a build that was interrupted
    starts again with the phase that it was in. On another kind of processor, the bits of the weights may differ.

    Raises:
        ForeignPathError: one of the two folders holds files that no warm start wrote.
        PathInUseError: another process builds there.
    """
    work = folder.with_name(folder.name + ".phases")
    with claim_folder(folder, "warmstart", option="out"), claim_folder(work, "warmstart-phases", option="out"):
        return _build(folder, work, config, report)


def _build(folder: Path, work: Path, config: WarmstartConfig, report: Callable[[str], None]) -> Path:
    from balcaprl.demo.tiny_models import build_tiny_qwen

    build_tiny_qwen(
        folder,
        Tokenizer.from_file(str(DEMO_TOKENIZER)),
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        vision_hidden_size=config.vision_hidden_size,
        vision_depth=config.vision_depth,
        seed=config.seed,
    )
    model: Any = _load_model(folder)
    first_scene = 0
    for index, phase in enumerate((config.tower, *config.phases)):
        done = work / f"{phase.style}-{_fingerprint(config, index)}"
        if done.is_dir():
            model = _load_model(done)
            report(f"{phase.style}: taken from {done}")
        else:
            train = train_tower if phase.style == "tower" else train_phase
            train(model, folder, config, phase, first_scene, report)
            model.save_pretrained(done.with_suffix(".partial"))
            done.with_suffix(".partial").rename(done)
        first_scene += phase.steps * config.batch_size
    model.to(torch.bfloat16).save_pretrained(folder)
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    recipe = {"config": asdict(config), "sha256": digest}
    (folder / "warmstart.json").write_text(json.dumps(recipe, indent=2) + "\n")
    return folder


def _load_model(folder: Path) -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)


def _fingerprint(config: WarmstartConfig, index: int) -> str:
    """Hash of everything that determines the model after phase ``index``.

    The flaw rates are part of it only from the first phase with flawed captions on.
    """
    plain = asdict(replace(config, phases=config.phases[:index]))
    if not any(phase.style == "flawed" for phase in config.phases[:index]):
        del plain["rates"]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]
