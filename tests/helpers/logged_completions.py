"""A run's completions, or held-out captions, without a run: a few steps of two each, in parts of a few steps."""

from types import SimpleNamespace

from balcaprl.files.rotation import COMPLETIONS
from balcaprl.reporting.metrics import RunLog
from balcaprl.types import Completion, Rollout, RolloutGroup

STEPS = 12
PART_BYTES = 1600
"""Four or five steps fill a part."""


def write_completions(folder, steps, part_bytes=PART_BYTES, max_bytes=1 << 30, name=COMPLETIONS, **options):
    with RunLog(folder, tensorboard=False, part_bytes=part_bytes, parts_max_bytes=max_bytes, **options) as log:
        for step in steps:
            texts = (f"Caption {step}. " * 5, "A blue square.")
            rollouts = [Rollout(Completion([1, 2], text, [-0.1, -0.2], True), None) for text in texts]
            sample = SimpleNamespace(sample_id=f"scene-{step}", reference="A red circle.")
            groups = [RolloutGroup(SimpleNamespace(sample=sample), rollouts)]
            if name == COMPLETIONS:
                log.log_completions(step, groups)
            else:
                for mode in ("sampled", "greedy"):
                    log.log_eval_captions(step, mode, groups)
            log.sync()
