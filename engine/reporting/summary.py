"""``summary.json``: a run in a few numbers; its scores and times are those in the log files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from balcaprl.files.jsonl import number
from balcaprl.files.ownership import write_atomically
from balcaprl.reporting.metrics import EVALUATIONS, METRICS, read_jsonl

_SCORES = ("precision", "recall", "linguistic", "b_capscore", "length_ratio")
_COUNTS = ("num_images", "num_excluded")
"""Number of images over which the scores are means, and number of held-out samples left out; older logs lack these."""


def write_summary(output_dir: Path, *, sampler: str, seed: int, planned_steps: int | None = None) -> dict[str, Any]:
    """Write the summary of a run folder, and return it.

    ``before`` and ``after`` are the first and last evaluation of captions that are sampled from the policy's own
    distribution; ``before_greedy`` and ``after_greedy`` are those of greedy decoding. ``before_step`` and
    ``after_step`` are the steps of the sampled evaluations. If a run was interrupted before its second evaluation,
    ``after`` is null, which means that the trained policy was not evaluated.

    ``status`` is ``finished``, or ``interrupted`` if fewer than ``planned_steps`` steps are done. In the second case,
    ``note`` says at which step the trained policy was last evaluated, if at all. ``train_seconds`` is the time of all
    steps, without evaluations and start-up.
    """
    steps = {line["step"]: line for line in read_jsonl(output_dir / METRICS)}
    evaluations = read_jsonl(output_dir / EVALUATIONS)
    done = max(steps, default=0)
    finished = planned_steps is None or done >= planned_steps
    before, after = _first_and_last(evaluations, "sampled", done if finished else None)
    before_greedy, after_greedy = _first_and_last(evaluations, "greedy", done if finished else None)
    summary: dict[str, Any] = {
        "status": "finished" if finished else "interrupted",
        "before": _scores(before),
        "after": _scores(after),
        "before_greedy": _scores(before_greedy),
        "after_greedy": _scores(after_greedy),
        "before_step": before and before["step"],
        "after_step": after and after["step"],
        "steps": len(steps),
        "planned_steps": planned_steps,
        "train_seconds": round(math.fsum(_seconds(line) for line in steps.values()), 3),
        "sampler": sampler,
        "seed": seed,
    }
    if not finished:
        told = "has not been evaluated" if after is None else f"was last evaluated at step {after['step']}"
        summary["note"] = f"interrupted after step {done} of {planned_steps}: the trained policy {told}"
    write_atomically(output_dir / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
    return summary


def _first_and_last(evaluations: list[dict[str, Any]], mode: str, end: int | None) -> tuple[Any, Any]:
    """First and last evaluation of a mode; the last is None if there is only one, unless the run ended there."""
    chosen = [line for line in evaluations if line.get("mode") == mode]
    if not chosen:
        return None, None
    first, last = chosen[0], chosen[-1]
    return first, last if last["step"] > first["step"] or first["step"] == end else None


def _scores(evaluation: dict[str, Any] | None) -> dict[str, Any] | None:
    if evaluation is None:
        return None
    counts = {name: evaluation[name] for name in _COUNTS if name in evaluation}
    return {**{name: evaluation.get(name) for name in _SCORES}, **counts}


def _seconds(line: dict[str, Any]) -> float:
    seconds = number(line.get("time/step"))
    return seconds if 0.0 <= seconds < 1e9 else 0.0
