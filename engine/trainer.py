"""The training loop: sample, score, compare, update, sync, log, save."""

from __future__ import annotations

import itertools
import logging
import math
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import yaml

from balcaprl.checkpoint import TrainerState, list_checkpoints, load_state, save_checkpoint
from balcaprl.config import TrainConfig
from balcaprl.data import Dataset, load_dataset
from balcaprl.evaluation import Evaluation, evaluate_captions
from balcaprl.evaluation.b_capscore import summarise
from balcaprl.kernels import grouped_advantages, policy_loss
from balcaprl.metrics import PhaseTimer, ProgressLine, RunLog, memory_metrics, nanmean, save_eval_image
from balcaprl.optim import PolicyOptimizer
from balcaprl.pipeline import RolloutPipeline, SampledStep
from balcaprl.policy import Group, Policy
from balcaprl.prompts import PromptStream, room_for_prompt
from balcaprl.report import write_report
from balcaprl.rewards import (
    GroupScorer,
    Judge,
    JudgeStoppedError,
    ScoreStats,
    advantage_inputs,
    close_judge,
    make_judge,
)
from balcaprl.rewards.balance import within_group_correlations
from balcaprl.rewards.columns import reward_of
from balcaprl.rollout import Sampler, make_sampler
from balcaprl.summary import write_summary
from balcaprl.telemetry import SamplingAlarm, SamplingGap, device_metrics, speed_metrics, sync_metrics
from balcaprl.types import Prompt, RewardBreakdown, Rollout, RolloutGroup

logger = logging.getLogger(__name__)

NUM_REPORT_IMAGES = 12
_MEANS = ("clip_fraction", "ratio_mean", "kl", "sampling_kl")
LOSS_METRICS = ("loss", *_MEANS, "ratio_max")
# A resumed run may differ from its start in these alone.
_FREE_FIELDS = ("output_dir", "steps", "threads", "checkpoint", "logging", "evaluation", "endpoint")


@dataclass
class UpdatePart:
    """One part of a batch, packed, with its slice of everything the loss needs."""

    packed: Any
    advantages: torch.Tensor
    sampling_logprobs: torch.Tensor
    num_tokens: int
    old_logprobs: torch.Tensor | None = None
    reference_logprobs: torch.Tensor | None = None


