"""A run's configuration: typed, documented, and complete.

A recipe (YAML) and dotted command-line overrides fill these models; unknown keys are refused. The configuration, with
its seed, determines the run. *(ours)* marks fields and options for which the paper (arXiv 2605.07394) gives no value.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from balcaprl.config.base import Section as _Section
from balcaprl.types import REWARD_NAMES

STATE_FILE = "trainer_state.json"
"""File in a checkpoint folder with the trainer's state, which includes the configuration of its run."""


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
"""Fields and sections that ``checkpoint.allow_changes`` may name. The others decide what a checkpoint's tensors and
data cursor mean."""


class ModelConfig(_Section):
    """The policy."""

    path: str = "demo"
    """A transformers checkpoint folder or hub id; ``demo`` is the small captioner that ships with the package."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the trained weights."""
    device: str = "auto"
    """``auto`` takes the first CUDA device, or the CPU if there is none."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation of transformers, used wherever groups do not share their prompt."""
    freeze_vision: bool = False
    """Keep the image tower fixed. It then runs once per batch of rollouts, and its output serves the policy, the
    reference and later epochs."""
    gradient_checkpointing: bool = False
    """Keep only the inputs of the layers in the forward of an update, and compute the rest again in the backward. This
    saves memory and costs time."""
    autocast: bool = False
    """Compute the matrix products of an update in bfloat16, whatever the data type of the weights and the optimiser."""
    fused_layers: bool = True
    """Run RMSNorm, SwiGLU and rotary positions on fused kernels, if there are any: on the CPU those of the native
    library, in float32; on CUDA those of Liger, if liger-kernel is installed. Image patches go through one matrix
    product."""
    compile: bool = False
    """Compile the decoder layers with ``torch.compile``."""


class DataConfig(_Section):
    """Where images and reference captions come from."""

    kind: Literal["scenes", "sharegpt4v", "jsonl", "hf"] = "scenes"
    """``scenes``: images drawn on the fly. ``sharegpt4v``: JSON with conversations. ``jsonl``: JSON with an image and a
    caption per record. The files of these two kinds hold a list, or one object per line. ``hf``: a Hugging Face dataset
    saved on disk. See ``docs/data.md``."""
    path: Path | None = None
    """The JSON file, JSONL file or dataset folder; ``scenes`` does not use it."""
    image_root: Path | None = None
    """Folder that all image paths are relative to and may not lead out of. Default: the folder of ``path``."""
    instruction: str = "Describe the image."
    """What the policy is asked. Records that have an instruction of their own keep it."""
    max_pixels: int = Field(1_003_520, ge=784)
    """Images with more pixels are shrunk to this number; the aspect ratio stays."""
    max_source_pixels: int = Field(64_000_000, ge=1, le=1 << 32)
    """Images whose header announces more pixels are refused without being decoded (decompression bombs)."""
    max_file_bytes: int = Field(64 << 20, ge=1, le=1 << 40)
    """Image files with more bytes are refused without being read."""
    check_headers: bool = True
    """Read the header of every image at start, so that refused and broken files are counted then. If false, only paths
    and file sizes are checked, which suits slow disks; a bad image is then skipped and counted when it is drawn."""
    num_eval: int = Field(128, ge=0)
    """Number of held-out images, each with all of its records. Files are shuffled by ``seed``, and the last images are
    held out. Half of the images are held out instead if the number would leave none for training, or if it is the
    default and more than half. ``scenes`` takes them from the validation seeds."""
    shuffle: bool = True
    """Draw the training images in a random order, with a new order in each epoch."""


class SamplingConfig(_Section):
    """How completions are sampled."""

    temperature: float = Field(1.0, gt=0)
    """Divides the logits, both in sampling and in the loss."""
    max_completion_tokens: int = Field(128, ge=1, le=1_000_000)
    """Longest completion, in tokens; a completion is cut there."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion where they appear. The completion's text is cut before them; its tokens are kept."""

    @field_validator("stop")
    @classmethod
    def _stops_are_texts(cls, stop: tuple[str, ...]) -> tuple[str, ...]:
        if "" in stop:
            raise ValueError("an empty text would end every completion before it begins")
        return stop


