"""``summary.json``: a run in a few numbers, made from its log files alone."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from balcaprl.metrics import EVALUATIONS, METRICS, read_jsonl

_SCORES = ("precision", "recall", "linguistic", "b_capscore", "length_ratio")
_COUNTS = ("num_images", "num_excluded")
"""Over how many images the scores are means; older logs do not say."""


def write_summary(output_dir: Path, *, sampler: str, seed: int) -> dict[str, Any]:
    """Write and return the summary of a run folder.

    ``before`` and ``after`` are the first and last evaluation of the policy's own distribution; ``before_greedy`` and
    ``after_greedy`` of greedy decoding. ``train_seconds`` is the time of all steps, evaluations and start-up left out.
    """
    steps = read_jsonl(output_dir / METRICS)
    evaluations = read_jsonl(output_dir / EVALUATIONS)
    summary: dict[str, Any] = {
        "before": _scores(evaluations, "sampled", 0),
        "after": _scores(evaluations, "sampled", -1),
        "before_greedy": _scores(evaluations, "greedy", 0),
        "after_greedy": _scores(evaluations, "greedy", -1),
        "steps": len(steps),
        "train_seconds": round(math.fsum(line["time/step"] for line in steps), 3),
        "sampler": sampler,
        "seed": seed,
    }
    partial = output_dir / ".summary.json"
    partial.write_text(json.dumps(summary, indent=2) + "\n")
    os.replace(partial, output_dir / "summary.json")
    return summary


def _scores(evaluations: list[dict[str, Any]], mode: str, index: int) -> dict[str, Any]:
    chosen = [line for line in evaluations if line["mode"] == mode]
    if not chosen:
        return {}
    line = chosen[index]
    return {**{name: line[name] for name in _SCORES}, **{name: line[name] for name in _COUNTS if name in line}}