class Trainer:
    """Trains a policy by balanced reinforcement learning; a run is determined by its config.

    Its state (step, policy version, data cursor, optimiser, random state) is what a checkpoint holds.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        judge: Judge | None = None,
        sampler: Sampler | None = None,
        policy: Policy | None = None,
    ) -> None:
        self.config = config
        self.step = 0
        self.policy_version = 0
        self.stop_signal: int | None = None
        torch.set_num_threads(config.threads or torch.get_num_threads())
        torch.manual_seed(config.seed)
        checkpoint = self._checkpoint_to_resume()
        self.dataset: Dataset = load_dataset(config.data, seed=config.seed)
        self.judge = judge or make_judge(
            config.reward,
            config.data.kind,
            endpoint=config.endpoint,
            data_path=config.data.path,
            run_dir=config.output_dir,
        )
        self.policy = policy or load_policy(config, checkpoint)
        self.reference = load_policy(config, None) if config.loss.kl_coef > 0 else None
        self.stream = PromptStream(
            self.dataset.train_stream(seed=config.seed),
            self.policy.prepare,
            max_prompt_tokens=room_for_prompt(self.policy.model.config, config.rollout.sampling),
        )
        updates = config.steps * config.optim.epochs_per_batch
        self.optimizer = PolicyOptimizer(self.policy.model.named_parameters(), config.optim, updates)
        if checkpoint is not None:
            self._restore(load_state(checkpoint))
        self.resumed_from = self.step if checkpoint is not None else None
        self.sampler = sampler or make_sampler(config, self.policy)
        self.timer = PhaseTimer(torch.cuda.synchronize if self.policy.device.type == "cuda" else None)
        self._eval_prompts: list[Prompt] | None = None
        self.sampler.policy_version = self.policy_version
        self.gap, self.alarm = SamplingGap(), SamplingAlarm(config.rollout.sampling_kl_limit)
        self.pipeline = RolloutPipeline(
            config.rollout,
            self.sampler,
            self.stream,
            make_scorer=lambda: GroupScorer(self.judge, config.reward, self.policy.count_tokens),
            step_seed=lambda step: step_seed(config.seed, step),
            timer=self.timer,
        )

    def train(self) -> dict[str, Any]:
        """Run until ``config.steps`` steps are done, or a signal asks to stop; returns the run's summary."""
        config = self.config
        with self._open_logs(), self._stop_on_signals():
            if self.resumed_from is None:
                self.evaluate()
            while self.step < config.steps and self.stop_signal is None:
                self.timer.start_step()
                with self._saved_if_the_judge_stops():
                    sampled = self.sample_groups()
                    stats = self.score_groups(sampled)
                groups = sampled.groups
                self.compute_advantages(groups)
                losses = self.update_policy(groups)
                self.sync_weights()
                self.step += 1
                self.log_step(sampled, stats, losses)
                with self._saved_if_the_judge_stops():
                    self.evaluate_if_due()
                self.save_if_due()
            self.save()
            return self.finish()

    # ------------------------------------------------------------------------------------------------ one step

    def sample_groups(self) -> SampledStep:
        """The next images and ``group_size`` completions of each, on their way to the judge; the next step's are begun."""
        sampled = self.pipeline.take(self.step)
        if self.step + 1 < self.config.steps:
            self.pipeline.start(self.step + 1)
        return sampled

    def score_groups(self, sampled: SampledStep) -> ScoreStats:
        """Wait until every completion is judged; one that cannot be scored is counted and left out."""
        with self.timer("score"):
            return sampled.scorer.finish()

    def compute_advantages(self, groups: list[RolloutGroup]) -> None:
        """Write its advantage to each rollout."""
        settings = self.config.advantage
        advantages = grouped_advantages(
            **advantage_inputs(groups, self.config.reward),
            group_size=self.config.rollout.group_size,
            weights=self.config.reward.weights,
            method=settings.method,
            eps=settings.eps,
        )
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        for rollout, advantage in zip(rollouts, advantages.tolist(), strict=True):
            rollout.advantage = advantage

    def update_policy(self, groups: list[RolloutGroup]) -> dict[str, float]:
        """``epochs_per_batch`` updates from one batch of rollouts; returns the loss metrics of the last."""
        with self.timer("update"):
            parts = self.pack_parts(groups)
            epochs = self.config.optim.epochs_per_batch
            if not parts:  # nothing to learn from: an update would only follow old momentum
                unknown = dict.fromkeys((*LOSS_METRICS, "grad_norm", "lr"), math.nan)
                return {**unknown, "num_skipped_updates": float(epochs), "num_nonfinite_updates": 0.0}
            normalizer = self._normalizer(groups)
            updates = [self._accumulate(parts, normalizer) | self.optimizer.step() for _ in range(epochs)]
            num_nonfinite = sum(update["num_nonfinite_updates"] for update in updates)
            counts = {"num_skipped_updates": 0.0, "num_nonfinite_updates": num_nonfinite}
            return {**updates[-1], **counts, **self.gap.take_metrics()}

    def sync_weights(self) -> None:
        """Give the sampler the new weights."""
        self.pipeline.settle()
        self.policy_version += 1
        with self.timer("sync"):
            self.sync_report = self.sampler.sync(self.policy_version)

    def log_step(self, sampled: SampledStep, stats: ScoreStats, losses: dict[str, float]) -> None:
        """Write the step's metrics and completions, and move the progress line."""
        times = self.timer.finish_step()
        groups = sampled.groups
        self.alarm.check(losses["sampling_kl"], groups, self.policy_version - 1)
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        num_tokens = sum(len(r.completion.token_ids) for r in rollouts)
        names = self.config.reward.names
        scores = summarise(groups, names)
        metrics = {
            **{f"reward/{name}": scores[name] for name in (*self.config.reward.names, "b_capscore")},
            "length_ratio": scores["length_ratio"],
            **{f"correlation/{pair}": v for pair, v in within_group_correlations(groups, names).items()},
            **stats.metrics(),
            **losses,
            "num_missing_scores": float(
                sum(math.isnan(reward_of(r.breakdown or RewardBreakdown(), n)) for r in rollouts for n in names)
            ),
            "num_flat_groups": float(sum(all(r.advantage == 0.0 for r in g.rollouts) for g in groups)),
            "num_undecodable": float(self.stream.num_undecodable),
            "num_skipped_prompts": float(self.stream.num_skipped),
            "finished_fraction": nanmean(float(r.completion.finished) for r in rollouts),
            "tokens": float(num_tokens),
            "policy_version": float(self.policy_version),
            **sync_metrics(self.sync_report),
            "tokens_per_second": num_tokens / times["time/step"],
            **speed_metrics(groups, sampled.seconds, times["time/update"]),
            **times,
            **memory_metrics(),
            **device_metrics(self.policy.device),
        }
        self.log.log_step(self.step, metrics)
        self.log.log_completions(self.step, groups)
        self.progress.update(self.step, metrics)

    # ------------------------------------------------------------------------------------------------ the update

    def pack_parts(self, groups: list[RolloutGroup]) -> list[UpdatePart]:
        """The batch in ``accumulation_steps`` parts of rollouts of similar length, so that little of a part is padding.

        Rollouts that carry no gradient are left out: empty ones, and, unless the divergence term is on, those whose advantage
        is exactly 0. Their tokens still count in the global denominator.
        """
        chosen = [
            (len(rollout.completion.token_ids), index, place)
            for index, group in enumerate(groups)
            for place, rollout in enumerate(group.rollouts)
            if rollout.completion.token_ids and (self.reference is not None or rollout.advantage != 0.0)
        ]
        count = min(self.config.optim.accumulation_steps, len(chosen))
        parts = np.array_split(np.array(sorted(chosen)), count) if count else []
        return [self._pack(groups, sorted((int(i), int(j)) for _, i, j in part)) for part in parts]

    def _pack(self, groups: list[RolloutGroup], places: Sequence[tuple[int, int]]) -> UpdatePart:
        """One part: the rollouts at the given (group, place), in order."""
        device = self.policy.device
        by_group = [
            (i, [groups[i].rollouts[j] for _, j in each]) for i, each in itertools.groupby(places, lambda p: p[0])
        ]
        rollouts = [rollout for _, each in by_group for rollout in each]
        sampling = [value for rollout in rollouts for value in rollout.completion.sampling_logprobs]
        return UpdatePart(
            packed=self.policy.pack([to_policy_group(groups[i].prompt, each) for i, each in by_group]),
            advantages=torch.tensor([rollout.advantage for rollout in rollouts], dtype=torch.float32, device=device),
            sampling_logprobs=torch.tensor(sampling, dtype=torch.float32, device=device),
            num_tokens=len(sampling),
        )

    def _accumulate(self, parts: list[UpdatePart], normalizer: float) -> dict[str, float]:
        """Gradients of all parts; returns the loss and the token-weighted means of its metrics."""
        loss_config, several = self.config.loss, self.config.optim.epochs_per_batch > 1
        temperature = self.config.rollout.sampling.temperature
        totals: dict[str, float] = {}
        num_tokens = sum(part.num_tokens for part in parts)
        for part in parts:
            logprobs = self.policy.logprobs(part.packed, temperature=temperature)
            if part.old_logprobs is None:
                self.gap.add(logprobs, part.sampling_logprobs)
                part.old_logprobs = logprobs.detach() if several else None
            if self.reference is not None and part.reference_logprobs is None:
                with torch.no_grad():
                    part.reference_logprobs = self.reference.logprobs(part.packed, temperature=temperature)
            result = policy_loss(
                logprobs,
                part.old_logprobs,
                part.advantages,
                part.packed.cu_seqlens,
                clip_low=loss_config.clip_low,
                clip_high=loss_config.clip_high,
                sampling_logprobs=part.sampling_logprobs,
                sampling_ratio_cap=loss_config.sampling_ratio_cap,
                reference_logprobs=part.reference_logprobs,
                kl_coef=loss_config.kl_coef,
                reduction=loss_config.reduction,
                normalizer=normalizer,
            )
            result.loss.backward()
            share = part.num_tokens / num_tokens
            totals["loss"] = totals.get("loss", 0.0) + result.loss.item()
            for name in _MEANS:
                totals[name] = totals.get(name, 0.0) + share * getattr(result, name).item()
            totals["ratio_max"] = max(totals.get("ratio_max", 0.0), result.ratio_max.item())
        return totals

    def _normalizer(self, groups: list[RolloutGroup]) -> float:
        """The global denominator of the loss, the same however the batch is split."""
        lengths = [len(r.completion.token_ids) for g in groups for r in g.rollouts]
        if self.config.loss.reduction == "token-mean":
            return float(max(1, sum(lengths)))
        if self.config.loss.reduction == "sequence-mean":
            return float(len(lengths))
        return float(len(lengths) * self.config.rollout.sampling.max_completion_tokens)

    # ------------------------------------------------------------------------------------------------ evaluation

    def evaluate_if_due(self) -> None:
        """Evaluate every ``evaluation.every`` steps, and after the last."""
        every = self.config.evaluation.every
        if self.step == self.config.steps or (every and self.step % every == 0):
            self.evaluate()

    def evaluate(self) -> dict[str, Evaluation]:
        """Caption the held-out images, sampled and greedy, and log scores and captions."""
        if not len(self.eval_prompts):
            return {}
        self.pipeline.settle()
        results = {}
        settings = self.config.evaluation
        for mode in ("sampled", "greedy"):
            results[mode] = evaluate_captions(
                self.policy,
                self.eval_prompts,
                self.sampler,
                self.judge,
                self.config.reward,
                self.config.rollout.sampling,
                seed=settings.seed,
                greedy=mode == "greedy",
                batch_size=settings.batch_size,
            )
            self.log.log_evaluation(self.step, mode, results[mode].scores)
            self.log.log_eval_captions(self.step, mode, results[mode].groups)
        scores = results["sampled"].scores
        self.progress.message(
            f"step {self.step}: held-out b-CapScore {scores['b_capscore']:.3f} (precision {scores['precision']:.3f}, "
            f"recall {scores['recall']:.3f}, linguistic {scores['linguistic']:.3f}), "
            f"greedy {results['greedy'].scores['b_capscore']:.3f}"
        )
        return results

    @property
    def eval_prompts(self) -> list[Prompt]:
        """The held-out images, prepared once; the first few are saved for the report."""
        if self._eval_prompts is None:
            self._eval_prompts = [self.policy.prepare(sample) for sample in self.dataset.evaluation_samples()]
            for prompt in self._eval_prompts[:NUM_REPORT_IMAGES]:
                save_eval_image(self.config.output_dir, prompt.sample.sample_id, prompt.image)
        return self._eval_prompts

    # ------------------------------------------------------------------------------------------------ the run

    def save_if_due(self) -> None:
        """Save every ``checkpoint.every`` steps."""
        every = self.config.checkpoint.every
        if every and self.step % every == 0:
            self.save()

    def save(self) -> Path:
        """Write a checkpoint of this moment."""
        self.pipeline.settle()
        self.log.sync()
        state = TrainerState(
            step=self.step,
            policy_version=self.policy_version,
            data=self.stream.state_dict(),
            config=self.config.model_dump(mode="json"),
            tensors={**self.optimizer.state(), "rng": torch.get_rng_state()},
        )
        return save_checkpoint(self.config.output_dir, state, self.policy.save, self.config.checkpoint.keep)

    def finish(self) -> dict[str, Any]:
        """Write summary and report."""
        summary = write_summary(self.config.output_dir, sampler=self.sampler.name, seed=self.config.seed)
        write_report(self.config.output_dir)
        return summary

    def close(self) -> None:
        """Free the sampler and the judge."""
        self.pipeline.close()
        self.sampler.close()
        close_judge(self.judge)

    def _checkpoint_to_resume(self) -> Path | None:
        checkpoints = list_checkpoints(self.config.output_dir)
        if not checkpoints:
            return None
        if not self.config.checkpoint.resume:
            raise ValueError(
                f"{self.config.output_dir} holds a run with checkpoints, and checkpoint.resume is false: choose another "
                "output_dir, or remove the folder to start over"
            )
        return checkpoints[-1]

    def _restore(self, state: TrainerState) -> None:
        refuse_changed_config(state.config, self.config.model_dump(mode="json"))
        self.step, self.policy_version = state.step, state.policy_version
        self.stream.load_state_dict(state.data)
        tensors = dict(state.tensors)
        torch.set_rng_state(tensors.pop("rng"))
        self.optimizer.load_state(tensors)
        logger.info("resuming %s at step %d", self.config.output_dir, self.step)

    @contextmanager
    def _open_logs(self) -> Iterator[None]:
        config = self.config
        config.output_dir.mkdir(parents=True, exist_ok=True)
        plain = config.model_dump(mode="json")
        (config.output_dir / "config.yaml").write_text(yaml.safe_dump(plain, sort_keys=False))
        self.log = RunLog(
            config.output_dir, config.logging.tensorboard, config.logging.completions, resume_step=self.resumed_from
        )
        self.progress = ProgressLine(config.steps, self.step)
        with self.log, self.progress:
            yield

    @contextmanager
    def _saved_if_the_judge_stops(self) -> Iterator[None]:
        """A step that the judge cannot score never was: the run is saved as it stood before it, and ends with the error."""
        stream, rng = self.stream.state_dict(), torch.get_rng_state()
        try:
            yield
        except JudgeStoppedError as error:
            self.stream.load_state_dict(stream)
            torch.set_rng_state(rng)
            raise JudgeStoppedError(f"{error}. The run is saved at step {self.step}: {self.save()}") from error

    @contextmanager
    def _stop_on_signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the run after the step under way, saved; a second one ends it at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

        def stop(number: int, _frame: FrameType | None) -> None:
            self.stop_signal = number
            for each, handler in previous.items():
                signal.signal(each, handler)
            self.progress.message("stopping after this step; signal again to stop at once")

        for each in previous:
            signal.signal(each, stop)
        try:
            yield
        finally:
            for each, handler in previous.items():
                signal.signal(each, handler)


