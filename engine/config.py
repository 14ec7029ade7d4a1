"""A run's configuration: typed, documented, and complete.

A recipe (YAML) and dotted command-line overrides fill these models; unknown keys are refused. A run is determined by its
configuration and its seed. Fields marked *ours* stand where the paper (arXiv 2605.07394) gives no value.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from balcaprl.config_base import Section as _Section
from balcaprl.types import REWARD_NAMES

STATE_FILE = "trainer_state.json"
"""The trainer's state in a checkpoint folder; holds the configuration of its run."""


_COMPUTING = ("device", "attention", "gradient_checkpointing", "autocast", "fused_layers", "compile")
CHANGEABLE_FIELDS = (
    "optim",
    "loss",
    "advantage",
    "reward",
    "rollout",
    "data.path",
    *(f"model.{x}" for x in _COMPUTING),
)
"""What ``checkpoint.allow_changes`` may name: the rest decides what a checkpoint's tensors and data cursor mean."""


class ModelConfig(_Section):
    """The policy."""

    path: str = "demo"
    """A transformers checkpoint folder or hub id; ``demo`` is the small captioner that ships with the package."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the trained weights."""
    device: str = "auto"
    """``auto`` takes the first CUDA device, else the CPU."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """transformers' attention implementation, for what does not run on groups that share their prompt."""
    freeze_vision: bool = False
    """Keep the image tower fixed. It then runs once per batch of rollouts, for policy, reference and later epochs."""
    gradient_checkpointing: bool = False
    """Keep only the inputs of layers in the forward of an update, and compute the rest again in its backward."""
    autocast: bool = False
    """Compute the update's matrix products in bfloat16, whatever ``dtype`` weights and optimiser have."""
    fused_layers: bool = True
    """Run RMSNorm, SwiGLU and rotary positions on fused kernels where there are some: the native library's in float32 on the
    CPU; on CUDA Liger's, if liger-kernel is installed. Image patches go through one matrix product."""
    compile: bool = False
    """Compile the decoder layers with ``torch.compile``."""


class DataConfig(_Section):
    """Where images and reference captions come from."""

    kind: Literal["scenes", "sharegpt4v", "jsonl", "hf"] = "scenes"
    """``scenes``: drawn on the fly. ``sharegpt4v``: JSON with conversations. ``jsonl``: JSON with an image and a caption each.
    Both may be a list or one object a line. ``hf``: a Hugging Face dataset saved on disk. See ``docs/data.md``."""
    path: Path | None = None
    """The JSON, JSONL file or dataset folder; not used by ``scenes``."""
    image_root: Path | None = None
    """Folder that all image paths are relative to, and that none may leave. Default: the folder of ``path``."""
    instruction: str = "Describe the image."
    """What the policy is asked. Records that carry an instruction of their own keep it."""
    max_pixels: int = Field(1_003_520, ge=784)
    """Larger images are shrunk to this many pixels, keeping their shape."""
    max_source_pixels: int = Field(64_000_000, ge=1, le=1 << 32)
    """Images whose header announces more are refused unread (decompression bombs)."""
    max_file_bytes: int = Field(64 << 20, ge=1, le=1 << 40)
    """Image files larger than this are refused unread."""
    check_headers: bool = True
    """Read the header of every image at start, so that refused and broken files are counted there. Off: paths and file
    sizes only, for slow disks; a bad image is then skipped and counted when it is drawn."""
    num_eval: int = Field(128, ge=0)
    """Held-out images, each with all of its records. For files: the last ones of a shuffle by ``seed``, and half of the images
    where the default is more than that, or a number leaves none to train on; for ``scenes``: of the validation seeds."""
    shuffle: bool = True
    """Draw the training images in a random order, anew each epoch."""


class SamplingConfig(_Section):
    """How completions are sampled."""

    temperature: float = Field(1.0, gt=0)
    """Divides the logits, in sampling and in the loss alike."""
    max_completion_tokens: int = Field(128, ge=1, le=1_000_000)
    """A completion is cut here."""
    stop: tuple[str, ...] = ()
    """A completion ends where one of these texts appears; the text, not its tokens, is cut before it."""

    @field_validator("stop")
    @classmethod
    def _stops_are_texts(cls, stop: tuple[str, ...]) -> tuple[str, ...]:
        if "" in stop:
            raise ValueError("an empty text would end every completion before it begins")
        return stop


