"""The training loop: sample, score, compare, update, sync, log, save."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from balcaprl.checkpoints.checkpoint import TrainerState, clear_partial_checkpoints, list_checkpoints, save_checkpoint
from balcaprl.checkpoints.weight_digest import digest_of
from balcaprl.config import TrainConfig
from balcaprl.data import Dataset, load_dataset
from balcaprl.data.digest import data_digest
from balcaprl.evaluation import Evaluation, evaluate_captions
from balcaprl.files.ownership import Claim
from balcaprl.policy import Policy
from balcaprl.policy.stock import load_into, unsaved_parameters
from balcaprl.reporting.metrics import PhaseTimer, nanmean
from balcaprl.rewards import (
    GroupScorer,
    Judge,
    JudgeStoppedError,
    ScoreStats,
    close_judge,
    make_judge,
    write_advantages,
)
from balcaprl.rewards.columns import reward_of
from balcaprl.rewards.custom import CustomRewards
from balcaprl.rollout import Sampler, make_sampler
from balcaprl.rollout.prompts import HeldOut, PromptMaker, PromptStream, held_out_prompts
from balcaprl.training.learning import LearningWatch, NothingToLearnError, refuse_unfinite_samples
from balcaprl.training.optim import PolicyOptimizer
from balcaprl.training.pipeline import RolloutPipeline, SampledStep
from balcaprl.training.prospects import refuse_hopeless, warn_of_doubts
from balcaprl.training.record import RunRecord, claim_run_folder, reward_metrics
from balcaprl.training.reference import Reference, make_reference
from balcaprl.training.resume import checkpoint_to_resume, refuse_other_origin, tell_learning_rate
from balcaprl.training.signals import first_signal
from balcaprl.training.telemetry import (
    SamplingAlarm,
    SamplingGap,
    device_metrics,
    memory_metrics,
    speed_metrics,
    sync_metrics,
)
from balcaprl.training.update import PolicyUpdate
from balcaprl.types import DivergedError, RewardBreakdown, RolloutGroup, SyncReport

logger = logging.getLogger(__name__)


class Trainer:
    """Trains a policy by balanced reinforcement learning; a run is determined by its configuration.

    A checkpoint holds the trainer's state: step, policy version, data cursor, optimiser and random state.
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
        claim = claim_run_folder(config)
        try:
            self._set_up(claim, judge, sampler, policy)
        except BaseException:
            claim.release()
            raise

    def _set_up(self, claim: Claim, judge: Judge | None, sampler: Sampler | None, policy: Policy | None) -> None:
        config = self.config
        self.step = 0
        self.policy_version = 0
        self.num_unfinite = 0
        self.stop_signal: int | None = None
        refuse_hopeless(config)
        self.watch = LearningWatch(config)
        torch.set_num_threads(config.threads or torch.get_num_threads())
        torch.manual_seed(config.seed)
        clear_partial_checkpoints(config.output_dir)
        checkpoint, state = checkpoint_to_resume(config) or (None, None)
        # Load the user's own code first, so that it fails before anything heavy is loaded.
        custom = CustomRewards(config.reward.custom)
        self.dataset: Dataset = load_dataset(config.data, seed=config.seed)
        references = self.dataset.some_references()
        warn_of_doubts(config, references)
        self.judge = judge or make_judge(
            config.reward,
            config.data.kind,
            endpoint=config.endpoint,
            data_path=config.data.path,
            run_dir=config.output_dir,
            references=references,
        )
        self.policy = policy or load_policy(config, checkpoint)
        self.origin: dict[str, Any] = {
            "judge": _name_of(judge),
            "sampler": _name_of(sampler),
            "data": data_digest(config.data),
        }
        reference = self._measure_from(state, passed=policy is not None)
        if state is not None:
            refuse_other_origin(state.origin, self.origin, config.checkpoint.allow_changes)
        if checkpoint is not None and policy is not None:
            load_into(policy, checkpoint)
        self.make_prompt = PromptMaker.of(self.policy, config)
        self.stream = PromptStream(self.dataset.train_stream(seed=config.seed), self.make_prompt)
        updates = config.steps * config.optim.epochs_per_batch
        self.optimizer = PolicyOptimizer(self.policy.model.named_parameters(), config.optim, updates)
        if checkpoint is not None and state is not None:
            self._restore(checkpoint, state)
        self.resumed_from = self.step if checkpoint is not None else None
        self.record = RunRecord(config, claim, self.resumed_from)
        self.sampler = sampler or make_sampler(config, self.policy, config.output_dir)
        if sampler is not None:
            self._take_over(sampler)
        self.timer = PhaseTimer(torch.cuda.synchronize if self.policy.device.type == "cuda" else None)
        self._held_out: HeldOut | None = None
        self.sampler.policy_version = self.policy_version
        self.sync_report = SyncReport("none yet", 0, 0, 0.0, self.policy_version)
        self.gap, self.alarm = SamplingGap(), SamplingAlarm(config.rollout.sampling_kl_limit)
        self.update = PolicyUpdate(
            self.policy, self.optimizer, config, reference, self.gap.add, starts_at_reference=True
        )
        self.pipeline = self._make_pipeline(custom)

    def train(self) -> dict[str, Any]:
        """Run until ``config.steps`` steps are done or a signal asks to stop; return the run's summary."""
        config = self.config
        self.stop_signal = None  # forget the signal of an earlier call
        with self.record.opened(self.step), first_signal(self._stop_after_this_step), self._left_whole_if_it_diverges():
            if self.step == 0 and self.resumed_from is None:
                self.evaluate()
            while self.step < config.steps and self.stop_signal is None:
                self.timer.start_step()
                with self._saved_if_the_judge_stops():
                    sampled = self.sample_groups()
                    if sampled.scorer.works_in_background:
                        self.begin_update(sampled.groups)
                    stats = self.score_groups(sampled)
                groups = sampled.groups
                write_advantages(groups, config.reward, config.advantage)
                losses = self.update_policy(groups)
                self.sync_weights()
                self.step += 1
                self.log_step(sampled, stats, losses)
                with self._saved_if_the_judge_stops():
                    self.evaluate_if_due()
                self.save_if_due()
                self.stop_if_nothing_is_learnt(groups, stats)
            self.save()
            summary = self.record.finish(self.sampler.name)
            if self.stop_signal is None:
                self.watch.finish()
            return summary

    # ------------------------------------------------------------------------------------------------ one step

    def sample_groups(self) -> SampledStep:
        """Sample ``group_size`` completions for each of the next images; the judge already has them on return.

        With staleness 1, this also begins to sample the next step.
        """
        sampled = self.pipeline.take(self.step)
        self.num_unfinite = refuse_unfinite_samples(sampled.groups)
        if self.step + 1 < self.config.steps:
            self.pipeline.start(self.step + 1)
        return sampled

    def score_groups(self, sampled: SampledStep) -> ScoreStats:
        """Wait until every completion is judged; a completion that cannot be scored is counted and left out."""
        with self.timer("score"):
            return sampled.scorer.finish()

    def begin_update(self, groups: list[RolloutGroup]) -> None:
        """Do the part of the update that can be done before the last completions are judged."""
        with self.timer("update"):
            self.update.begin(groups)

    def update_policy(self, groups: list[RolloutGroup]) -> dict[str, float]:
        """Make ``epochs_per_batch`` updates from one batch of rollouts; return the loss metrics of the last update."""
        with self.timer("update"):
            return {**self.update.run(groups), **self.gap.take_metrics()}

    def sync_weights(self) -> None:
        """Give the sampler the new weights."""
        self.pipeline.settle()
        self.policy_version += 1
        with self.timer("sync"):
            self.sync_report = self.sampler.sync(self.policy_version)

    def log_step(self, sampled: SampledStep, stats: ScoreStats, losses: dict[str, float]) -> None:
        """Write the step's metrics and completions, and update the progress line."""
        times = self.timer.finish_step()
        groups = sampled.groups
        self.alarm.check(losses["sampling_kl"], groups, self.policy_version - 1)
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        num_tokens = sum(len(r.completion.token_ids) for r in rollouts)
        names = self.config.reward.names
        metrics = {
            **reward_metrics(groups, names),
            **stats.metrics(),
            **losses,
            "num_missing_scores": float(
                sum(math.isnan(reward_of(r.breakdown or RewardBreakdown(), n)) for r in rollouts for n in names)
            ),
            "num_nonfinite_samples": float(self.num_unfinite),
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
        self.record.write_step(self.step, metrics, groups)

    # ------------------------------------------------------------------------------------------------ evaluation

    def evaluate_if_due(self) -> None:
        """Evaluate every ``evaluation.every`` steps, and after the last step."""
        every = self.config.evaluation.every
        if self.step == self.config.steps or (every and self.step % every == 0):
            self.evaluate()

    def evaluate(self) -> dict[str, Evaluation]:
        """Caption the held-out images, sampled and greedy, and log scores and captions."""
        held_out = self.held_out
        if not held_out.prompts:
            return {}
        self.pipeline.settle()
        results = {}
        settings = self.config.evaluation
        for mode in ("sampled", "greedy"):
            results[mode] = evaluate_captions(
                self.policy,
                held_out.prompts,
                self.sampler,
                self.judge,
                self.config.reward,
                self.config.rollout.sampling,
                seed=settings.seed,
                greedy=mode == "greedy",
                batch_size=settings.batch_size,
                num_excluded=held_out.num_excluded,
            )
            self.record.write_evaluation(self.step, mode, results[mode])
        self.record.tell_evaluation(self.step, results)
        return results

    @property
    def held_out(self) -> HeldOut:
        """The held-out images, prepared once; the first few are saved for the report."""
        if self._held_out is None:
            self._held_out = held_out_prompts(self.dataset, self.make_prompt)
            self.record.save_pictures(self._held_out.prompts)
        return self._held_out

    # ------------------------------------------------------------------------------------------------ the run

    def save_if_due(self) -> None:
        """Save every ``checkpoint.every`` steps."""
        every = self.config.checkpoint.every
        if every and self.step % every == 0:
            self.save()

    def save(self) -> Path:
        """Write a checkpoint of this moment, and return its path.

        While updates are being refused, no older checkpoint is removed, because the last good one may be needed.

        Raises:
            DivergedError: weights or moments are not fit to resume from; nothing was written.
            SaveError: the disk is full or cannot be written; the partial checkpoint is removed.
        """
        self.pipeline.settle()
        self.record.sync()
        self.optimizer.check()
        state = TrainerState(
            step=self.step,
            policy_version=self.policy_version,
            data=self.stream.state_dict(),
            config=self.config.model_dump(mode="json"),
            tensors={**self.optimizer.state(), "rng": torch.get_rng_state()},
            origin=self.origin,
        )
        keep = None if self.optimizer.num_refused_in_a_row else self.config.checkpoint.keep
        return save_checkpoint(self.config.output_dir, state, self.policy.save, keep)

    def stop_if_nothing_is_learnt(self, groups: list[RolloutGroup], stats: ScoreStats) -> None:
        """Save and end a run whose rewards are missing, or tell nothing apart, for too many steps in a row."""
        try:
            self.watch.check(groups, stats)
        except NothingToLearnError as error:
            raise NothingToLearnError(f"{error}. The run is saved at step {self.step}: {self.save()}") from error

    def close(self) -> None:
        """Free the sampler, the judge and the run folder."""
        self.pipeline.close()
        self.sampler.close()
        close_judge(self.judge)
        self.record.close()

    def _measure_from(self, state: TrainerState | None, *, passed: bool) -> Reference | None:
        """Make the reference of the divergence and note it in the origin; None if there is no divergence term.

        This must come before a checkpoint's weights are loaded into a policy that was passed.
        """
        config, policy = self.config, self.policy
        unsaved = unsaved_parameters(policy.model)
        if unsaved:
            raise ValueError(
                f"policy: {unsaved[0]} is trained beside the adapter, and would not be in any checkpoint: freeze it, or name "
                "it in the adapter's modules_to_save"
            )
        if hasattr(policy.model, "disable_adapter"):
            self.origin["base"] = digest_of(policy, "base")
        if not config.loss.kl_coef:
            return None
        before = None if state is None else state.origin.get("reference")
        stays = state is None or passed
        start = (lambda: policy) if stays else lambda: load_policy(config, None)
        reference, self.origin["reference"] = make_reference(policy, start, before)
        return reference

    def _make_pipeline(self, custom: CustomRewards) -> RolloutPipeline:
        config = self.config
        return RolloutPipeline(
            config.rollout,
            self.sampler,
            self.stream,
            make_scorer=lambda: GroupScorer(self.judge, config.reward, self.policy.count_tokens, custom),
            step_seed=lambda step: step_seed(config.seed, step),
            timer=self.timer,
        )

    def _take_over(self, sampler: Sampler) -> None:
        """Check a sampler that was passed, and give it the weights of a resumed run."""
        of = getattr(sampler, "policy", None)
        if of is not None and of is not self.policy:
            raise ValueError(
                "sampler: it samples from another policy than the one that is trained; pass both, policy=... too"
            )
        if self.resumed_from is not None:
            sampler.sync(self.policy_version)

    def _restore(self, checkpoint: Path, state: TrainerState) -> None:
        self.step, self.policy_version = state.step, state.policy_version
        self.stream.load_state_dict(state.data)
        tensors = dict(state.tensors)
        torch.set_rng_state(tensors.pop("rng"))
        try:
            self.optimizer.load_state(tensors, complete=bool(state.format))
        except ValueError as error:
            raise ValueError(f"{checkpoint}: {error}") from error
        tell_learning_rate(state.config, self.config, self.optimizer.num_updates)
        logger.info("resuming %s at step %d", self.config.output_dir, self.step)

    @contextmanager
    def _saved_if_the_judge_stops(self) -> Iterator[None]:
        """If the judge cannot score a step, save the run as it was before that step, and raise the error again."""
        stream, rng = self.stream.state_dict(), torch.get_rng_state()
        try:
            yield
        except JudgeStoppedError as error:
            self.stream.load_state_dict(stream)
            torch.set_rng_state(rng)
            raise JudgeStoppedError(f"{error}. The run is saved at step {self.step}: {self.save()}") from error

    @contextmanager
    def _left_whole_if_it_diverges(self) -> Iterator[None]:
        """If the run diverges, save nothing more, and add the step and the newest checkpoint to the error."""
        try:
            yield
        except DivergedError as error:
            saved = list_checkpoints(self.config.output_dir)
            kept = f"the newest checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"
            raise DivergedError(
                f"the run diverged in step {self.step + 1}: {error}. Nothing more was saved; {kept}. A lower learning rate can "
                "be given to a resumed run: checkpoint.allow_changes: [optim.lr]"
            ) from error

    def _stop_after_this_step(self, signal_number: int) -> None:
        self.stop_signal = signal_number
        self.record.message("stopping after this step; signal again to stop at once")


def load_policy(config: TrainConfig, checkpoint: Path | None) -> Policy:
    """The policy of a configuration, or of a checkpoint of its run."""
    from balcaprl.assets import demo_model_path

    base = demo_model_path() if config.model.path == "demo" else config.model.path
    policy = Policy.from_pretrained(
        checkpoint or base,
        dtype=config.model.dtype,
        device=config.model.device,
        attention=config.model.attention,
        freeze_vision=config.model.freeze_vision,
        fused_layers=config.model.fused_layers,
        base=base,
        verify=checkpoint is None,  # a checkpoint was already compared with its manifest
    )
    if config.model.autocast:
        policy.autocast_dtype = torch.bfloat16
    if config.model.gradient_checkpointing:
        policy.enable_gradient_checkpointing()
    if config.model.compile:
        policy.compile_layers()
    return policy


def step_seed(seed: int, step: int) -> int:
    """Seed of one step's sampling: 31 bits, hashed from the run's seed and the step."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1)[0]) & 0x7FFFFFFF


def _name_of(part: Any) -> str | None:
    """Name by which a checkpoint records a part that was passed to the trainer; None if none was passed."""
    return None if part is None else str(getattr(part, "name", type(part).__name__))