def load_policy(config: TrainConfig, checkpoint: Path | None) -> Policy:
    """The policy of a config, or of a checkpoint of its run."""
    from balcaprl.assets import demo_model_path

    path = checkpoint or (demo_model_path() if config.model.path == "demo" else config.model.path)
    return Policy.from_pretrained(
        path,
        dtype=config.model.dtype,
        device=config.model.device,
        attention=config.model.attention,
        freeze_vision=config.model.freeze_vision,
    )


def step_seed(seed: int, step: int) -> int:
    """Seed of one step's sampling: 31 bits, different for every (run seed, step)."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1)[0]) & 0x7FFFFFFF


def to_policy_group(prompt: Prompt, rollouts: Sequence[Rollout]) -> Group:
    """What the policy needs of some rollouts of one prompt."""
    completions = [torch.tensor(r.completion.token_ids, dtype=torch.long) for r in rollouts]
    return Group(prompt.prompt_ids, completions, prompt.image_inputs)


def refuse_changed_config(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """A run goes on only under the configuration that it was started with.

    Raises:
        ValueError: naming every field that differs and matters.
    """
    changed = [
        f"{section}: {saved.get(section)!r} -> {value!r}"
        for section, value in current.items()
        if section not in _FREE_FIELDS and saved.get(section) != value
    ]
    if changed:
        raise ValueError(
            "the configuration differs from that of the run to resume; use another output_dir, or restore: "
            + "; ".join(changed)
        )
