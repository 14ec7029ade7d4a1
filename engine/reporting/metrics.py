"""What a run writes as it proceeds: metrics, evaluations and captions.

A run folder holds four JSON Lines files, in which each line is an object with a ``step``:

- ``metrics.jsonl`` has one line per training step.
- ``evaluations.jsonl`` has one line per evaluation and mode.
- ``completions.jsonl`` has one line per rollout.
- ``eval_captions.jsonl`` has one line per rollout on a held-out image.

``rotation.py`` compresses older lines of the last two files into parts. TensorBoard events are in ``tensorboard/``;
``eval_images.py`` writes pictures to ``eval_images/``. balcaprl marks the events and pictures that it writes, and
removes only marked ones.

Two runs with the same seed on one machine write the same lines, except for the keys that :func:`is_reproducible`
excludes.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from balcaprl.extras import pip_install
from balcaprl.files import rotation
from balcaprl.files.jsonl import (
    encode_line as encode_line,  # the three `as` imports are part of this module's interface
)
from balcaprl.files.jsonl import plain
from balcaprl.files.jsonl import read_jsonl as read_jsonl
from balcaprl.files.jsonl import truncate_jsonl as truncate_jsonl
from balcaprl.files.ownership import Claim, claim_folder, clear_partial_files
from balcaprl.files.rotation import COMPLETIONS, EVAL_CAPTIONS, ROTATED
from balcaprl.reporting.eval_images import EVAL_IMAGES, is_our_picture
from balcaprl.types import Rollout, RolloutGroup

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"
TENSORBOARD = "tensorboard"
LOG_FILES = (METRICS, EVALUATIONS, COMPLETIONS, EVAL_CAPTIONS)
_WRITTEN = (*LOG_FILES, "config.yaml", "summary.json", "report.html", "judge_usage.json")
"""Files that a run replaces as a whole, the log files only when it resumes. A run that is killed meanwhile leaves
partial copies of them."""
_EVENTS_SUFFIX = ".balcaprl"
"""Suffix by which TensorBoard files of balcaprl are recognised."""


def nanmean(values: Iterable[float | None]) -> float:
    """Mean of the finite values; NaN if there are none."""
    finite = [float(v) for v in values if v is not None and math.isfinite(v)]
    return math.fsum(finite) / len(finite) if finite else math.nan


def is_reproducible(key: str) -> bool:
    """Whether two runs of the same seed must agree on this metric: all but times, rates, memory and device load."""
    return not (key.startswith(("time/", "memory/", "device/")) or key.endswith("_per_second"))


# ---------------------------------------------------------------------------------------------------- records


def rollout_record(step: int, sample_id: str, index: int, rollout: Rollout) -> dict[str, Any]:
    """One line of ``completions.jsonl``. A rollout that was never judged has null scores."""
    record: dict[str, Any] = {
        "step": step,
        "sample_id": sample_id,
        "rollout": index,
        "caption": rollout.completion.text,
        "finished": rollout.completion.finished,
        "advantage": rollout.advantage,
        "length_ratio": rollout.length_ratio,
    }
    breakdown = rollout.breakdown
    for name in ("precision", "recall", "linguistic", "b_capscore", "clarity", "fluency", "coherence"):
        record[name] = None if breakdown is None else getattr(breakdown, name)
    if breakdown is not None and breakdown.extra:
        record["extra"] = dict(breakdown.extra)
    record["assertions"] = [
        {
            "text": a.text,
            "spans": [list(s) for s in a.spans],
            "verified": a.verified,
            "pointable": a.pointable,
            **({"reason": a.reason} if a.reason else {}),
        }
        for a in (breakdown.assertions if breakdown else ())
    ]
    record["reference_units"] = [
        {"text": u.text, "covered": u.covered} for u in (breakdown.reference_units if breakdown else ())
    ]
    record["error"] = breakdown.error if breakdown else "not judged"
    return record


# ---------------------------------------------------------------------------------------------------- the log


class RunLog:
    """Writes a run's log files, each line in one write, so that a kill loses at most the line being written.

    Args:
        output_dir: the run folder; it is made if missing.
        tensorboard: whether to write TensorBoard events to ``tensorboard/`` too.
        completions: whether to keep every completion in ``completions.jsonl``.
        resume_step: step of the checkpoint from which the run resumes. Later lines are cut away, because the run writes
            them again. None marks a fresh run; what an earlier run left in these files is then discarded.
        claim: the caller's claim on the folder, which the caller also releases. If None, the log claims the folder as
            that of a run.
        part_bytes: size in bytes at which a file of captions is compressed into a part.
        parts_max_bytes: bound in bytes on all parts of such a file together; beyond it, the oldest parts are removed.

    Raises:
        RuntimeError: TensorBoard is asked for but not installed.
        ForeignPathError: the folder holds files that no run of balcaprl wrote.
        PathInUseError: another process writes to the folder.
    """

    def __init__(
        self,
        output_dir: Path,
        tensorboard: bool = True,
        completions: bool = True,
        resume_step: int | None = None,
        *,
        claim: Claim | None = None,
        part_bytes: int = rotation.PART_BYTES,
        parts_max_bytes: int = rotation.MAX_BYTES,
    ) -> None:
        self.output_dir = Path(output_dir)
        # Look for TensorBoard first: if it is missing, nothing has been discarded yet.
        writer_class = _summary_writer_class() if tensorboard else None
        self._claim = None
        if claim is None:
            self._claim = claim_folder(self.output_dir, "run", option="output_dir", adopt=resume_step is not None)
        self._completions, self._part_bytes, self._parts_max_bytes = completions, part_bytes, parts_max_bytes
        self._files: dict[str, BinaryIO] = {}
        self._evaluated_step = resume_step
        self._writer = None
        self._prepare(resume_step)
        if writer_class is not None:
            self._writer = writer_class(
                str(self.output_dir / TENSORBOARD),
                purge_step=None if resume_step is None else resume_step + 1,
                filename_suffix=_EVENTS_SUFFIX,
            )

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def log_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of one training step."""
        self._write(METRICS, {"step": step, **metrics})
        self._scalars(metrics, step)

    def log_evaluation(self, step: int, mode: str, scores: Mapping[str, float]) -> None:
        """Write the scores of one evaluation; ``mode`` is ``sampled`` or ``greedy``."""
        self._write(EVALUATIONS, {"step": step, "mode": mode, **scores})
        self._scalars({f"eval_{mode}/{name}": value for name, value in scores.items()}, step)

    def log_completions(self, step: int, groups: Iterable[RolloutGroup]) -> None:
        """Write every rollout of a step, if completions are kept."""
        if not self._completions:
            return
        for group in groups:
            for index, rollout in enumerate(group.rollouts):
                self._write(COMPLETIONS, rollout_record(step, group.prompt.sample.sample_id, index, rollout))
        self._pack_if_full(COMPLETIONS)

    def log_eval_captions(self, step: int, mode: str, groups: Iterable[RolloutGroup]) -> None:
        """Write the captions of held-out images with their references, for the report."""
        # The file is never packed between the two modes of an evaluation, because a part must end where a step ends.
        if step != self._evaluated_step:
            self._pack_if_full(EVAL_CAPTIONS)
            self._evaluated_step = step
        for group in groups:
            sample = group.prompt.sample
            for index, rollout in enumerate(group.rollouts):
                record = rollout_record(step, sample.sample_id, index, rollout)
                self._write(EVAL_CAPTIONS, {**record, "mode": mode, "reference": sample.reference})

    def sync(self) -> None:
        """Force all lines to disk. Call this before saving a checkpoint, because the log must not lag behind it."""
        for file in self._files.values():
            os.fsync(file.fileno())
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Close all files; closing twice is harmless."""
        for file in self._files.values():
            file.close()
        self._files.clear()
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self._claim is not None:
            self._claim.release()

    def _prepare(self, resume_step: int | None) -> None:
        clear_partial_files(self.output_dir, lambda name: name in _WRITTEN or rotation.is_part(name))
        clear_partial_files(self.output_dir / EVAL_IMAGES, lambda name: name.endswith(".png"))
        if resume_step is None:
            self._discard()
            return
        for name in LOG_FILES:
            path = self.output_dir / name
            if name in ROTATED:
                dropped = rotation.cut_back(self.output_dir, resume_step, name)
            else:
                dropped = truncate_jsonl(path, resume_step)
            if dropped:
                logger.info("%s: dropped %d lines after step %d", path, dropped, resume_step)
        self._pack_if_full(COMPLETIONS)  # packs the file again if it was full at that step

    def _pack_if_full(self, name: str) -> None:
        path = self.output_dir / name
        if path.is_file() and path.stat().st_size >= self._part_bytes:
            if name in self._files:
                self._files.pop(name).close()
            rotation.pack(self.output_dir, self._parts_max_bytes, name)

    def _discard(self) -> None:
        """Remove what an earlier run wrote, and nothing else."""
        rotation.discard(self.output_dir)
        for name in LOG_FILES:
            (self.output_dir / name).unlink(missing_ok=True)
        events = (self.output_dir / TENSORBOARD).glob(f"events.out.tfevents.*{_EVENTS_SUFFIX}")
        pictures = (self.output_dir / EVAL_IMAGES).glob("*.png")
        ours = [*events, *(path for path in pictures if path.is_file() and is_our_picture(path))]
        for path in ours:
            path.unlink()

    def _write(self, name: str, record: Mapping[str, Any]) -> None:
        if name not in self._files:
            self._files[name] = open(self.output_dir / name, "ab", buffering=0)  # noqa: SIM115 (close() does)
        line = encode_line(record)
        written = self._files[name].write(line)
        if written != len(line):
            raise OSError(f"{self.output_dir / name}: only {written} of {len(line)} bytes written; is the disk full?")

    def _scalars(self, metrics: Mapping[str, Any], step: int) -> None:
        if self._writer is None:
            return
        for name, value in plain(metrics).items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, step)
        self._writer.flush()


def _summary_writer_class() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        try:
            from tensorboardX import SummaryWriter  # type: ignore[no-redef]
        except ImportError:
            raise RuntimeError(
                "logging.tensorboard is on, but neither tensorboard nor tensorboardX is installed: "
                f"run `{pip_install('tensorboard')}`, or set logging.tensorboard=false"
            ) from None
    return SummaryWriter


# ---------------------------------------------------------------------------------------------------- time


class PhaseTimer:
    """Adds up the seconds of a step's phases, from any thread.

    >>> timer = PhaseTimer()
    >>> timer.start_step()
    >>> with timer("sample"):
    ...     pass
    >>> sorted(timer.finish_step())
    ['time/sample', 'time/step']

    Args:
        synchronize: function called at both ends of a phase, so that queued device work counts in the phase that
            started it: ``torch.cuda.synchronize`` on CUDA, None on a CPU.
    """

    def __init__(self, synchronize: Callable[[], object] | None = None) -> None:
        self._synchronize = synchronize or (lambda: None)
        self._lock = threading.Lock()
        self._seconds: dict[str, float] = {}
        self._started = time.perf_counter()

    def start_step(self) -> None:
        """Clear all phases and start the step's own clock."""
        with self._lock:
            self._seconds = {}
            self._started = time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count the seconds of the ``with`` block as ``time/<phase>``; a phase entered twice has the sum."""
        self._synchronize()
        started = time.perf_counter()
        try:
            yield
            self._synchronize()
        finally:
            seconds = time.perf_counter() - started
            with self._lock:
                self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds

    def finish_step(self) -> dict[str, float]:
        """``time/<phase>`` of each phase and ``time/step``, in seconds; overlapping phases may add up to more."""
        with self._lock:
            metrics = {f"time/{phase}": seconds for phase, seconds in self._seconds.items()}
            metrics["time/step"] = time.perf_counter() - self._started
        return metrics