class RolloutConfig(_Section):
    """The sampler and the size of a step."""

    sampler: Literal["auto", "vllm", "hf", "server"] = "auto"
    """``vllm``: vLLM in this process. ``hf``: transformers' generate. ``server``: a vLLM server at ``server_url``.
    ``auto``: vLLM if it is installed, otherwise transformers."""
    server_url: str = ""
    """Address of the sampling server, such as ``http://10.0.0.2:8000``; ``balcaprl/rollout/server.py`` says how to
    start it."""
    server_weights_dir: Path | None = None
    """Folder that this machine writes and the server reads under the same path. Default: a folder inside that of the
    run or evaluation, or the system's temporary folder if an evaluation has none."""
    server_api_key_env: str = ""
    """Name of the environment variable that holds the server's key."""
    prompts_per_step: int = Field(8, ge=1, le=100_000)
    """Number of images per step; each image gives one group of completions."""
    group_size: int = Field(8, ge=1, le=10_000)
    """Completions of each image [G in the paper]. A run compares them with each other, so it needs at least two."""
    sampling: SamplingConfig = SamplingConfig()
    """Sampling parameters."""
    sync: Literal["auto", "shared", "inplace", "reload"] = "auto"
    """How vLLM gets new weights. ``shared``: the policy's parameters live in vLLM's tensors, and nothing is copied.
    ``inplace``: one batched copy. ``reload``: vLLM loads the weights again. ``auto``: the first of these that works
    here."""
    sync_probe: Literal["first", "always"] = "first"
    """When a sync also compares a few sampled tokens with the policy, in addition to checking storage and caches.
    ``first``: at the first sync of each engine. ``always``: at every sync. With ``sync: reload``, it is done at every
    sync."""
    vllm_memory_gib: float | None = Field(None, gt=0)
    """Size of vLLM's KV cache, in GiB. Default: derived from the model and the size of a step."""
    vllm_gpu_memory_utilization: float = Field(0.4, gt=0, le=1)
    """Share of a GPU's memory that vLLM may take (ours)."""
    max_staleness: Literal[0, 1] = 0
    """0: sample each step with the newest weights. 1: sample the next step while this one is scored and learnt from,
    with weights that are one update old (ours). 1 needs ``loss.sampling_ratio_cap``, which corrects for the old
    weights, and copies the weights. Such a run does not resume bit for bit."""
    sampling_kl_limit: float = Field(0.2, gt=0)
    """An error is logged when ``sampling_kl`` leaves [-limit, limit], because sampler and trainer then disagree
    (ours)."""
    vllm_sleep: bool = False
    """Release vLLM's KV cache while the policy is updated (GPU only; the weights stay)."""


class ProtocolConfig(_Section):
    """What a judge model is asked, and in what form. This is fixed for a run, and part of every cache key."""

    model: str = ""
    """Name of the judge model. A server that uses another name for it sets ``model`` in ``endpoint.servers``."""
    calls: Literal["separate", "combined"] = "separate"
    """``separate``: three calls, for precision with the image, for recall without it, and for language; if one fails,
    the others still count. ``combined``: one call for all three (ours)."""
    temperature: float = Field(0.0, ge=0)
    """Sampling temperature of the judge."""
    max_reply_tokens: int = Field(4096, ge=16)
    """Longest reply of the judge, in tokens."""
    response_format: Literal["json_schema", "json_object"] = "json_schema"
    """How replies are constrained; ``json_object`` is for servers that do not support schemas. Replies are validated in
    any case."""
    integer_scores: bool = True
    """Grade language in whole numbers; if false, fractions such as 3.5 are accepted too."""
    max_items: int = Field(96, ge=1, le=512)
    """Most assertions or units that a reply may list."""
    max_text_chars: int = Field(400, ge=8, le=4000)
    """Longest text of one assertion, quotation, reason or unit, in characters."""
    max_caption_chars: int = Field(20_000, ge=100)
    """Number of characters of a caption that the judge sees; the rest of a longer caption is left out."""
    image_max_pixels: int = Field(1_003_520, ge=784)
    """Images with more pixels are shrunk before they are sent."""
    image_format: Literal["jpeg", "png"] = "jpeg"
    """Format in which images are sent; JPEG has quality 90. Every image is encoded again, which removes its
    metadata."""
    disable_thinking: bool = False
    """Ask the chat template for a reply without a chain of thought (``enable_thinking: false``)."""


