"""Reads a run folder for a report, in bounded time and memory, whatever the folder holds."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from balcaprl.files.jsonl import Record, UnreadableError, number, parse_line, read_bytes, read_json, read_lines
from balcaprl.files.rotation import EVAL_CAPTIONS, list_parts
from balcaprl.reporting.metrics import EVALUATIONS, METRICS

RUN_FILES = ("config.yaml", "summary.json", METRICS, EVALUATIONS, EVAL_CAPTIONS)
_MAX_CONFIG_BYTES = 1 << 18
"""Longest configuration or summary that is read."""
_MAX_LOG_BYTES = 128 << 20
"""Most bytes read from a log. Of a longer log, half of this amount is read from the beginning and half from the end."""
_MAX_RECORDS = 200_000
"""Most records kept of a log."""
_MAX_TEXT = 20_000
"""Most characters kept of a caption, a reference or another text."""
_MAX_KEYS = 512
"""Most entries kept of one record."""
_MAX_ASSERTIONS = 128
"""Most assertions kept of a caption, and most reference units."""
_MAX_SPANS = 4
"""Most spans kept of one assertion."""
_MAX_VALUE = 1e30
"""Largest value that counts as a measurement; larger values cannot be drawn."""


@dataclass
class Run:
    """What a run folder holds, as far as it can be read."""

    output_dir: Path
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    summary: dict[str, Any] = field(default_factory=dict)
    summary_text: str = ""
    metrics: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    captions: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def setting(self, path: str, default: Any = None) -> Any:
        """Value of the configuration at a dotted path; ``default`` if there is none."""
        value: Any = self.config
        for key in path.split("."):
            if not isinstance(value, dict) or key not in value:
                return default
            value = value[key]
        return value


def load_run(output_dir: Path) -> Run:
    """Read a run folder; what is missing or broken is left out and named in ``problems``."""
    run = Run(Path(output_dir))
    run.config_text = _read_text(run, "config.yaml")
    try:
        config = yaml.load(run.config_text, _PlainLoader) if run.config_text else {}
        run.config = config if isinstance(config, dict) else {}
    except (yaml.YAMLError, ValueError, TypeError, RecursionError, OverflowError) as error:
        told = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)[:300]
        run.problems.append(f"config.yaml cannot be read: {told}")
    try:
        summary = read_json(run.output_dir / "summary.json", _MAX_CONFIG_BYTES, run.output_dir)
        run.summary_text = json.dumps(summary, indent=2)
        run.summary = summary if isinstance(summary, dict) else {}
    except FileNotFoundError:
        run.problems.append("summary.json is missing.")
    except UnreadableError as error:
        run.problems.append(_told(run, error))
    except RecursionError:
        run.problems.append("summary.json is nested too deeply.")
    run.metrics = _latest(_read_log(run, METRICS, _scalars), ("step",))
    run.evaluations = _latest(_read_log(run, EVALUATIONS, _scalars), ("step", "mode"))
    captions = itertools.chain(_packed_captions(run), _read_log(run, EVAL_CAPTIONS, _caption))
    run.captions = _latest(captions, ("step", "mode", "sample_id", "rollout"))
    if not run.metrics:
        run.problems.append("No training step is logged.")
    if not run.evaluations:
        run.problems.append("No evaluation is logged: there is no before and after to compare.")
    if not run.captions:
        run.problems.append("No held-out captions are logged.")
    return run


class _PlainLoader(yaml.SafeLoader):
    """YAML loader that refuses aliases: no run writes them, and with them a few lines can stand for gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose a node as PyYAML does, but refuse aliases."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has aliases, which no run writes")
        return super().compose_node(parent, index)


def _told(run: Run, error: UnreadableError) -> str:
    """Message of an error, without the path of the run folder before each name."""
    return str(error).replace(f"{run.output_dir}/", "")


def _read_text(run: Run, name: str) -> str:
    try:
        data = read_bytes(run.output_dir / name, _MAX_CONFIG_BYTES, run.output_dir)
        return data.decode("utf-8", errors="replace").replace("\0", "\N{REPLACEMENT CHARACTER}")
    except FileNotFoundError:
        run.problems.append(f"{name} is missing.")
    except UnreadableError as error:
        run.problems.append(_told(run, error))
    return ""


def _read_log(run: Run, name: str, keep: Callable[[Record], Record]) -> list[Record]:
    path = run.output_dir / name
    try:
        lines = read_lines(path, max_bytes=_MAX_LOG_BYTES, max_records=_MAX_RECORDS, root=run.output_dir, keep=keep)
    except UnreadableError as error:
        run.problems.append(_told(run, error))
        return []
    if lines.num_broken:
        run.problems.append(f"{name}: {lines.num_broken:,} broken lines are left out.")
    if lines.num_bytes_left_out:
        run.problems.append(f"{name} is large: {lines.num_bytes_left_out:,} bytes in its middle are left out.")
    return lines.records


def _packed_captions(run: Run) -> Iterator[Record]:
    """Captions in the first and the newest compressed part; a report needs only the first and the last evaluation."""
    parts = list_parts(run.output_dir, EVAL_CAPTIONS)
    for part in dict.fromkeys([*parts[:1], *parts[-1:]]):
        records = map(parse_line, part.lines(_MAX_LOG_BYTES, run.output_dir))
        yield from map(_caption, itertools.islice(filter(None, records), _MAX_RECORDS))


def _scalars(record: Record) -> Record:
    """A record of metrics, reduced to its numbers and short texts."""
    few = itertools.islice(record.items(), _MAX_KEYS)
    return {key[:200]: value for key, value in few if isinstance(value, int | float) or _is_short(value)}


def _is_short(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 200


def _caption(record: Record) -> Record:
    """A record of a caption, with no more of each part than a page can show."""
    kept = {
        key: _text(value)
        for key, value in itertools.islice(record.items(), _MAX_KEYS)
        if not isinstance(value, list | dict)
    }
    for key, width in (("assertions", _MAX_ASSERTIONS), ("reference_units", _MAX_ASSERTIONS)):
        parts = record.get(key)
        parts = [part for part in parts[:width] if isinstance(part, dict)] if isinstance(parts, list) else []
        kept[key] = [{name: _part(part.get(name)) for name in _PARTS if name in part} for part in parts]
    return kept


_PARTS = ("text", "spans", "verified", "pointable", "covered")


def _text(value: Any) -> Any:
    return value[:_MAX_TEXT] if isinstance(value, str) else value


def _part(value: Any) -> Any:
    if isinstance(value, list):
        return [span[:2] for span in value[:_MAX_SPANS] if isinstance(span, list)]
    return value[:1000] if isinstance(value, str) else value if not isinstance(value, dict) else None


def _latest(records: Iterable[dict[str, Any]], keys: Sequence[str]) -> list[dict[str, Any]]:
    """The last record of each key, in order of steps: a resumed run may log an evaluation twice."""
    by_key = {tuple(str(record.get(key)) for key in keys): record for record in records}
    return sorted(by_key.values(), key=lambda record: record["step"])


def measured(value: Any) -> float:
    """The value as a float; NaN if it is not a number, or too large for a measurement."""
    found = number(value)
    return found if abs(found) <= _MAX_VALUE else math.nan
