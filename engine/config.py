"""A run's configuration: typed, documented, and complete.

A recipe (YAML) and dotted command-line overrides fill these models; unknown keys are refused. A run is determined by its
configuration and its seed. Fields marked *ours* stand where the paper (arXiv 2605.07394) gives no value.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

STATE_FILE = "trainer_state.json"
"""The trainer's state in a checkpoint folder; holds the configuration of its run."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True)


class ModelConfig(_Section):
    """The policy."""

    path: str = "demo"
    """A transformers checkpoint folder or hub id; ``demo`` is the small captioner that ships with the package."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the trained weights."""
    device: str = "auto"
    """``auto`` takes the first CUDA device, else the CPU."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """transformers' attention implementation."""
    freeze_vision: bool = False
    """Keep the image tower fixed."""


class DataConfig(_Section):
    """Where images and reference captions come from."""

    kind: Literal["scenes", "sharegpt4v", "jsonl", "hf"] = "scenes"
    """``scenes``: drawn on the fly. ``sharegpt4v``: a JSON list with conversations. ``jsonl``: one object with ``image``
    and ``reference`` a line. ``hf``: a Hugging Face dataset saved on disk."""
    path: Path | None = None
    """The JSON, JSONL file or dataset folder; not used by ``scenes``."""
    image_root: Path | None = None
    """Folder that all image paths are relative to, and that none may leave. Default: the folder of ``path``."""
    instruction: str = "Describe the image."
    """What the policy is asked. Records that carry an instruction of their own keep it."""
    max_pixels: int = Field(1_003_520, ge=784)
    """Larger images are shrunk to this many pixels, keeping their shape."""
    max_source_pixels: int = Field(64_000_000, ge=1)
    """Images whose header announces more are refused unread (decompression bombs)."""
    max_file_bytes: int = Field(64 << 20, ge=1)
    """Image files larger than this are refused unread."""
    check_headers: bool = True
    """Read the header of every image at start, so that refused and broken files are counted there. Off: paths and file
    sizes only, for slow disks; a bad image is then skipped and counted when it is drawn."""
    num_eval: int = Field(128, ge=0)
    """Held-out images. For files: the last ones of a shuffle by ``seed``; for ``scenes``: of the validation seeds."""
    shuffle: bool = True
    """Draw the training images in a random order, anew each epoch."""


class SamplingConfig(_Section):
    """How completions are sampled."""

    temperature: float = Field(1.0, gt=0)
    """Divides the logits, in sampling and in the loss alike."""
    max_completion_tokens: int = Field(128, ge=1)
    """A completion is cut here."""


class RolloutConfig(_Section):
    """The sampler and the size of a step."""

    sampler: Literal["auto", "vllm", "hf"] = "auto"
    """``vllm``: in-process vLLM. ``hf``: transformers' generate. ``auto``: vLLM where it is installed."""
    prompts_per_step: int = Field(8, ge=1)
    """Images, and thus groups, of one step."""
    group_size: int = Field(8, ge=1)
    """Completions of each image [G in the paper]."""
    sampling: SamplingConfig = SamplingConfig()
    """Sampling parameters."""
    vllm_memory_gib: float = Field(1.0, gt=0)
    """Key-value cache of vLLM on a CPU, in GiB (ours)."""
    vllm_gpu_memory_utilization: float = Field(0.4, gt=0, le=1)
    """Share of a GPU's memory that vLLM may take (ours)."""


class RewardConfig(_Section):
    """The judge, the weights of the three rewards and the length rule."""

    judge: Literal["auto", "scene", "lexical"] = "auto"
    """``scene``: exact, for drawn scenes. ``lexical``: word overlap with the reference, a proxy. ``auto``: by the data."""
    precision_weight: float = Field(1.0, ge=0)
    """Weight of the precision reward's normalised score."""
    recall_weight: float = Field(1.0, ge=0)
    """Weight of the recall reward's normalised score."""
    linguistic_weight: float = Field(1.0, ge=0)
    """Weight of the linguistic reward's normalised score."""
    length_rule: Literal["mask", "linear", "none"] = "mask"
    """What the length ratio does to the linguistic reward. ``mask``: 0 outside [tau_low, tau_high]. ``linear`` (ours):
    times max(0, 1 - |1 - ratio|). ``none``: nothing."""
    tau_low: float = Field(0.5, ge=0)
    """Lowest length ratio at which the linguistic reward counts."""
    tau_high: float = Field(2.0, gt=0)
    """Highest length ratio at which the linguistic reward counts."""
    length_unit: Literal["words", "tokens"] = "words"
    """Unit of completion and reference lengths (ours)."""

    @model_validator(mode="after")
    def _bounds_in_order(self) -> RewardConfig:
        if self.tau_low > self.tau_high:
            raise ValueError(f"reward.tau_low ({self.tau_low}) exceeds reward.tau_high ({self.tau_high})")
        return self

    @property
    def weights(self) -> tuple[float, float, float]:
        """Weights in the order of ``REWARD_NAMES``."""
        return (self.precision_weight, self.recall_weight, self.linguistic_weight)