class CustomReward(_Section):
    """A further reward beside precision, recall and linguistic."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    """Name of the reward in logs and in ``reward.conditions``."""
    source: str
    """``questions`` (CapRL) or ``rubric`` (RubiCap): the judge model scores the caption by the sample's ``facts``. Any
    other value names a Python function: ``package.module:function``, ``path/file.py:function``, or an entry point of
    the group ``balcaprl.rewards``."""
    weight: float = Field(1.0, ge=0)
    """Weight of this reward's normalised score."""
    mask: bool = False
    """Apply the length mask to this reward, as to the linguistic reward."""
    timeout_s: float = Field(300.0, gt=0)
    """Seconds after which a call of a Python function counts as failed. Until that call returns, no other call is made
    (ours)."""


class RewardCondition(_Section):
    """A reward that counts only where another reward is good enough [GDPO's conditioned reward]."""

    reward: str
    """The reward that becomes 0 where the condition fails, and missing where the condition cannot be decided."""
    on: str
    """The reward that the condition looks at, as the judge gave it, before any length rule."""
    at_least: float
    """Lowest value of the reward ``on`` at which the condition holds."""


class RewardConfig(_Section):
    """The judge, the weights of the rewards and the length rule."""

    judge: Literal["auto", "scene", "lexical", "endpoint", "none"] = "auto"
    """``scene``: exact judge of drawn scenes. ``lexical``: word overlap with the reference, a proxy, for English only.
    ``endpoint``: a judge model behind ``endpoint.servers``. ``none``: only ``custom`` rewards. ``auto``: chosen by the
    kind of data."""
    protocol: ProtocolConfig = ProtocolConfig()
    """What the endpoint judge is asked."""
    custom: list[CustomReward] = Field([])
    """Further rewards beside precision, recall and linguistic."""
    conditions: list[RewardCondition] = Field([])
    """Rewards that count only where another reward is good enough."""
    precision_weight: float = Field(1.0, ge=0)
    """Weight of the precision reward's normalised score."""
    recall_weight: float = Field(1.0, ge=0)
    """Weight of the recall reward's normalised score."""
    linguistic_weight: float = Field(1.0, ge=0)
    """Weight of the linguistic reward's normalised score."""
    length_rule: Literal["mask", "linear", "none"] = "mask"
    """What the length ratio does to the linguistic reward. ``mask``: the reward is 0 outside [tau_low, tau_high].
    ``linear`` (ours): the reward is multiplied by max(0, 1 - |1 - ratio|). ``none``: nothing."""
    tau_low: float = Field(0.5, ge=0)
    """Lowest length ratio at which the linguistic reward counts."""
    tau_high: float = Field(2.0, gt=0)
    """Highest length ratio at which the linguistic reward counts."""
    length_unit: Literal["words", "tokens"] = "words"
    """Unit of completion and reference lengths (ours). ``words``: words as Unicode counts them, in any language.
    ``tokens``: tokens of the policy."""
    required_share: float = Field(0.5, ge=0, le=1)
    """Share of a step's captions for which each reward with a weight must give a score. After three steps in a row
    below this share, the run ends (ours). Lower it for a reward that is meant for only some of the images."""
    max_flat_steps: int = Field(10, ge=0)
    """Number of steps in a row after which the run ends, if in each of them all completions of an image have the same
    reward, for every image (ours); 0: the run never ends for this reason. Raise it for small steps with rare
    rewards."""

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
        """Weights of the rewards, in the order of ``names``."""
        return (
            self.precision_weight,
            self.recall_weight,
            self.linguistic_weight,
            *(custom.weight for custom in self.custom),
        )


