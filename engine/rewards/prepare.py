"""Work done once per data set: reference units (``balcaprl prepare``) and better references (``balcaprl recaption``).

Both go on where they stopped, at any record: results are appended as they come, and what is there is not asked again.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from balcaprl.config import TrainConfig
from balcaprl.data import load_dataset
from balcaprl.data.datasets import RecordSource
from balcaprl.data.records import Record
from balcaprl.rewards.endpoint_judge import EndpointJudge
from balcaprl.rewards.judge import redact
from balcaprl.rewards.protocol import TASKS, Call, DecomposeReply, RecaptionReply, Reply
from balcaprl.rewards.reference_units import UnitStore, open_for_append, reference_digest, units_path
from balcaprl.rewards.refusals import CallRefusedError, RefusalLog, refusals_path
from balcaprl.types import Sample

logger = logging.getLogger(__name__)


@dataclass
class PrepareReport:
    """What was done."""

    path: Path
    num_present: int = 0
    """Found from an earlier run."""
    num_done: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    """Why records failed, counted; run the command again to try them again."""
    num_refused: int = 0
    """Those of them that can never succeed, for what they are about; they are not asked for again."""
    refusals: Path | None = None
    """Where it is kept which these are."""
    metrics: dict[str, float] = field(default_factory=dict)
    log: RefusalLog = field(default_factory=RefusalLog, repr=False)

    def __str__(self) -> str:
        lines = [
            f"{self.path}: {self.num_done:,} done, {self.num_present:,} were there, {self.errors.total():,} failed"
        ]
        lines += [f"  {error}: {count:,}" for error, count in self.errors.most_common(5)]
        if self.num_refused:
            lines.append(
                f"  {self.num_refused:,} of them for good, see {self.refusals}; remove it to ask for them again"
            )
        tokens = self.metrics.get("judge/prompt_tokens", 0), self.metrics.get("judge/completion_tokens", 0)
        lines.append(f"  {tokens[0]:,.0f} prompt and {tokens[1]:,.0f} completion tokens, cost {self._cost:.4g}")
        return "\n".join(lines)

    @property
    def _cost(self) -> float:
        return self.metrics.get("judge/cost", 0.0)


def prepare_units(config: TrainConfig) -> PrepareReport:
    """Take every reference of the data set apart, once, into the file beside it (or ``endpoint.units``).

    Raises:
        ValueError: the data have no file, or the endpoint is not configured.
        JudgeStoppedError: the judge cannot go on; what came so far is kept.
    """
    if config.data.path is None:
        raise ValueError(
            f"data.path: data.kind {config.data.kind} has no file to put units beside; none need be prepared"
        )
    store = UnitStore(config.endpoint.units or units_path(config.data.path))
    references = list(dict.fromkeys(record.reference for record, _ in _records(config)))
    missing = [reference for reference in references if store.get(reference) is None]
    report = PrepareReport(store.path, len(references) - len(missing))
    limit = config.reward.protocol.max_caption_chars
    model = config.reward.protocol.model

    def keep(reference: str, reply: Reply | Exception) -> None:
        if isinstance(reply, DecomposeReply):
            store.add(reference, tuple(dict.fromkeys(reply.units)), model)
            report.num_done += 1
        else:
            _note_error(report, f"reference {reference_digest(reference)[:12]}", reply, reference)

    try:
        _run(
            report,
            ((r, partial(Call, TASKS["decompose"], {"reference": r[:limit]})) for r in missing),
            keep,
            _judge(config, report),
        )
    finally:
        store.close()
    return report


def recaption(config: TrainConfig, out: Path) -> PrepareReport:
    """Rewrite every reference from its image and the old reference; writes a data set of kind ``jsonl``.

    Image paths stay relative to the same ``data.image_root``. When all records are done the file is put in the data set's
    order.

    Raises:
        ValueError: the data have no image files, or the endpoint is not configured.
        JudgeStoppedError: the judge cannot go on; what came so far is kept.
    """
    if config.data.kind not in ("jsonl", "sharegpt4v"):
        raise ValueError(
            f"data.kind: {config.data.kind} has no image files to refer to; recaption takes jsonl and sharegpt4v"
        )
    records = {record.sample_id: (record, sample) for record, sample in _records(config)}
    embedded = sum(not isinstance(record.image, str) for record, _ in records.values())
    if embedded:
        raise ValueError(
            f"data.path: {embedded:,} records hold their images themselves, and recaption writes paths: save them as files"
        )
    present = _written_ids(out)
    report = PrepareReport(out, len(present & records.keys()))
    out.parent.mkdir(parents=True, exist_ok=True)
    file = open_for_append(out)
    judge_limit = config.reward.protocol.max_caption_chars

    def keep(sample_id: str, reply: Reply | Exception) -> None:
        record = records[sample_id][0]
        if isinstance(reply, RecaptionReply):
            file.write(_line(record, reply.caption.strip()))
            report.num_done += 1
        else:
            _note_error(report, sample_id, reply, record.reference)

    def call_of(judge: EndpointJudge, sample: Sample) -> Call:
        return Call(TASKS["recaption"], {"reference": sample.reference[:judge_limit]}, judge.encode(sample))

    try:
        missing = [pair for sample_id, pair in records.items() if sample_id not in present]
        with_judge = _judge(config, report)
        _run(report, ((r.sample_id, partial(call_of, with_judge, s)) for r, s in missing), keep, with_judge)
        os.fsync(file.fileno())
    finally:
        file.close()
    if report.errors.total() == report.num_refused:  # no more will come
        _put_in_order(out, list(records))
    return report


def _records(config: TrainConfig) -> Iterator[tuple[Record, Sample]]:
    """All usable records with their samples in the file's order, those that training holds out included."""
    source = load_dataset(config.data.model_copy(update={"num_eval": 0}), seed=config.seed).train
    assert isinstance(source, RecordSource)  # drawn scenes have no path, and were refused
    for index, record in enumerate(source.records):
        yield record, source[index]