class RolloutConfig(_Section):
    """The sampler and the size of a step."""

    sampler: Literal["auto", "vllm", "hf", "server"] = "auto"
    """``vllm``: in-process vLLM. ``hf``: transformers' generate. ``server``: a vLLM server at ``server_url``. ``auto``: vLLM
    where it is installed."""
    server_url: str = ""
    """Of the sampling server, such as ``http://10.0.0.2:8000``; how to start it stands in ``balcaprl/rollout/server.py``."""
    server_weights_dir: Path | None = None
    """Folder that this machine writes and the server reads under the same path; none: in the folder of the run, or of the
    evaluation, and where that has none among the system's temporary files."""
    server_api_key_env: str = ""
    """Name of the environment variable that holds the server's key."""
    prompts_per_step: int = Field(8, ge=1, le=100_000)
    """Images, and thus groups, of one step."""
    group_size: int = Field(8, ge=1, le=10_000)
    """Completions of each image [G in the paper]; a run compares them with each other, and needs two."""
    sampling: SamplingConfig = SamplingConfig()
    """Sampling parameters."""
    sync: Literal["auto", "shared", "inplace", "reload"] = "auto"
    """How vLLM gets new weights. ``shared``: the policy's parameters live in vLLM's tensors, nothing is copied.
    ``inplace``: one batched copy. ``reload``: vLLM loads them anew. ``auto``: the first of these that works here."""
    sync_probe: Literal["first", "always"] = "first"
    """When a sync also compares a few sampled tokens with the policy, beyond its checks of storage and caches: at the
    first one of each engine, or always. ``reload`` always does."""
    vllm_memory_gib: float | None = Field(None, gt=0)
    """Key-value cache of vLLM, in GiB; none: derived from the model and the size of a step."""
    vllm_gpu_memory_utilization: float = Field(0.4, gt=0, le=1)
    """Share of a GPU's memory that vLLM may take (ours)."""
    max_staleness: Literal[0, 1] = 0
    """1: sample the next step while this one is scored and learnt from, with weights one update old (ours); needs
    ``loss.sampling_ratio_cap``, which corrects for it, and copies weights. Such a run does not resume bit for bit."""
    sampling_kl_limit: float = Field(0.2, gt=0)
    """An error is logged when ``sampling_kl`` leaves [-limit, limit]: sampler and trainer no longer agree (ours)."""
    vllm_sleep: bool = False
    """Give vLLM's key-value cache back while the policy is updated (GPU only; weights stay)."""


class ProtocolConfig(_Section):
    """What a judge model is asked, and in what form: fixed for a run, part of every cache key."""

    model: str = ""
    """The judge model, as its servers call it; servers that call it otherwise say so."""
    calls: Literal["separate", "combined"] = "separate"
    """``separate``: one call with the image for precision, one without it for recall, one for language; where one fails the
    others count. ``combined``: one call for all three (ours)."""
    temperature: float = Field(0.0, ge=0)
    """Sampling temperature of the judge."""
    max_reply_tokens: int = Field(4096, ge=16)
    """Longest reply of the judge."""
    response_format: Literal["json_schema", "json_object"] = "json_schema"
    """How replies are constrained; ``json_object`` is for servers without schemas. Replies are validated in any case."""
    integer_scores: bool = True
    """Language is graded in whole numbers; off: fractions such as 3.5 are taken too."""
    max_items: int = Field(96, ge=1, le=512)
    """Most assertions or units that a reply may list."""
    max_text_chars: int = Field(400, ge=8, le=4000)
    """Longest text of one assertion, quotation, reason or unit."""
    max_caption_chars: int = Field(20_000, ge=100)
    """Of a longer caption the judge sees the first part."""
    image_max_pixels: int = Field(1_003_520, ge=784)
    """Larger images are shrunk before they are sent."""
    image_format: Literal["jpeg", "png"] = "jpeg"
    """Every image is encoded anew before it is sent, which leaves metadata behind; JPEG at quality 90."""
    disable_thinking: bool = False
    """Ask the chat template for a reply without a chain of thought (``enable_thinking: false``)."""