class RequestOptions(_Section):
    """Form of the requests to a server, where it departs from the common one. It is part of the cache key."""

    token_limit: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """Name of the request field that limits the reply; reasoning models of some services need
    ``max_completion_tokens``."""
    temperature: bool = True
    """Send ``reward.protocol.temperature``; set this to false for models that accept only their own temperature."""
    schema_bounds: bool = True
    """Keep the bounds on lengths and counts in the schemas; set this to false for services that accept only a strict
    subset of JSON Schema."""
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
    """Address of the server, such as ``http://127.0.0.1:8000/v1``, without user, password, query or fragment."""
    model: str = ""
    """Name of the model on this server. Empty: the name in ``reward.protocol.model``."""
    api_key_env: str = ""
    """Name of the environment variable that holds the key; the key itself is not written to any file."""
    weight: float = Field(1.0, gt=0)
    """Share of the images that this server gets, relative to the other servers."""
    max_concurrency: int = Field(64, ge=1, le=100_000)
    """Most requests at once; the run finds out how many of them are worthwhile."""
    input_price: float | None = Field(None, ge=0)
    """Price of a million prompt tokens, in the currency of ``endpoint.budget``. A budget needs this price; 0 means that
    they are free."""
    output_price: float | None = Field(None, ge=0)
    """Price of a million completion tokens, in the same currency and under the same rule."""
    request: RequestOptions = RequestOptions()
    """Form of the requests to this server."""
    proxy_from_env: bool = False
    """Reach the server through the proxy that HTTP_PROXY, HTTPS_PROXY and NO_PROXY name; if false, these are
    ignored."""

    # These checks are not patterns of the fields, because the error of a pattern repeats what was given, which may be a
    # password or a key.
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
    """How the judge model is reached. A resumed run may change any of it."""

    servers: list[ServerConfig] = Field([])
    """Servers of the judge model, all of which serve the same model. Nothing else is ever contacted."""
    timeout_s: float = Field(120.0, gt=0)
    """Seconds after which a request is given up and made again."""
    connect_timeout_s: float = Field(10.0, gt=0)
    """Seconds after which an attempt to connect is given up."""
    max_attempts: int = Field(6, ge=1)
    """Most attempts at one request; refusals because the server has no room (429) do not count."""
    retry_wait_s: float = Field(0.5, ge=0)
    """Mean wait before the second attempt, in seconds. The wait doubles with each further attempt, with jitter; a
    server's Retry-After takes precedence. It does not double while the server answers most requests well, and after an
    invalid reply the request is then repeated at once."""
    max_retry_wait_s: float = Field(30.0, ge=0)
    """Longest wait between two attempts, in seconds."""
    max_reply_bytes: int = Field(1 << 20, ge=1024)
    """Longest reply, in bytes; a longer reply is not read to its end."""
    breaker_failures: int = Field(10, ge=1)
    """Failures in a row after which the circuit breaker pauses a server; then one request tries the server again."""
    breaker_wait_s: float = Field(2.0, gt=0)
    """First pause of the circuit breaker, in seconds; each further pause is twice as long, up to a minute."""
    required_share: float = Field(0.9, gt=0, le=1)
    """Share of a step's scores with which the step goes on, after a last wait of ``grace_s``; the other scores count as
    missing. A picture, reference or request on which a server always fails, while it answers others, is left out for a
    while: at most as many as this share allows, but always up to four of a kind."""
    grace_s: float = Field(20.0, ge=0)
    """Seconds to wait for stragglers once the required share has arrived."""
    patience_s: float = Field(600.0, gt=0)
    """Seconds without a single valid reply after which the run is saved and ends."""
    reach_s: float = Field(60.0, gt=0)
    """Seconds after which the run ends if no server was ever reached, because nothing listens there (ours)."""
    budget: float | None = Field(None, gt=0)
    """Most that the run may spend, by the prices of its servers; at that point the run is saved and ends. The excess is
    at most the cost of one request. A resumed run continues the count; each call of ``prepare``, ``recaption`` and
    ``judge-audit`` has its own count. Tokens that a server does not report count as the most possible: one for each
    byte of text and for each 14 x 14 pixels."""
    token_budget: int | None = Field(None, ge=1, le=10**15)
    """Most tokens that the run may use, prompts and completions together; counted like ``budget``."""
    cache: Path | None = Path("~/.cache/balcaprl/judge.db")
    """File of the reply cache, which runs and processes share; null: no cache."""
    cache_max_mib: int = Field(4096, ge=1)
    """Bound on the size of the cache's files together, in MiB; the entries that were unused for longest are removed."""
    units: Path | None = None
    """File of reference units that ``balcaprl prepare`` wrote. Default: the one beside ``data.path``, if it is
    there."""


