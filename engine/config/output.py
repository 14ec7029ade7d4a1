"""The sections ``evaluation``, ``checkpoint`` and ``logging``: what a run measures and keeps."""

from __future__ import annotations

from pydantic import Field, field_validator

from balcaprl.config.base import Section

STATE_FILE = "trainer_state.json"
"""File in a checkpoint folder with the trainer's state, which includes the configuration of its run."""

_COMPUTING = ("device", "attention", "gradient_checkpointing", "autocast", "fused_layers", "compile")
CHANGEABLE_FIELDS = (
    "optim",
    "loss",
    "advantage",
    "reward",
    "rollout",
    "data.path",
    *(f"model.{x}" for x in _COMPUTING),
)
"""Fields and sections that ``checkpoint.allow_changes`` may name. Of the others, some may always change
(``FREE_FIELDS`` in ``training/resume.py``); the rest decide what a checkpoint's tensors and data cursor mean."""


class EvaluationConfig(Section):
    """Evaluation on held-out images."""

    every: int = Field(0, ge=0)
    """Steps between evaluations; 0: only before and after training."""
    seed: int = Field(1234, ge=0, le=2**32 - 1)
    """Seed of the evaluation's sampling, the same at every evaluation."""
    batch_size: int = Field(64, ge=1, le=100_000)
    """Number of images that are captioned at once."""


class CheckpointConfig(Section):
    """Saving and resuming."""

    every: int = Field(50, ge=0)
    """Steps between saves; 0: only at the end and on SIGINT or SIGTERM."""
    keep: int = Field(2, ge=1)
    """Number of newest checkpoints that are kept."""
    resume: bool = True
    """Resume from the newest whole checkpoint in ``output_dir``, if there is one."""
    allow_changes: tuple[str, ...] = ()
    """Fields or sections in which a resumed run may differ from its start, such as ``optim.lr``. ``output_dir``,
    ``steps``, ``threads``, ``checkpoint``, ``logging``, ``evaluation`` and ``endpoint`` may always change."""

    @field_validator("allow_changes")
    @classmethod
    def _may_be_changed(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if not any(name == field or name.startswith(f"{field}.") for field in CHANGEABLE_FIELDS):
                raise ValueError(
                    f"{name} cannot be changed in a resumed run; these can: {', '.join(CHANGEABLE_FIELDS)}"
                )
        return names


class LoggingConfig(Section):
    """What a run writes besides its checkpoints."""

    tensorboard: bool = True
    """Write TensorBoard event files."""
    completions: bool = True
    """Keep every completion with its reward breakdown."""
    completions_part_mib: int = Field(32, ge=1, le=1024)
    """Size in MiB at which the lines of ``completions.jsonl`` or ``eval_captions.jsonl`` are moved to a compressed
    part, about a tenth as large (ours)."""
    completions_max_mib: int = Field(1024, ge=1)
    """Bound on the size of all compressed parts of either file together, in MiB. The oldest captions are removed,
    except those of the first evaluations (ours)."""