class CustomReward(_Section):
    """A further reward: a column of its own beside the three."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    """Its name in logs, and in ``reward.conditions``."""
    source: str
    """``questions`` (CapRL) or ``rubric`` (RubiCap): asked of the judge model, from the sample's ``facts``. Otherwise a Python
    function: ``package.module:function``, ``path/file.py:function``, or an entry point of the group ``balcaprl.rewards``."""
    weight: float = Field(1.0, ge=0)
    """Weight of its normalised score."""
    mask: bool = False
    """The length mask gates it, as it gates the linguistic reward."""
    timeout_s: float = Field(300.0, gt=0)
    """A call of a Python function that takes longer counts as failed; until it comes back, no other one is made (ours)."""


class RewardCondition(_Section):
    """A reward that counts only where another one is good enough [GDPO's conditioned reward]."""

    reward: str
    """The reward that becomes 0 where the condition fails, and missing where it cannot be told."""
    on: str
    """The reward that is looked at, as judged, before any length rule."""
    at_least: float
    """What it must reach."""


class RewardConfig(_Section):
    """The judge, the weights of the rewards and the length rule."""

    judge: Literal["auto", "scene", "lexical", "endpoint", "none"] = "auto"
    """``scene``: exact, for drawn scenes. ``lexical``: word overlap with the reference, a proxy, in English alone.
    ``endpoint``: a judge model behind ``endpoint.servers``. ``none``: only ``custom`` rewards. ``auto``: by the data."""
    protocol: ProtocolConfig = ProtocolConfig()
    """What the endpoint judge is asked."""
    custom: list[CustomReward] = Field([])
    """Further rewards."""
    conditions: list[RewardCondition] = Field([])
    """Rewards that count only where another one is good enough."""
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
    """Unit of completion and reference lengths (ours). ``words``: as Unicode counts them in any language."""
    required_share: float = Field(0.5, ge=0, le=1)
    """Share of a step's captions for which each reward with a weight must give a score; three steps in a row with less end the
    run (ours). Lower it for a reward that is meant for some of the images."""
    max_flat_steps: int = Field(10, ge=0)
    """Steps in a row in which no completion differs in reward from the others of its image, after which the run ends (ours);
    0: it never does. Raise it for small steps with rare rewards."""

    @model_validator(mode="after")
    def _bounds_in_order(self) -> RewardConfig:
        if self.tau_low > self.tau_high:
            raise ValueError(f"reward.tau_low ({self.tau_low}) exceeds reward.tau_high ({self.tau_high})")
        return self

    @model_validator(mode="after")
    def _names_are_known(self) -> RewardConfig:
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"reward.custom: names must differ from each other and from {', '.join(REWARD_NAMES)}")
        for condition in self.conditions:
            for name in (condition.reward, condition.on):
                if name not in self.names:
                    raise ValueError(
                        f"reward.conditions: no reward is called {name!r}; there are {', '.join(self.names)}"
                    )
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """The K rewards of this run: the three of ``REWARD_NAMES``, then those of ``custom``."""
        return (*REWARD_NAMES, *(custom.name for custom in self.custom))

    @property
    def weights(self) -> tuple[float, ...]:
        """Weights in the order of ``names``."""
        return (
            self.precision_weight,
            self.recall_weight,
            self.linguistic_weight,
            *(custom.weight for custom in self.custom),
        )


class RequestOptions(_Section):
    """In what form a server takes requests, where it departs from the common one; part of the cache's key."""

    token_limit: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What the longest reply is called; reasoning models of some services want ``max_completion_tokens``."""
    temperature: bool = True
    """Send ``reward.protocol.temperature``; off for models that take their own alone."""
    schema_bounds: bool = True
    """Keep lengths and counts in the schemas; off for services that know a strict subset of JSON Schema."""
    extra_body: dict[str, Any] = Field(default_factory=dict)
    """Further fields of each request, such as ``reasoning_effort: low``."""

    @field_validator("extra_body")
    @classmethod
    def _keeps_what_is_asked(cls, extra: dict[str, Any]) -> dict[str, Any]:
        own = {"model", "messages", "response_format", "stream", "n"} & extra.keys()
        if own:
            raise ValueError(f"{', '.join(sorted(own))} cannot be replaced")
        try:
            json.dumps(extra, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"expected what JSON can say: {error}") from None
        return extra


class ServerConfig(_Section):
    """One OpenAI-compatible server of the judge model."""

    url: str
    """Such as ``http://127.0.0.1:8000/v1``; without user, password, query or fragment."""
    model: str = ""
    """What this server calls the model; empty: as ``reward.protocol.model`` says."""
    api_key_env: str = ""
    """Name of the environment variable that holds the key; the key itself stands in no file."""
    weight: float = Field(1.0, gt=0)
    """Share of the images, against the other servers."""
    max_concurrency: int = Field(64, ge=1, le=100_000)
    """Most requests at once; how many are worth it is found out while the run goes."""
    input_price: float | None = Field(None, ge=0)
    """Price of a million prompt tokens, in the currency of ``endpoint.budget``, which needs it; 0 where they are free."""
    output_price: float | None = Field(None, ge=0)
    """Price of a million completion tokens, likewise."""
    request: RequestOptions = RequestOptions()
    """The form of its requests."""
    proxy_from_env: bool = False
    """Reach it through the proxy that HTTP_PROXY, HTTPS_PROXY and NO_PROXY name; without this they are not looked at."""

    # Not patterns of the fields: whoever checks those repeats what was given, which may be a password or a key.
    @field_validator("url")
    @classmethod
    def _url_is_plain(cls, url: str) -> str:
        if not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#@]*)?", url):
            raise ValueError("expected http://host:port/v1 or https://..., without user, password, query or fragment")
        return url

    @field_validator("api_key_env")
    @classmethod
    def _names_a_variable(cls, name: str) -> str:
        if not re.fullmatch(r"([A-Z_][A-Z0-9_]{0,63})?", name):
            raise ValueError("expected the name of an environment variable, such as JUDGE_API_KEY; never a key itself")
        return name