class AdvantageConfig(_Section):
    """How rewards become advantages."""

    method: Literal["c-gdpo", "gdpo", "grpo"] = "c-gdpo"
    """``c-gdpo``: each reward is normalised in its group by itself, and then they are summed. ``gdpo``: the sums are
    then also whitened over the batch. ``grpo``: the rewards are summed first, and then normalised."""
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
    """How the token losses of the global batch become one number."""
    sampling_ratio_cap: float | None = Field(None, gt=0)
    """Cap of the truncated importance weight exp(old_logprobs - sampling_logprobs); null: no such weight."""


class OptimConfig(_Section):
    """AdamW, its schedule, and how a batch is split."""

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
    """Largest global norm of the gradients; larger gradients are scaled down to it."""
    max_update_ratio: float = Field(1.0, gt=0)
    """An update is refused if its norm is more than this times the norm of all the policy's weights at the start
    (ours). Ordinary updates are below 0.02."""
    max_weight_growth: float = Field(10.0, gt=0)
    """Updates are refused once the norm of the trained weights is more than this times the norm of all the policy's
    weights at the start (ours)."""
    max_refused_updates: int = Field(5, ge=1)
    """Number of refused updates in a row after which the run ends (ours). Updates whose gradient or moments are not
    finite are refused too."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up."""
    warmup_steps: int = Field(5, ge=0)
    """Steps of linear warm-up."""
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    """Final learning rate of the schedules ``linear`` and ``cosine``, as a share of ``lr``."""
    epochs_per_batch: int = Field(1, ge=1)
    """Updates made from one batch of rollouts."""
    accumulation_steps: int = Field(1, ge=1)
    """Number of parts into which a batch is split, if it has that many groups. More parts save memory, and do not
    change the result."""
    token_budget: int | None = Field(None, ge=1)
    """Most tokens that go through the model at once, including padding; a batch is split further until its parts fit. A
    group stays whole unless it is too large by itself; then its prompt goes through once for each piece (see the metric
    ``num_split_groups``)."""
    prompt_sharing: Literal["auto", "shared", "repeated"] = "auto"
    """``shared``: the prompt and images of a group go through the model once. ``repeated``: the prompt goes through
    once per completion, padded. ``auto``: shared if the model supports it and it saves enough tokens to be faster. The
    result is the same."""


class EvaluationConfig(_Section):
    """Evaluation on held-out images."""

    every: int = Field(0, ge=0)
    """Steps between evaluations; 0: only before and after training."""
    seed: int = Field(1234, ge=0, le=2**32 - 1)
    """Seed of the evaluation's sampling, the same at every evaluation."""
    batch_size: int = Field(64, ge=1, le=100_000)
    """Number of images that are captioned at once."""


class CheckpointConfig(_Section):
    """Saving and resuming."""

    every: int = Field(50, ge=0)
    """Steps between saves; 0: only at the end and on SIGINT or SIGTERM."""
    keep: int = Field(2, ge=1)
    """Number of newest checkpoints that are kept."""
    resume: bool = True
    """Resume from the newest whole checkpoint in ``output_dir``, if there is one."""
    allow_changes: tuple[str, ...] = ()
    """Fields or sections in which a resumed run may differ from its start, such as ``optim.lr``. ``output_dir``,
    ``steps``, ``threads``, ``checkpoint``, ``logging``, ``evaluation`` and ``endpoint`` may always change."""

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
    """What a run writes besides its checkpoints."""

    tensorboard: bool = True
    """Write TensorBoard event files."""
    completions: bool = True
    """Keep every completion with its reward breakdown."""
    completions_part_mib: int = Field(32, ge=1, le=1024)
    """Size in MiB at which ``completions.jsonl`` or ``eval_captions.jsonl`` is compressed into a part of its own, to
    about a tenth (ours)."""
    completions_max_mib: int = Field(1024, ge=1)
    """Bound on the size of all compressed parts of either file together, in MiB. The oldest captions are removed,
    except those of the first evaluations (ours)."""


class TrainConfig(_Section):
    """A whole run."""

    output_dir: Path = Path("run")
    """Folder of everything the run writes."""
    seed: int = Field(0, ge=0, le=2**32 - 1)
    """Seed of data order, sampling and initialisation."""
    steps: int = Field(200, ge=0)
    """Number of training steps."""
    threads: int = Field(0, ge=0, le=10_000)
    """CPU threads of torch; 0: torch's own default."""
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
    """How rewards become advantages."""
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
