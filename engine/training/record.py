"""What a run writes to its folder: its configuration, its log, the pictures of its report, its summary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import yaml

from balcaprl.checkpoints.checkpoint import list_checkpoints
from balcaprl.config import TrainConfig
from balcaprl.evaluation import Evaluation
from balcaprl.evaluation.b_capscore import summarise
from balcaprl.files.ownership import Claim, claim_folder, write_atomically
from balcaprl.reporting.eval_images import save_eval_image
from balcaprl.reporting.metrics import RunLog
from balcaprl.reporting.progress import ProgressLine
from balcaprl.reporting.report import write_report
from balcaprl.reporting.summary import write_summary
from balcaprl.rewards.correlations import within_group_correlations
from balcaprl.types import Prompt, RolloutGroup

NUM_REPORT_IMAGES = 12


def claim_run_folder(config: TrainConfig) -> Claim:
    """Claim ``output_dir`` for this process.

    The run folders of early versions have no mark; they are recognised by their checkpoints.
    """
    return claim_folder(config.output_dir, "run", option="output_dir", adopt=bool(list_checkpoints(config.output_dir)))


class RunRecord:
    """Writes a run's files, and its progress on the terminal.

    The log is opened when the first line is written; it then removes what an earlier run left or, in a resumed run, the
    lines after its checkpoint. Until then, the folder stays as it is.

    Args:
        config: the run's configuration.
        claim: the claim on the run's folder; it is released when the record is closed.
        resumed_from: step of the checkpoint from which the run resumes; None marks a fresh run.
    """

    def __init__(self, config: TrainConfig, claim: Claim, resumed_from: int | None) -> None:
        self._config, self._claim, self._resumed_from = config, claim, resumed_from
        self._log: RunLog | None = None
        self._progress = ProgressLine(config.steps, resumed_from or 0)

    @contextmanager
    def opened(self, step: int) -> Iterator[None]:
        """Keep the log open and the progress line live for a ``with`` block; after it, another run may use the folder.

        A further block continues the files from where they were after ``step``.
        """
        if not self._claim.is_held:  # an earlier block has released the claim
            self._claim = claim_run_folder(self._config)
            self._log, self._resumed_from = None, step
        with self._claim, self._opened_log(), self._progress:
            yield

    def close(self) -> None:
        """Close the log and free the folder; closing twice is harmless."""
        if self._log is not None:
            self._log.close()
        self._claim.release()

    def sync(self) -> None:
        """Force all lines to disk. Call this before saving a checkpoint, because the log must not lag behind it."""
        if self._log is not None:
            self._log.sync()

    def message(self, text: str) -> None:
        """Print a line of its own on the terminal."""
        self._progress.message(text)

    def write_step(self, step: int, metrics: Mapping[str, float], groups: Sequence[RolloutGroup]) -> None:
        """Write the metrics and completions of one training step, and update the progress line."""
        log = self._opened_log()
        log.log_step(step, metrics)
        log.log_completions(step, groups)
        self._progress.update(step, metrics)

    def write_evaluation(self, step: int, mode: str, evaluation: Evaluation) -> None:
        """Write the scores and captions of one evaluation; ``mode`` is ``sampled`` or ``greedy``."""
        log = self._opened_log()
        log.log_evaluation(step, mode, evaluation.scores)
        log.log_eval_captions(step, mode, evaluation.groups)

    def tell_evaluation(self, step: int, results: Mapping[str, Evaluation]) -> None:
        """Print the scores of both modes of an evaluation."""
        scores = results["sampled"].scores
        over = f" over {scores['num_images']} images" if scores["num_excluded"] else ""
        self.message(
            f"step {step}: held-out b-CapScore{over} {scores['b_capscore']:.3f} (precision {scores['precision']:.3f}, "
            f"recall {scores['recall']:.3f}, linguistic {scores['linguistic']:.3f}), "
            f"greedy {results['greedy'].scores['b_capscore']:.3f}"
        )

    def save_pictures(self, held_out: Sequence[Prompt]) -> None:
        """Save the first few held-out images for the report."""
        folder = self._opened_log().output_dir  # opened first, because a fresh log removes an earlier run's pictures
        for prompt in held_out[:NUM_REPORT_IMAGES]:
            save_eval_image(folder, prompt.sample.sample_id, prompt.image)

    def finish(self, sampler: str) -> dict[str, Any]:
        """Write summary and report, and return the summary; ``sampler`` is the sampler's name."""
        config = self._config
        summary = write_summary(config.output_dir, sampler=sampler, seed=config.seed, planned_steps=config.steps)
        write_report(config.output_dir)
        return summary

    def _opened_log(self) -> RunLog:
        if self._log is None:
            config = self._config
            plain = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
            write_atomically(config.output_dir / "config.yaml", plain.encode())
            self._log = RunLog(
                config.output_dir,
                config.logging.tensorboard,
                config.logging.completions,
                resume_step=self._resumed_from,
                claim=self._claim,
                part_bytes=config.logging.completions_part_mib << 20,
                parts_max_bytes=config.logging.completions_max_mib << 20,
            )
        return self._log


def reward_metrics(groups: Sequence[RolloutGroup], names: Sequence[str]) -> dict[str, float]:
    """Means of the named rewards, b-CapScore and length ratio over all rollouts, and how the rewards correlate."""
    scores = summarise(groups, names)
    return {
        **{f"reward/{name}": scores[name] for name in (*names, "b_capscore")},
        "length_ratio": scores["length_ratio"],
        **{f"correlation/{pair}": v for pair, v in within_group_correlations(groups, names).items()},
    }
