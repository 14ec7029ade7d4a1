"""What may change when a run resumes, and what must be passed in again.

Every checkpoint holds the configuration and the *origin*: what the run began with that the configuration does not say.
The origin covers the content of the data, the judge or sampler that was passed to the trainer, the model beneath an
adapter, and the reference of the divergence. A policy that is passed in takes over the checkpoint's weights, so a
resumed run works with or without it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from balcaprl.checkpoints.checkpoint import TrainerState, list_checkpoints, newest_whole
from balcaprl.config import TrainConfig

logger = logging.getLogger(__name__)

# Fields and sections in which a resumed run may always differ from its start.
FREE_FIELDS = ("output_dir", "steps", "threads", "checkpoint", "logging", "evaluation", "endpoint")


def checkpoint_to_resume(config: TrainConfig) -> tuple[Path, TrainerState] | None:
    """The newest whole checkpoint of the run folder and its state; None if there is none.

    Raises:
        ValueError: the run may not resume, or not with this configuration.
    """
    if list_checkpoints(config.output_dir) and not config.checkpoint.resume:
        raise ValueError(
            f"{config.output_dir} holds a run with checkpoints, and checkpoint.resume is false: choose another "
            "output_dir, or remove the folder to start over"
        )
    found = newest_whole(config.output_dir)
    if found is not None:
        refuse_changed_config(found[1].config, config)
    return found


def changed_fields(saved: dict[str, Any], current: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """Every field that differs, as a dotted name with its values (then, now), in the order of the configuration.

    Args:
        saved: configuration in a checkpoint; fields that an older one lacks count as their defaults.
        current: configuration of the run.

    Raises:
        ValueError: ``saved`` is not a configuration of this version.
    """
    try:
        before = TrainConfig.model_validate(saved).model_dump(mode="json")
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:5])
        raise ValueError(
            f"the configuration of the run to resume is none of this version of balcaprl: {wrong}"
        ) from error
    then, now = dict(_flat(before)), dict(_flat(current.model_dump(mode="json")))
    return {name: (then.get(name), now.get(name)) for name in {**now, **then} if then.get(name) != now.get(name)}


def refuse_changed_config(saved: dict[str, Any], current: TrainConfig) -> None:
    """Refuse to resume a run if its configuration has changed in fields that may not change.

    Raises:
        ValueError: such fields differ; the message names each of them with both values.
    """
    changed = {
        name: values for name, values in changed_fields(saved, current).items() if not _within(name, FREE_FIELDS)
    }
    refused = [name for name in changed if not _within(name, current.checkpoint.allow_changes)]
    if refused:
        listed = "; ".join(f"{name}: {_shown(changed[name][0])} -> {_shown(changed[name][1])}" for name in refused)
        raise ValueError(
            f"the configuration differs from that of the run to resume: {listed}. Use another output_dir, restore the old "
            f"values, or, where the change is meant, list the names in checkpoint.allow_changes"
        )
    for name, (then, now) in changed.items():
        logger.warning("resuming with %s changed: %s -> %s (checkpoint.allow_changes)", name, _shown(then), _shown(now))


def tell_learning_rate(saved: dict[str, Any], current: TrainConfig, num_updates: int) -> None:
    """Log how the learning rate changes because the number of steps or the schedule has changed."""
    before = TrainConfig.model_validate(saved)
    totals = [config.steps * config.optim.epochs_per_batch for config in (before, current)]
    old, new = (
        config.optim.learning_rate(num_updates, total) for config, total in zip((before, current), totals, strict=True)
    )
    last = current.optim.learning_rate(max(0, totals[1] - 1), totals[1])
    scheduled = current.optim.schedule != "constant" and totals[0] != totals[1]
    if old == new and not scheduled:
        return
    logger.warning(
        "the learning rate follows optim.schedule %s over %d updates, and did over %d: at update %d it is %.3g (it would have "
        "been %.3g), at the last %.3g",
        current.optim.schedule,
        totals[1],
        totals[0],
        num_updates + 1,
        new,
        old,
        last,
    )


def refuse_other_origin(saved: dict[str, Any], current: dict[str, Any], allowed: tuple[str, ...] = ()) -> None:
    """Refuse to resume a run with data or parts that are not those with which it began.

    What an earlier version did not record is not compared.

    Args:
        saved: the origin in the checkpoint.
        current: the origin of this trainer.
        allowed: ``checkpoint.allow_changes``.

    Raises:
        ValueError: a part differs; the message names the part, and says what to do.
    """
    for part in ("judge", "sampler"):
        then, now = saved.get(part), current.get(part)
        if part in saved and then != now:
            began = f"with Trainer({part}=...), called {then!r}" if then else f"without a {part} of its own"
            passed = f"{now!r} is passed" if now else "none is passed"
            raise ValueError(
                f"the run to resume began {began}, and now {passed}: pass the same to Trainer as at its start"
            )
    if "data" in saved and saved["data"] != current.get("data") and not _within("data.path", allowed):
        raise ValueError(
            "data.path: its content is not that which the run to resume began with, and what the run has seen of it would be "
            "lost or repeated. Restore it, use another output_dir, or list data.path in checkpoint.allow_changes"
        )
    if saved.get("base") and current.get("base", saved["base"]) != saved["base"]:
        raise ValueError(
            "the adapter of the run to resume belongs to another model than the one that it is put on: the weights "
            "beneath it differ. Pass the policy made from the same model as at the start"
        )
    if saved.get("reference") and current.get("reference") and saved["reference"] != current["reference"]:
        raise ValueError(
            "loss.kl_coef: the reference of the run to resume were other weights than those now at hand, and the divergence "
            "would be measured from elsewhere. Restore model.path, or pass the policy as it was at the start of the run: its "
            "weights at the checkpoint are loaded by the trainer"
        )


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of nested mappings; a list is one value."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _within(name: str, fields: tuple[str, ...]) -> bool:
    return any(name == field or name.startswith(f"{field}.") for field in fields)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
