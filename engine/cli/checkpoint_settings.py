"""What a checkpoint may decide about its own evaluation.

A checkpoint's ``trainer_state.json`` holds the configuration of its run. A checkpoint often comes from somebody else,
so this configuration is not trusted: a value is used only if all it can change is the result of the evaluation and,
within fixed bounds, the memory that it needs. The checkpoint never chooses a server, key, path or program. Those come
from the user's ``--config`` and overrides, or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from balcaprl.config import STATE_FILE, TrainConfig
from balcaprl.files import manifest
from balcaprl.files.jsonl import read_json
from balcaprl.types import REWARD_NAMES

_MAX_STATE_BYTES = 16 << 20


def _any(_: Any) -> bool:
    return True


def _one_of(*allowed: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and value in allowed


def _at_most(bound: float) -> Callable[[Any], bool]:
    return lambda value: type(value) in (int, float) and value <= bound


def _short_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 4096


def _few_short_texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) <= 16 and all(map(_short_text, value))


def _of_the_three(value: Any) -> bool:
    """Whether all conditions use only the three rewards that every run has; any other name is a custom reward."""
    return (
        isinstance(value, list)
        and len(value) <= 16
        and all(isinstance(c, dict) and c.get("reward") in REWARD_NAMES and c.get("on") in REWARD_NAMES for c in value)
    )


_TAKEN: dict[str, Callable[[Any], bool]] = {
    "seed": _at_most(1 << 62),
    "model.dtype": _any,
    "model.attention": _one_of("sdpa", "eager"),  # other values may load kernels from elsewhere
    "data.kind": _one_of("scenes"),
    "data.instruction": _short_text,
    "data.max_pixels": _at_most(4_014_080),
    "data.num_eval": _at_most(2048),
    "rollout.sampler": _one_of("auto", "vllm", "hf"),
    "rollout.sampling.temperature": _at_most(100),
    "rollout.sampling.max_completion_tokens": _at_most(4096),
    "rollout.sampling.stop": _few_short_texts,
    "reward.judge": _one_of("auto", "scene", "lexical"),
    "reward.precision_weight": _at_most(1e6),
    "reward.recall_weight": _at_most(1e6),
    "reward.linguistic_weight": _at_most(1e6),
    "reward.length_rule": _any,
    "reward.tau_low": _at_most(1e6),
    "reward.tau_high": _at_most(1e6),
    "reward.length_unit": _any,
    "reward.conditions": _of_the_three,
    "evaluation.seed": _at_most(1 << 62),
    "evaluation.batch_size": _at_most(256),
}
"""Fields that may be taken from a checkpoint, each with a check of its value. All other fields are left out, so that a
new field is taken only after somebody has thought about it. The configuration itself checks types and lower bounds."""
_UNUSED = (
    "output_dir", "steps", "threads", "advantage", "loss", "optim", "checkpoint", "logging", "evaluation.every",
    "model.path", "model.freeze_vision", "model.gradient_checkpointing", "model.autocast", "model.fused_layers",
    "model.compile", "data.shuffle", "rollout.prompts_per_step", "rollout.group_size", "rollout.max_staleness",
    "rollout.sampling_kl_limit", "reward.required_share", "reward.max_flat_steps",
)  # fmt: skip
"""Fields and sections that only training uses, so the user is not told that they are left out. Only ``model.path`` is
read by an evaluation too, for the base of an adapter."""
_NEVER = {
    "a checkpoint names no servers, keys, files or code": (
        "data.path", "data.image_root", "rollout.server_url", "rollout.server_weights_dir", "rollout.server_api_key_env",
        "reward.custom", "endpoint.servers", "endpoint.cache", "endpoint.units",
    ),
    "a checkpoint does not decide how this machine is used": (
        "model.device", "data.max_source_pixels", "data.max_file_bytes", "data.check_headers", "rollout.sync",
        "rollout.sync_probe", "rollout.vllm_memory_gib", "rollout.vllm_gpu_memory_utilization", "rollout.vllm_sleep",
    ),
    "a checkpoint does not decide what a judge model is asked, or how": ("reward.protocol", "endpoint"),
}  # fmt: skip
"""Reason -> fields and sections that are left out for that reason, whatever their value. The first match counts."""
_VALUE = "a checkpoint does not choose these values"
"""Reason for a field in ``_TAKEN`` whose value its check, or the configuration, refuses."""
_UNKNOWN = "they are no fields of the configuration"


@dataclass
class CheckpointSettings:
    """Settings that were taken from a checkpoint, and those that were not."""

    taken: dict[str, Any] = field(default_factory=dict)
    """Part of a ``TrainConfig``, as nested plain values."""
    left_out: dict[str, list[str]] = field(default_factory=dict)
    """Reason -> names of the fields that matter for an evaluation and differ from their defaults but were not taken.
    Keys that are not fields of the configuration are only counted, because their names are not trusted either."""
    data_kind: str = "scenes"
    """Kind of data that the run was trained on, according to its configuration."""


def read_checkpoint_settings(checkpoint: Path) -> CheckpointSettings | None:
    """Settings that a checkpoint folder may choose for its own evaluation; None if it holds no trainer state.

    Raises:
        ValueError: the trainer state cannot be read, is not the one that was saved, or holds no configuration.
    """
    path = checkpoint / STATE_FILE
    damage = manifest.damage(checkpoint, lambda name: name == STATE_FILE)
    if damage is not None:
        raise ValueError(f"{checkpoint}: {damage}")
    try:
        state = read_json(path, _MAX_STATE_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return None
    config = state.get("config") if isinstance(state, dict) else None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no configuration of a run; name a recipe with --config")
    return harmless_settings(config)


def harmless_settings(config: dict[str, Any]) -> CheckpointSettings:
    """Sort the plain values of an untrusted configuration into those that are taken and those that are left out."""
    defaults = dict(_leaves(TrainConfig, TrainConfig().model_dump(mode="json")))
    said = {name: _get(config, name) for name in defaults}
    said = {name: value for name, value in said.items() if value is not None and value != defaults[name]}
    taken = _valid({name: value for name, value in said.items() if name in _TAKEN and _TAKEN[name](value)})
    left_out: dict[str, list[str]] = {}
    for name in said:
        if name not in taken and not _is_within(name, _UNUSED):
            left_out.setdefault(_why_left_out(name), []).append(name)
    num_unknown = _count_unknown(TrainConfig, config)
    if num_unknown:
        left_out[_UNKNOWN] = [f"{num_unknown} unknown keys"]
    kind = said.get("data.kind")
    return CheckpointSettings(
        taken=_nested(taken),
        left_out=left_out,
        data_kind=kind if isinstance(kind, str) else "scenes",
    )


def _why_left_out(name: str) -> str:
    return next((why for why, names in _NEVER.items() if _is_within(name, names)), _VALUE)


def _is_within(name: str, names: Iterable[str]) -> bool:
    """Whether a field is one of ``names``, or lies in a section that is."""
    return any(f"{name}.".startswith(f"{each}.") for each in names)


def _valid(values: dict[str, Any]) -> dict[str, Any]:
    """The given values without those that the configuration rejects."""
    values = dict(values)
    while values:
        try:
            TrainConfig.model_validate(_nested(values))
            break
        except ValidationError as error:
            wrong = tuple(".".join([*map(str, problem["loc"]), ""]) for problem in error.errors())
            # A problem may be located inside a value, at a value, at a section, or at the whole configuration.
            keep = {
                n: v
                for n, v in values.items()
                if not any(f"{n}.".startswith(w) or w.startswith(f"{n}.") for w in wrong)
            }
            values = keep if len(keep) < len(values) else {}
    return values


def _leaves(model: type[BaseModel], values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of all fields that are not sections."""
    for name, about in model.model_fields.items():
        section = about.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            yield from _leaves(section, values[name], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", values[name]


def _get(values: Any, name: str) -> Any:
    for key in name.split("."):
        values = values.get(key) if isinstance(values, dict) else None
    return values


def _nested(values: dict[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, value in values.items():
        *sections, last = name.split(".")
        here = nested
        for key in sections:
            here = here.setdefault(key, {})
        here[last] = value
    return nested


def _count_unknown(model: type[BaseModel], values: Any) -> int:
    if not isinstance(values, dict):
        return 0
    count = 0
    for key, value in values.items():
        about = model.model_fields.get(key)
        section = about.annotation if about is not None else None
        if about is None:
            count += 1
        elif isinstance(section, type) and issubclass(section, BaseModel):
            count += _count_unknown(section, value)
    return count
