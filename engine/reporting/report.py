"""One self-contained HTML page about a run: scores before and after, curves, and captions with the judge's verdicts.

The page loads no files and runs no code: styles, charts and pictures are inside it. The page says what the run folder
lacks. Captions, references and assertions are untrusted text, so the template escapes everything except the charts. A
run folder may come from somebody else: the page is made in bounded time and memory, whatever the folder holds.
"""

from __future__ import annotations

import base64
import io
import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from balcaprl.data.images.files import ImageError, load_image
from balcaprl.files.ownership import ForeignPathError, has_mark, refuse_foreign_file, write_atomically
from balcaprl.reporting.charts import Chart, Series, line_chart, moving_mean, stacked_chart
from balcaprl.reporting.eval_images import eval_image_path
from balcaprl.reporting.metrics import nanmean
from balcaprl.reporting.run_reading import RUN_FILES, Run, load_run, measured

logger = logging.getLogger(__name__)

REPORT = "report.html"
MODES = ("sampled", "greedy")
MAX_IMAGES = 12
MAX_IMAGE_SIDE = 512
"""Longest side of a picture, in pixels; larger pictures are shrunk, so that a page with twelve of them stays small."""
_MAX_PHASES = 24
_MAX_COVERS = 400
"""Most spans that are marked in one caption; this bounds the size of the page."""
_MAX_TITLE = 8
"""Most assertions that the tooltip of one mark names, with at most 200 characters of each."""

SCORES = {"b_capscore": "b-CapScore", "precision": "Precision", "recall": "Recall", "linguistic": "Linguistic"}
VERDICTS = {
    "counted": "counted: true and pointable",
    "unpointable": "true, but nothing visible to point at",
    "false": "not true of the image",
}
"""Meaning of each verdict on an assertion, from best to worst; the worst verdict wins where spans overlap."""


@dataclass(frozen=True)
class Segment:
    """A piece of a caption with the worst verdict of the assertions that cover it; None if no assertion covers it."""

    text: str
    verdict: str | None = None
    title: str = ""


def write_report(output_dir: Path) -> Path:
    """Write ``report.html`` into a run folder, completely or not at all, and return its path.

    Raises:
        FileNotFoundError: the folder does not exist.
        ForeignPathError: the folder is not a run folder, or its ``report.html`` is not one of balcaprl's.
    """
    output_dir = Path(output_dir)
    if not output_dir.is_dir():
        raise FileNotFoundError(f"{output_dir} is no run folder: it does not exist. Name a training run's output_dir.")
    path = output_dir / REPORT
    names = {entry.name for entry in itertools.islice(output_dir.iterdir(), 10_000)}
    if names and not has_mark(output_dir, "run") and not names & {*RUN_FILES, REPORT}:
        raise ForeignPathError(f"{output_dir} is no run folder: it holds none of {', '.join(RUN_FILES)}")
    refuse_foreign_file(path, _is_report, what="report of balcaprl", option=str(output_dir))
    run = load_run(output_dir)
    for problem in run.problems:
        logger.info("%s: %s", output_dir, problem)
    write_atomically(path, render_report(run).encode("utf-8", errors="replace"))
    return path


def _is_report(head: bytes) -> bool:
    return b"balcaprl</title>" in head[:2000]


def render_report(run: Run) -> str:
    """The page of a run, as HTML text."""
    loader = jinja2.FileSystemLoader(Path(__file__).parents[1] / "assets")
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
        summary_text=run.summary_text,
    )


# ---------------------------------------------------------------------------------------------------- numbers


def format_score(value: Any, digits: int = 3) -> str:
    """A number with ``digits`` decimal places; a dash if it is missing."""
    value = measured(value)
    return f"{value:.{digits}f}" if math.isfinite(value) else "\N{EN DASH}"


def format_change(before: Any, after: Any) -> str:
    """The signed difference of two scores; empty if one of them is missing."""
    change = round(measured(after) - measured(before), 3)
    if not change:
        return "0.000"
    return f"{change:+.3f}".replace("-", "\N{MINUS SIGN}") if math.isfinite(change) else ""


# ---------------------------------------------------------------------------------------------------- the head


def run_facts(run: Run) -> list[tuple[str, str]]:
    """Facts about what was run, as a few (name, value) pairs."""
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
    facts = [(name, str(run.setting(path))[:200]) for name, path in paths.items() if _is_fact(run.setting(path))]
    done = run.metrics[-1]["step"] if run.metrics else 0
    planned = run.setting("steps")
    facts.insert(0, ("steps", f"{done} of {planned}"[:200] if _is_fact(planned) else str(done)))
    seconds = sum(s for s in (measured(m.get("time/step")) for m in run.metrics) if math.isfinite(s))
    if seconds:
        facts.append(("time in steps", f"{seconds / 60:.1f} min"))
    rate = nanmean(measured(m.get("tokens_per_second")) for m in run.metrics)
    if math.isfinite(rate):
        facts.append(("tokens a second", f"{rate:.0f}"))
    return facts


