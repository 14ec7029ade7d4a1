"""One self-contained HTML page about a run: scores before and after, curves, and captions marked up by their verdicts.

The page loads nothing and runs nothing: styles, charts and pictures are inside it. Whatever a run folder lacks, the
page says so. Captions, references and assertions are untrusted text: the template escapes everything but the charts.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml
from markupsafe import Markup
from PIL import Image

from balcaprl.charts import Chart, Series, line_chart, moving_mean, stacked_chart
from balcaprl.metrics import EVAL_CAPTIONS, EVALUATIONS, METRICS, eval_image_path, nanmean, read_jsonl

logger = logging.getLogger(__name__)

REPORT = "report.html"
MODES = ("sampled", "greedy")
MAX_IMAGES = 12
MAX_IMAGE_SIDE = 512
"""Pixels; larger pictures are shrunk, so that a page of twelve stays small."""

SCORES = {"b_capscore": "b-CapScore", "precision": "Precision", "recall": "Recall", "linguistic": "Linguistic"}
VERDICTS = {
    "counted": "counted: true and pointable",
    "unpointable": "true, but nothing visible to point at",
    "false": "not true of the image",
}
"""Verdict of an assertion -> what it means; later ones are worse, and win where spans overlap."""


@dataclass
class Run:
    """What a run folder holds, as far as it can be read."""

    output_dir: Path
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    summary: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    captions: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def setting(self, path: str, default: Any = None) -> Any:
        """A value of the configuration by its dotted path."""
        value: Any = self.config
        for key in path.split("."):
            if not isinstance(value, dict) or key not in value:
                return default
            value = value[key]
        return value


@dataclass(frozen=True)
class Segment:
    """A piece of a caption with the verdict of the assertions that cover it; None where none does."""

    text: str
    verdict: str | None = None
    title: str = ""


def write_report(output_dir: Path) -> Path:
    """Write ``report.html`` into a run folder, whole or not at all, and return its path.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    output_dir = Path(output_dir)
    if not output_dir.is_dir():
        raise FileNotFoundError(f"{output_dir} is no run folder: it does not exist. Name a training run's output_dir.")
    page = render_report(load_run(output_dir))
    path = output_dir / REPORT
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(page.encode("utf-8", errors="replace"))
    os.replace(temporary, path)
    return path


def render_report(run: Run) -> str:
    """The page of a run."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "assets")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(score=format_score, change=format_change, svg=lambda chart: Markup(chart.svg))
    return environment.get_template("report.html.j2").render(
        run=run,
        facts=run_facts(run),
        modes=[mode for mode in MODES if any(e.get("mode") == mode for e in run.evaluations)],
        table=summary_table(run.evaluations),
        reward_charts=reward_charts(run),
        health_charts=health_charts(run),
        samples=held_out_samples(run),
        scores=SCORES,
        verdicts=VERDICTS,
        config_text=run.config_text,
    )


# ---------------------------------------------------------------------------------------------------- reading


def load_run(output_dir: Path) -> Run:
    """Read a run folder; what is missing or broken is left out and told in ``problems``."""
    run = Run(Path(output_dir))
    run.config_text = _read_text(run, "config.yaml")
    try:
        config = yaml.safe_load(run.config_text) if run.config_text else {}
        run.config = config if isinstance(config, dict) else {}
    except yaml.YAMLError as error:
        run.problems.append(f"config.yaml cannot be read: {error}")
    try:
        summary = json.loads(_read_text(run, "summary.json") or "{}")
        run.summary = summary if isinstance(summary, dict) else {}
    except ValueError as error:
        run.problems.append(f"summary.json cannot be read: {error}")
    run.metrics = _latest(read_jsonl(run.output_dir / METRICS), ("step",))
    run.evaluations = _latest(read_jsonl(run.output_dir / EVALUATIONS), ("step", "mode"))
    run.captions = _latest(read_jsonl(run.output_dir / EVAL_CAPTIONS), ("step", "mode", "sample_id", "rollout"))
    if not run.metrics:
        run.problems.append("No training step is logged.")
    if not run.evaluations:
        run.problems.append("No evaluation is logged: there is no before and after to compare.")
    if not run.captions:
        run.problems.append("No held-out captions are logged.")
    return run


def _read_text(run: Run, name: str) -> str:
    try:
        return (run.output_dir / name).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        run.problems.append(f"{name} is missing.")
        return ""


def _latest(records: Iterable[dict[str, Any]], keys: Sequence[str]) -> list[dict[str, Any]]:
    """The last record of each key, in order of steps: a resumed run may log an evaluation twice."""
    by_key = {tuple(str(record.get(key)) for key in keys): record for record in records}
    return sorted(by_key.values(), key=lambda record: record["step"])


def number(value: Any) -> float:
    """The value as a float; NaN where it is no number."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def format_score(value: Any, digits: int = 3) -> str:
    """A number with a fixed number of digits, or a dash."""
    value = number(value)
    return f"{value:.{digits}f}" if math.isfinite(value) else "\N{EN DASH}"