class AdvantageConfig(_Section):
    """From rewards to advantages."""

    method: Literal["c-gdpo", "gdpo", "grpo"] = "c-gdpo"
    """``c-gdpo``: each reward normalised in its group by itself, then summed. ``gdpo``: then whitened over the batch.
    ``grpo``: summed first, then normalised."""
    eps: float = Field(1e-4, gt=0)
    """Added to each standard deviation (ours; as in TRL)."""


class LossConfig(_Section):
    """The clipped policy loss."""

    clip_low: float = Field(0.2, ge=0, lt=1)
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float = Field(0.2, ge=0)
    """The ratio is clipped above at 1 + clip_high."""
    kl_coef: float = Field(0.0, ge=0)
    """Weight of the k3 estimate of the divergence from the frozen reference policy; 0 loads no reference."""
    reduction: Literal["token-mean", "sequence-mean", "constant"] = "token-mean"
    """How token losses of the global batch become one number."""
    sampling_ratio_cap: float | None = Field(None, gt=0)
    """Cap of the truncated importance weight exp(old_logprobs - sampling_logprobs); none: no such weight."""


class OptimConfig(_Section):
    """AdamW, its schedule, and how a batch is taken apart."""

    lr: float = Field(1e-4, gt=0)
    """Peak learning rate."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(0.99, ge=0, lt=1)
    """Decay of the second moment (ours)."""
    eps: float = Field(1e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this global norm."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up."""
    warmup_steps: int = Field(5, ge=0)
    """Steps of linear warm-up."""
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    """Where ``linear`` and ``cosine`` end, as a share of ``lr``."""
    epochs_per_batch: int = Field(1, ge=1)
    """Updates made from one batch of rollouts."""
    accumulation_steps: int = Field(1, ge=1)
    """Parts, of completions of similar length, into which a batch is split: saves memory and padding, and does not change
    the result."""


class EvaluationConfig(_Section):
    """Evaluation on held-out images."""

    every: int = Field(0, ge=0)
    """Steps between evaluations; 0: only before and after training."""
    seed: int = Field(1234, ge=0)
    """Seed of the evaluation's sampling, the same at every evaluation."""
    batch_size: int = Field(64, ge=1)
    """Images that are captioned at once."""


class CheckpointConfig(_Section):
    """Saving and resuming."""

    every: int = Field(50, ge=0)
    """Steps between saves; 0: only at the end and on SIGINT or SIGTERM."""
    keep: int = Field(2, ge=1)
    """Newest checkpoints that are kept."""
    resume: bool = True
    """Go on from the newest checkpoint in ``output_dir``, if there is one."""


class LoggingConfig(_Section):
    """What a run writes beside its checkpoints."""

    tensorboard: bool = True
    """Write TensorBoard event files."""
    completions: bool = True
    """Keep every completion with its reward breakdown."""


class TrainConfig(_Section):
    """A whole run."""

    output_dir: Path = Path("run")
    """Folder of everything the run writes."""
    seed: int = Field(0, ge=0)
    """Determines data order, sampling and initialisation."""
    steps: int = Field(200, ge=0)
    """Training steps."""
    threads: int = Field(0, ge=0)
    """CPU threads of torch; 0: all cores."""
    model: ModelConfig = ModelConfig()
    """The policy."""
    data: DataConfig = DataConfig()
    """Images and references."""
    rollout: RolloutConfig = RolloutConfig()
    """Sampling."""
    reward: RewardConfig = RewardConfig()
    """Judging."""
    advantage: AdvantageConfig = AdvantageConfig()
    """From rewards to advantages."""
    loss: LossConfig = LossConfig()
    """Policy loss."""
    optim: OptimConfig = OptimConfig()
    """Optimiser."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Held-out evaluation."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving and resuming."""
    logging: LoggingConfig = LoggingConfig()
    """Metrics and completions."""
