"""Scores a checkpoint outside of a run."""

from __future__ import annotations

from pathlib import Path

from balcaprl.assets import demo_model_path
from balcaprl.checkpoints.merge import refuse_other_base
from balcaprl.config import TrainConfig
from balcaprl.data import load_dataset
from balcaprl.evaluation.b_capscore import evaluate_captions
from balcaprl.files.ownership import Claim, claim_folder
from balcaprl.policy import Policy
from balcaprl.reporting.metrics import RunLog
from balcaprl.rewards import close_judge, make_judge
from balcaprl.rewards.custom import CustomRewards
from balcaprl.rollout import make_sampler
from balcaprl.rollout.prompts import PromptMaker, held_out_prompts


def evaluate_checkpoint(checkpoint: Path, config: TrainConfig, out: Path | None) -> dict[str, dict[str, float]]:
    """Return the scores of a checkpoint folder on the held-out images of a config, sampled and greedy.

    Args:
        checkpoint: a stock transformers folder or an adapter folder.
        config: the configuration. Its seed and the sections data, rollout, reward, endpoint, evaluation and model are
            used; ``model.path`` only for an adapter, as the model that the adapter belongs to.
        out: a folder for the scores and captions, empty or of an earlier evaluation; None: only return the scores.

    Raises:
        ModelFilesError: the checkpoint cannot be loaded, or is an adapter of another model.
        ForeignPathError: ``out`` holds something else, such as a run.
        PathInUseError: another process writes to ``out``.
        ValueError: there are no held-out images.
    """
    if out is None:
        return _evaluate(checkpoint, config, None)
    with claim_folder(out, "evaluation", option="--out") as claim:
        return _evaluate(checkpoint, config, claim)


def _evaluate(checkpoint: Path, config: TrainConfig, claim: Claim | None) -> dict[str, dict[str, float]]:
    out = claim.path if claim is not None else None
    model = config.model
    CustomRewards(config.reward.custom)  # checks the user's own code, so that it fails before anything heavy is loaded
    dataset = load_dataset(config.data, seed=config.seed)
    judge = make_judge(
        config.reward,
        config.data.kind,
        endpoint=config.endpoint,
        data_path=config.data.path,
        run_dir=out,
        references=dataset.some_references(),
    )
    policy = Policy.from_pretrained(
        checkpoint,
        dtype=model.dtype,
        device=model.device,
        attention=model.attention,
        base=demo_model_path() if model.path == "demo" else model.path,
    )
    if hasattr(policy.model, "disable_adapter"):
        refuse_other_base(policy.stock_model, checkpoint, model.path)
    held_out = held_out_prompts(dataset, PromptMaker.of(policy, config))
    if not held_out.prompts:
        raise ValueError("there are no held-out images: set data.num_eval above 0")
    sampler = make_sampler(config, policy, out)
    log = RunLog(claim.path, tensorboard=False, claim=claim) if claim is not None else None
    scores = {}
    try:
        for mode in ("sampled", "greedy"):
            result = evaluate_captions(
                policy,
                held_out.prompts,
                sampler,
                judge,
                config.reward,
                config.rollout.sampling,
                seed=config.evaluation.seed,
                greedy=mode == "greedy",
                batch_size=config.evaluation.batch_size,
                num_excluded=held_out.num_excluded,
            )
            scores[mode] = result.scores
            if log is not None:
                log.log_evaluation(0, mode, result.scores)
                log.log_eval_captions(0, mode, result.groups)
    finally:
        sampler.close()
        close_judge(judge)
        if log is not None:
            log.close()
    return scores