def format_change(before: Any, after: Any) -> str:
    """The signed difference of two scores, or nothing where one of them is missing."""
    change = round(number(after) - number(before), 3)
    if not change:
        return "0.000"
    return f"{change:+.3f}".replace("-", "\N{MINUS SIGN}") if math.isfinite(change) else ""


# ---------------------------------------------------------------------------------------------------- the head


def run_facts(run: Run) -> list[tuple[str, str]]:
    """What was run, in a few pairs of a name and a value."""
    paths = {
        "model": "model.path",
        "data": "data.kind",
        "advantages": "advantage.method",
        "images a step": "rollout.prompts_per_step",
        "completions an image": "rollout.group_size",
        "learning rate": "optim.lr",
        "length rule": "reward.length_rule",
        "seed": "seed",
    }
    facts = [(name, str(run.setting(path))) for name, path in paths.items() if run.setting(path) is not None]
    done = run.metrics[-1]["step"] if run.metrics else 0
    facts.insert(0, ("steps", f"{done} of {run.setting('steps')}" if run.setting("steps") is not None else str(done)))
    seconds = sum(s for s in (number(m.get("time/step")) for m in run.metrics) if math.isfinite(s))
    if seconds:
        facts.append(("time in steps", f"{seconds / 60:.1f} min"))
    rate = nanmean(number(m.get("tokens_per_second")) for m in run.metrics)
    if math.isfinite(rate):
        facts.append(("tokens a second", f"{rate:.0f}"))
    return facts