class EndpointConfig(_Section):
    """How the judge model is reached. A resumed run may change all of it."""

    servers: list[ServerConfig] = Field([])
    """All of them serve the same model. Nothing else is ever contacted."""
    timeout_s: float = Field(120.0, gt=0)
    """A request that takes longer is given up and made again."""
    connect_timeout_s: float = Field(10.0, gt=0)
    """For making a connection."""
    max_attempts: int = Field(6, ge=1)
    """Attempts at one request; refusals for lack of room (429) do not count."""
    retry_wait_s: float = Field(0.5, ge=0)
    """Mean wait before the second attempt; it doubles with each, with jitter. A server's Retry-After comes first. It does not
    double while the server answers most requests well, and a reply that is no good is then asked for again at once."""
    max_retry_wait_s: float = Field(30.0, ge=0)
    """Longest of these waits."""
    max_reply_bytes: int = Field(1 << 20, ge=1024)
    """A longer reply is not read on."""
    breaker_failures: int = Field(10, ge=1)
    """Failures in a row after which a server is left alone for a while, and then tried with one request."""
    breaker_wait_s: float = Field(2.0, gt=0)
    """First such pause; it doubles up to a minute."""
    required_share: float = Field(0.9, gt=0, le=1)
    """A step goes on when this share of its scores arrived, after a last wait of ``grace_s``; the rest counts as not given.
    What a server always fails on while it answers others is left out for a while: as much as this allows, or four of a kind."""
    grace_s: float = Field(20.0, ge=0)
    """How long stragglers are waited for once the required share is there."""
    patience_s: float = Field(600.0, gt=0)
    """Without a single valid reply for so long, the run is saved and ends."""
    reach_s: float = Field(60.0, gt=0)
    """Where no server was ever reached for so long (nothing listens there), the run ends (ours)."""
    budget: float | None = Field(None, gt=0)
    """Most that the run may spend, by the prices of its servers; then it is saved and ends. It is exceeded by what one request
    takes, at most. Resumes go on counting; each call of ``prepare``, ``recaption`` and ``judge-audit`` counts for itself. What
    a server does not tell counts as the most that it can be: a token for each byte of text and each 14 x 14 pixels."""
    token_budget: int | None = Field(None, ge=1, le=10**15)
    """Most tokens, of prompts and completions together; kept as ``budget`` is."""
    cache: Path | None = Path("~/.cache/balcaprl/judge.db")
    """File of the reply cache, shared by runs and processes; null: none."""
    cache_max_mib: int = Field(4096, ge=1)
    """Bound of the cache's files together; the entries that were unused for longest make room."""
    units: Path | None = None
    """Reference units that ``balcaprl prepare`` wrote. Default: beside ``data.path``, if they are there."""


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
    max_update_ratio: float = Field(1.0, gt=0)
    """An update whose norm is more than this times the norm of all the policy's weights at the start is refused (ours).
    Ordinary ones are below 0.02."""
    max_weight_growth: float = Field(10.0, gt=0)
    """Updates are refused once the norm of the trained weights is more than this times that same norm (ours)."""
    max_refused_updates: int = Field(5, ge=1)
    """Refused updates in a row, these or any whose gradient or moments are not finite, after which the run ends (ours)."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up."""
    warmup_steps: int = Field(5, ge=0)
    """Steps of linear warm-up."""
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    """Where ``linear`` and ``cosine`` end, as a share of ``lr``."""
    epochs_per_batch: int = Field(1, ge=1)
    """Updates made from one batch of rollouts."""
    accumulation_steps: int = Field(1, ge=1)
    """Parts into which a batch is split, where it has so many groups: saves memory, and does not change the result."""
    token_budget: int | None = Field(None, ge=1)
    """Most tokens that go through the model at once, padding included; a batch is split further until its parts fit. A group
    stays whole unless it alone is larger: then its prompt goes through once for each piece (``num_split_groups``)."""
    prompt_sharing: Literal["auto", "shared", "repeated"] = "auto"
    """``shared``: a group's prompt and images go through the model once. ``repeated``: the prompt once per completion, padded.
    ``auto``: shared where the model can and it saves enough tokens to be faster. The result is the same."""