def _is_fact(value: Any) -> bool:
    return isinstance(value, str | float | bool) or (isinstance(value, int) and abs(value) < 1 << 63)


def summary_table(evaluations: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """First and last evaluation of each mode; ``after`` is None if there is only one."""
    table: dict[str, dict[str, Any]] = {}
    for mode in MODES:
        ours = [e for e in evaluations if e.get("mode") == mode]
        if ours:
            table[mode] = {"before": ours[0], "after": ours[-1] if len(ours) > 1 else None}
    return table


# ---------------------------------------------------------------------------------------------------- charts


def reward_charts(run: Run) -> list[Chart]:
    """Charts of the rewards, b-CapScore and caption length over the run; those without values are left out."""
    charts = [_reward_chart(run, key, title) for key, title in SCORES.items()]
    charts += [_length_chart(run), _metric_chart(run, "masked_fraction", "Share of captions outside the length bounds")]
    return [chart for chart in charts if chart is not None]


def health_charts(run: Run) -> list[Chart]:
    """Charts that show whether a run is healthy, and where its time goes."""
    titles = {
        "sampling_kl": "Sampler against trainer: sampling_kl",
        "grad_norm": "Gradient norm before clipping",
        "clip_fraction": "Share of clipped tokens",
        "tokens_per_second": "Tokens a second",
    }
    charts = [_metric_chart(run, key, title) for key, title in titles.items()]
    return [chart for chart in [*charts, _time_chart(run)] if chart is not None]


def _column(records: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one key, as float64 arrays; the value is NaN where a record has none."""
    steps = np.array([record["step"] for record in records], dtype=np.float64)
    return steps, np.array([measured(record.get(key)) for record in records], dtype=np.float64)


def _smoothed(run: Run, key: str, colour: str) -> list[Series]:
    """A metric's values as a pale line, and their moving mean over a tenth of the run but at most 25 steps.

    A run of fewer than 20 steps has the values only.
    """
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
    low, high = measured(run.setting("reward.tau_low")), measured(run.setting("reward.tau_high"))
    masked = run.setting("reward.length_rule") == "mask" and 0.0 <= low <= high
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
    # The latency of judge requests is not a phase: many requests run at once, and all their time lies within the
    # phases.
    phases = [phase for phase in phases if phase != "time/step" and not phase.startswith("time/judge_")][:_MAX_PHASES]
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
    """Image, reference and captions by mode of the first held-out samples with a picture, or of any if none has one."""
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
    """Verdict on an assertion, as a key of ``VERDICTS``."""
    if not assertion.get("verified"):
        return "false"
    return "counted" if assertion.get("pointable") else "unpointable"


def segments(caption: str, assertions: Sequence[Mapping[str, Any]]) -> list[Segment]:
    """Cut a caption where assertions begin and end; each piece takes the worst verdict of those that cover it.

    Spans are half-open character ranges. Their parts outside the caption are cut off, and malformed spans are ignored.
    Joined, the pieces are the caption.
    """
    covers: list[tuple[int, int, Mapping[str, Any]]] = []
    for assertion in assertions:
        for start, end in _spans(assertion, len(caption)):
            covers.append((start, end, assertion))
    covers = covers[:_MAX_COVERS]
    cuts = sorted({0, len(caption), *(c[0] for c in covers), *(c[1] for c in covers)})
    pieces = []
    for start, end in itertools.pairwise(cuts):
        here = [a for s, e, a in covers if s <= start and end <= e]
        worst = max((verdict(a) for a in here), key=list(VERDICTS).index, default=None)
        titles = dict.fromkeys(f"{str(a.get('text'))[:200]} ({verdict(a)})" for a in here)
        title = "\n".join(itertools.islice(titles, _MAX_TITLE))
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
    """The picture as a data URL, shrunk if it is large; None if there is no readable picture."""
    if not path.is_file():
        return None
    try:
        image = load_image(
            path.name, path.parent, max_pixels=1 << 22, max_source_pixels=1 << 25, max_file_bytes=1 << 26
        )
    except ImageError as error:
        logger.warning("%s cannot be read and is left out of the report: %s", path, error)
        return None
    large = max(image.size) > MAX_IMAGE_SIDE
    image.thumbnail((MAX_IMAGE_SIDE, MAX_IMAGE_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG" if large else "PNG", quality=85)
    kind = "jpeg" if large else "png"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