def summary_table(evaluations: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each mode, its first and its last evaluation; ``after`` is None where there is but one."""
    table: dict[str, dict[str, Any]] = {}
    for mode in MODES:
        ours = [e for e in evaluations if e.get("mode") == mode]
        if ours:
            table[mode] = {"before": ours[0], "after": ours[-1] if len(ours) > 1 else None}
    return table


# ---------------------------------------------------------------------------------------------------- charts


def reward_charts(run: Run) -> list[Chart]:
    """The rewards, b-CapScore and the length of captions over the run, as far as there are values."""
    charts = [_reward_chart(run, key, title) for key, title in SCORES.items()]
    charts += [_length_chart(run), _metric_chart(run, "masked_fraction", "Share of captions outside the length bounds")]
    return [chart for chart in charts if chart is not None]


def health_charts(run: Run) -> list[Chart]:
    """What tells a sick run from a well one, and where its time goes."""
    titles = {
        "sampling_kl": "Sampler against trainer: sampling_kl",
        "grad_norm": "Gradient norm before clipping",
        "clip_fraction": "Share of clipped tokens",
        "tokens_per_second": "Tokens a second",
    }
    charts = [_metric_chart(run, key, title) for key, title in titles.items()]
    return [chart for chart in [*charts, _time_chart(run)] if chart is not None]


def _column(records: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values (float64, NaN where there is none) of one key."""
    steps = np.array([record["step"] for record in records], dtype=np.float64)
    return steps, np.array([number(record.get(key)) for record in records], dtype=np.float64)


def _smoothed(run: Run, key: str, colour: str) -> list[Series]:
    """The values of a metric, pale, and their moving mean over a tenth of the run, at most 25 steps."""
    steps, values = _column(run.metrics, key)
    if not np.isfinite(values).any():
        return []
    window = min(25, len(steps) // 10)
    if window < 2:
        return [Series("each step", steps, values, colour)]
    mean = moving_mean(values, window)
    return [
        Series("each step", steps, values, colour, "raw"),
        Series(f"mean of {window} steps", steps, mean, colour),
    ]


def _evaluated(run: Run, key: str, colour: str) -> list[Series]:
    series = []
    for mode, kind in zip(MODES, ("filled", "hollow"), strict=True):
        steps, values = _column([e for e in run.evaluations if e.get("mode") == mode], key)
        if np.isfinite(values).any():
            series.append(Series(f"held out, {mode}", steps, values, colour, kind))
    return series


def _reward_chart(run: Run, key: str, title: str) -> Chart | None:
    colour = "score" if key == "b_capscore" else key
    series = _smoothed(run, f"reward/{key}", colour) + _evaluated(run, key, "ink")
    return line_chart(title, series, y_range=(0.0, 1.0)) if series else None


def _length_chart(run: Run) -> Chart | None:
    series = _smoothed(run, "length_ratio", "c0") + _evaluated(run, "length_ratio", "ink")
    if not series:
        return None
    low, high = number(run.setting("reward.tau_low")), number(run.setting("reward.tau_high"))
    masked = run.setting("reward.length_rule") == "mask" and math.isfinite(low) and math.isfinite(high)
    note = "Outside the shaded bounds the linguistic reward of a caption is 0." if masked else ""
    return line_chart("Caption length over reference length", series, band=(low, high) if masked else None, note=note)


def _metric_chart(run: Run, key: str, title: str) -> Chart | None:
    series = _smoothed(run, key, "c0")
    if not series:
        return None
    values = series[0].values[np.isfinite(series[0].values)]
    if values.min() < 0.0:
        return line_chart(title, series)
    return line_chart(title, series, y_range=(0.0, None if values.max() > 0.0 else 1.0))


def _time_chart(run: Run) -> Chart | None:
    phases = list(dict.fromkeys(key for record in run.metrics for key in record if key.startswith("time/")))
    # A request's latency is no phase: many are under way at once, and all of it lies within the phases.
    phases = [phase for phase in phases if phase != "time/step" and not phase.startswith("time/judge_")]
    steps, whole = _column(run.metrics, "time/step")
    parts = {phase.removeprefix("time/"): _column(run.metrics, phase)[1] for phase in phases}
    if not parts:
        return None
    rest = whole - np.nansum(list(parts.values()), axis=0)
    if np.isfinite(rest).any() and np.nanmax(rest) > 0.0:
        parts["other"] = np.clip(rest, 0.0, None)
    return stacked_chart("Seconds a step, by phase", steps, parts)


# ---------------------------------------------------------------------------------------------------- captions


def held_out_samples(run: Run) -> list[dict[str, Any]]:
    """The first held-out samples that have a picture (any, if none has): image, reference, captions by mode."""
    ids = list(dict.fromkeys(str(record.get("sample_id")) for record in run.captions))
    with_picture = [i for i in ids if eval_image_path(run.output_dir, i).is_file()]
    chosen = (with_picture or ids)[:MAX_IMAGES]
    records: dict[str, list[dict[str, Any]]] = {sample_id: [] for sample_id in chosen}
    for record in run.captions:
        if str(record.get("sample_id")) in records:
            records[str(record.get("sample_id"))].append(record)
    return [_sample(run, sample_id, ours) for sample_id, ours in records.items()]


def _sample(run: Run, sample_id: str, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    comparisons = []
    for mode in MODES:
        ours = [r for r in records if r.get("mode") == mode and r.get("rollout", 0) == 0]
        if ours:
            last = [("after", ours[-1])] if ours[-1]["step"] > ours[0]["step"] else []
            cards = [caption_card(label, record) for label, record in [("before", ours[0]), *last]]
            comparisons.append({"mode": mode, "cards": cards})
    image = data_url(eval_image_path(run.output_dir, sample_id))
    return {"id": sample_id, "image": image, "reference": records[0].get("reference"), "comparisons": comparisons}


def caption_card(label: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """What the page shows of one caption."""
    assertions = [a for a in record.get("assertions") or [] if isinstance(a, dict)]
    units = [u for u in record.get("reference_units") or [] if isinstance(u, dict)]
    caption = str(record.get("caption") or "")
    verdicts = [verdict(a) for a in assertions]
    return {
        "label": label,
        "step": record["step"],
        "segments": segments(caption, assertions),
        "record": record,
        "counts": {name: verdicts.count(name) for name in VERDICTS},
        "assertions": [{"text": a.get("text"), "verdict": v} for a, v in zip(assertions, verdicts, strict=True)],
        "uncovered": [u.get("text") for u in units if not u.get("covered")],
        "num_units": len(units),
    }


def verdict(assertion: Mapping[str, Any]) -> str:
    """The class of an assertion: a key of ``VERDICTS``."""
    if not assertion.get("verified"):
        return "false"
    return "counted" if assertion.get("pointable") else "unpointable"


def segments(caption: str, assertions: Sequence[Mapping[str, Any]]) -> list[Segment]:
    """Cut a caption where assertions begin and end; each piece takes the worst verdict of those that cover it.

    Spans are half-open character ranges; what lies outside the caption is cut off, and malformed spans are ignored.
    The pieces, joined, are the caption.
    """
    covers: list[tuple[int, int, Mapping[str, Any]]] = []
    for assertion in assertions:
        for start, end in _spans(assertion, len(caption)):
            covers.append((start, end, assertion))
    cuts = sorted({0, len(caption), *(c[0] for c in covers), *(c[1] for c in covers)})
    pieces = []
    for start, end in itertools.pairwise(cuts):
        here = [a for s, e, a in covers if s <= start and end <= e]
        worst = max((verdict(a) for a in here), key=list(VERDICTS).index, default=None)
        title = "\n".join(dict.fromkeys(f"{a.get('text')} ({verdict(a)})" for a in here))
        pieces.append(Segment(caption[start:end], worst, title))
    return pieces


def _spans(assertion: Mapping[str, Any], length: int) -> list[tuple[int, int]]:
    spans = []
    for span in assertion.get("spans") or []:
        if isinstance(span, list | tuple) and len(span) == 2 and all(isinstance(edge, int) for edge in span):
            start, end = max(0, span[0]), min(length, span[1])
            if start < end:
                spans.append((start, end))
    return spans


def data_url(path: Path) -> str | None:
    """The picture as a data URL, shrunk where it is large; None where there is none that can be read."""
    if not path.is_file():
        return None
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        logger.warning("%s cannot be read and is left out of the report: %s", path, error)
        return None
    large = max(image.size) > MAX_IMAGE_SIDE
    image.thumbnail((MAX_IMAGE_SIDE, MAX_IMAGE_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG" if large else "PNG", quality=85)
    kind = "jpeg" if large else "png"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