class EvaluationConfig(_Section):
    """Evaluation on held-out images."""

    every: int = Field(0, ge=0)
    """Steps between evaluations; 0: only before and after training."""
    seed: int = Field(1234, ge=0, le=2**32 - 1)
    """Seed of the evaluation's sampling, the same at every evaluation."""
    batch_size: int = Field(64, ge=1, le=100_000)
    """Images that are captioned at once."""


class CheckpointConfig(_Section):
    """Saving and resuming."""

    every: int = Field(50, ge=0)
    """Steps between saves; 0: only at the end and on SIGINT or SIGTERM."""
    keep: int = Field(2, ge=1)
    """Newest checkpoints that are kept."""
    resume: bool = True
    """Go on from the newest whole checkpoint in ``output_dir``, if there is one."""
    allow_changes: tuple[str, ...] = ()
    """Fields or sections in which a resumed run may differ from its start, such as ``optim.lr``. ``steps``, ``logging``,
    ``endpoint`` and their like may always."""

    @field_validator("allow_changes")
    @classmethod
    def _may_be_changed(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if not any(name == field or name.startswith(f"{field}.") for field in CHANGEABLE_FIELDS):
                raise ValueError(
                    f"{name} cannot be changed in a resumed run; these can: {', '.join(CHANGEABLE_FIELDS)}"
                )
        return names


class LoggingConfig(_Section):
    """What a run writes beside its checkpoints."""

    tensorboard: bool = True
    """Write TensorBoard event files."""
    completions: bool = True
    """Keep every completion with its reward breakdown."""
    completions_part_mib: int = Field(32, ge=1, le=1024)
    """Size at which ``completions.jsonl``, and ``eval_captions.jsonl`` too, is compressed into a part of its own, to about a
    tenth (ours)."""
    completions_max_mib: int = Field(1024, ge=1)
    """Bound of all compressed parts of either file together; the oldest captions make room, but for those of the first
    evaluations (ours)."""


class TrainConfig(_Section):
    """A whole run."""

    output_dir: Path = Path("run")
    """Folder of everything the run writes."""
    seed: int = Field(0, ge=0, le=2**32 - 1)
    """Determines data order, sampling and initialisation."""
    steps: int = Field(200, ge=0)
    """Training steps."""
    threads: int = Field(0, ge=0, le=10_000)
    """CPU threads of torch; 0: all cores."""
    model: ModelConfig = ModelConfig()
    """The policy."""
    data: DataConfig = DataConfig()
    """Images and references."""
    rollout: RolloutConfig = RolloutConfig()
    """Sampling."""
    reward: RewardConfig = RewardConfig()
    """Judging."""
    endpoint: EndpointConfig = EndpointConfig()
    """How a judge model is reached."""
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

    @model_validator(mode="after")
    def _allowed_changes_exist(self) -> TrainConfig:
        for name in self.checkpoint.allow_changes:
            section: object = self
            for part in name.split("."):
                if part not in getattr(type(section), "model_fields", {}):
                    raise ValueError(f"checkpoint.allow_changes: there is no field {name}")
                section = getattr(section, part)
        return self

    @model_validator(mode="after")
    def _groups_can_be_compared(self) -> TrainConfig:
        if self.rollout.group_size < 2:
            raise ValueError("rollout.group_size must be at least 2: one completion by itself teaches nothing")
        return self

    @model_validator(mode="after")
    def _staleness_is_corrected(self) -> TrainConfig:
        if self.rollout.max_staleness and self.loss.sampling_ratio_cap is None:
            raise ValueError("rollout.max_staleness = 1 needs loss.sampling_ratio_cap, such as 2.0")
        if self.rollout.max_staleness and self.rollout.sampler == "hf":
            raise ValueError("rollout.max_staleness = 1 needs a sampler with weights of its own: vllm or server")
        return self