def _judge(config: TrainConfig, report: PrepareReport) -> EndpointJudge:
    report.refusals = refusals_path(report.path)
    return EndpointJudge(config.reward, config.endpoint, refusals_path=report.refusals)


def _run(
    report: PrepareReport,
    calls: Iterator[tuple[str, Callable[[], Call]]],
    keep: Callable[[str, Reply | Exception], None],
    judge: EndpointJudge,
) -> None:
    try:
        judge.run_calls(calls, keep)
    finally:
        report.metrics = judge.take_metrics()
        judge.close()


def _note_error(report: PrepareReport, name: str, error: Reply | Exception, reference: str) -> None:
    report.errors[redact(str(error), [reference])] += 1
    if isinstance(error, CallRefusedError):
        report.num_refused += 1
        report.log.note(name, error)


def _line(record: Record, reference: str) -> bytes:
    plain = {"id": record.sample_id, "image": record.image, "reference": reference, "instruction": record.instruction}
    if record.facts is not None:
        plain["facts"] = record.facts
    return json.dumps(plain, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def _written_ids(path: Path) -> set[str]:
    if not path.is_file():
        return set()
    ids = set()
    with open(path, "rb") as file:
        for line in file:
            try:
                ids.add(str(json.loads(line)["id"]))
            except (ValueError, KeyError, TypeError):
                logger.warning("%s: a broken line is left out", path)
    return ids


def _put_in_order(path: Path, ids: list[str]) -> None:
    """The file's lines in the order of ``ids``, each once; whole or not at all."""
    lines: dict[str, bytes] = {}
    with open(path, "rb") as file:
        for line in file:
            try:
                lines[str(json.loads(line)["id"])] = line
            except (ValueError, KeyError, TypeError):
                continue
    partial_path = path.with_name(path.name + ".tmp")
    with open(partial_path, "wb") as target:
        target.writelines(lines[sample_id] for sample_id in ids if sample_id in lines)
        target.flush()
        os.fsync(target.fileno())
    os.replace(partial_path, path)
