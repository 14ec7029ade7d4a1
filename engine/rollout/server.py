"""Samples with a separate vLLM server: token ids go in, and token ids and log-probabilities come out.

The server is stock vLLM. It must be started so that it samples from the policy's plain distribution and accepts
requests to load new weights::

    VLLM_SERVER_DEV_MODE=1 vllm serve CHECKPOINT --enable-scale-out --logprobs-mode processed_logprobs --generation-config vllm

Weights travel as a safetensors file in a folder that both machines see. The server then reloads the weights and drops
its caches. Every answer names the version of the weights that it was sampled from, and this version is checked. Images
travel as PNG. The server expands the image placeholders, and the resulting prompt is compared with the trainer's.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import shutil
import tempfile
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from balcaprl.config import SamplingConfig
from balcaprl.files.ownership import PathInUseError, claim_folder, has_mark
from balcaprl.policy import Policy
from balcaprl.rollout.adapters import has_split_head, merged_tensors
from balcaprl.rollout.placeholders import collapsed
from balcaprl.rollout.probe import NUM_PROBE_TOKENS, Probe
from balcaprl.rollout.sampler import Draw, PolicySampler, check_prompt, check_request, make_rollouts, prompt_seed
from balcaprl.rollout.weights import StaleWeightsError
from balcaprl.types import Prompt, SyncReport

_ATTEMPTS = 4
_FIRST_PAUSE_S = 0.5
_OPTION = "rollout.server_weights_dir"
_MARK = "weights"
_BAN = -100.0
"""The strongest bias against a token that vLLM allows; a banned token that is sampled in spite of it is an error."""


class ServerError(RuntimeError):
    """The sampling server refused a request, or could not be reached."""


class RefusedError(ServerError):
    """The server answered with an HTTP status other than 200."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class ServerRollout(PolicySampler):
    """The sampler that sends its requests to a vLLM server.

    The policy's weights are pushed before the first request. This replaces any other weights that the server may still
    have, for example because a trainer died during a sync.
    """

    name = "server"

    def __init__(
        self,
        policy: Policy,
        *,
        url: str,
        weights_dir: Path | None,
        api_key_env: str = "",
        timeout_s: float = 600.0,
        max_concurrency: int = 64,
    ) -> None:
        """Check the arguments; nothing is sent yet.

        Args:
            policy: The policy to sample from.
            url: Address of the server, such as ``http://10.0.0.2:8000``; no other server or proxy is contacted.
            weights_dir: A folder that this machine writes and the server reads, under the same path. None takes the
                system's folder for temporary files, for a server on this machine.
            api_key_env: Name of the environment variable that holds the server's key, if the server needs one.
            timeout_s: Longest wait for one answer, in seconds.
            max_concurrency: Largest number of requests that run at once.

        Raises:
            ValueError: An argument is not usable, or an adapter on head or embedding unties the two.
        """
        if has_split_head(policy.stock_model):
            raise ValueError(
                "policy: an adapter parts its head from the embedding that it is tied to, and the server's checkpoint ties "
                "them: leave head and embedding out of the adapter's target_modules, or sample with vllm or hf"
            )
        parsed = urllib.parse.urlsplit(url)
        if parsed.scheme not in ("http", "https") or not parsed.hostname or parsed.username or parsed.query:
            raise ValueError("url: expected http://host:port, without user, password or query")
        super().__init__(policy)
        self._url, self._timeout_s = parsed, timeout_s
        self._weights_dir = None if weights_dir is None else Path(weights_dir).absolute()
        self._made_weights_dir = False
        self._headers = {"Content-Type": "application/json"}
        if api_key_env:
            if not os.environ.get(api_key_env):
                raise ValueError(f"api_key_env: the environment variable {api_key_env} is empty")
            self._headers["Authorization"] = f"Bearer {os.environ[api_key_env]}"
        self._pool = ThreadPoolExecutor(max_concurrency, "sampling-server")
        self._probe = Probe(policy, self._ask, same_precision=False)
        self._pushed = False
        self._closed = False

    def stream(
        self, prompts: Sequence[Prompt], group_size: int, sampling: SamplingConfig, *, seed: int, greedy: bool = False
    ) -> Iterator[Draw]:
        """Sample completions, one request per prompt. See ``Sampler.stream``.

        Raises:
            ServerError: the server cannot be reached, or refuses the request.
            StaleWeightsError: the server sampled from weights other than those that it was given.
        """
        check_request(prompts, group_size)
        self._refuse_if_closed()
        self._probe.choose(prompts)
        if not self._pushed:
            self._push(self.policy_version)
            self._probe.calibrate()
        copies = group_size if greedy else 1
        futures = {
            self._pool.submit(
                self._sample, prompt, group_size // copies, sampling, None if greedy else prompt_seed(seed, index)
            ): index
            for index, prompt in enumerate(prompts)
        }
        try:
            for future in as_completed(futures):
                ids, logprobs = future.result()
                index = futures[future]
                rollouts = make_rollouts(self._policy, ids * copies, logprobs * copies, sampling.stop)
                yield from (Draw(index, position, rollout) for position, rollout in enumerate(rollouts))
        finally:
            for future in futures:
                future.cancel()

    def sync(self, policy_version: int) -> SyncReport:
        """Push the weights to the server, and always verify them by a probe. See ``Sampler.sync``.

        Raises:
            ServerError: the server cannot be reached, or cannot load the weights.
            StaleWeightsError: the server does not serve these weights afterwards.
        """
        self._refuse_if_closed()
        started = time.perf_counter()
        num_tensors, num_bytes = self._push(policy_version)
        self._probe.verify(policy_version)
        return SyncReport("server", num_tensors, num_bytes, time.perf_counter() - started, policy_version)

    def close(self) -> None:
        """Stop sending requests; the server itself keeps running. See ``Sampler.close``."""
        self._closed = True
        self._pool.shutdown(cancel_futures=True)
        if self._weights_dir is not None and self._made_weights_dir:
            with suppress(OSError):  # another run uses the folder too
                self._weights_dir.rmdir()

    # --------------------------------------------------------------------------------------------------- weights

    def _push(self, policy_version: int) -> tuple[int, int]:
        """Write the weights, and make the server load them and drop cached results; returns (tensors, bytes)."""
        folder = self._new_folder(policy_version)
        try:
            # Mark and lock the folder: a marked folder without a lock was left behind by a process that was killed.
            with claim_folder(folder, _MARK, option=_OPTION):
                folder.chmod(0o755)  # the server may run as another user
                num_tensors, num_bytes = self._write_weights(folder)
                self._load(folder)
            for cache in ("prefix", "mm", "encoder"):
                answer = self._post(f"/reset_{cache}_cache", {})
                if answer.get("success") is False:
                    raise StaleWeightsError(f"the server could not drop its {cache} cache: is someone else sampling?")
            self._post("/update_weight_version", {"new_version": str(policy_version)})
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self.policy_version, self._pushed = policy_version, True
        return num_tensors, num_bytes

    def _new_folder(self, policy_version: int) -> Path:
        parent = self._weights_dir
        if parent is not None and not self._pushed:
            self._made_weights_dir = not parent.exists()
            parent.mkdir(parents=True, exist_ok=True)
            _clear_leftovers(parent)
        prefix = f"version-{policy_version}-" if parent is not None else f"balcaprl-version-{policy_version}-"
        return Path(tempfile.mkdtemp(prefix=prefix, dir=parent))

    def _load(self, folder: Path) -> None:
        try:
            self._post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})
        except RefusedError as error:
            if error.status == 404:
                raise
            raise ServerError(
                f"{error} (it was to read the weights in {folder.parent}; if it does not see this folder, name one that it "
                f"does with {_OPTION})"
            ) from error

    def _write_weights(self, folder: Path) -> tuple[int, int]:
        family, config = self._policy.family, self._policy.model.config
        tensors, seen = {}, set()
        for name, tensor in merged_tensors(self._policy.stock_model).items():
            # Unlike in checkpoints, tied weights are written twice, as embedding and as head: a vLLM that has repacked
            # the head repacks it again only if the head is among the reloaded tensors.
            tied = tensor.data_ptr() in seen
            seen.add(tensor.data_ptr())
            own = tensor.cpu().contiguous()
            tensors[family.published_name(config, name)] = own.clone() if tied else own
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return len(tensors), sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    def _ask(self, prompt: Prompt) -> tuple[list[int], list[float]]:
        ids, logprobs = self._sample(prompt, 1, SamplingConfig(max_completion_tokens=NUM_PROBE_TOKENS), None)
        return ids[0], logprobs[0]

    # --------------------------------------------------------------------------------------------------- requests

    def _sample(
        self, prompt: Prompt, num_completions: int, sampling: SamplingConfig, seed: int | None
    ) -> tuple[list[list[int]], list[list[float]]]:
        answer = self._post("/inference/v1/generate", self._request(prompt, num_completions, sampling, seed))
        check_prompt(self._policy, prompt, answer.get("prompt_token_ids") or [])
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        banned = set(self._policy.banned_token_ids)
        ids = [choice["token_ids"] for choice in choices]
        logprobs = [[step["logprob"] for step in choice["logprobs"]["content"]] for choice in choices]
        for choice, sampled in zip(choices, ids, strict=True):
            if banned & set(sampled):
                raise ServerError(f"sample {prompt.sample.sample_id}: the server sampled a banned id despite its bias")
            versions = {span["version"] for span in choice.get("weight_versions") or ()}
            if versions - {str(self.policy_version)}:
                raise StaleWeightsError(f"the server sampled from versions {versions}, not {self.policy_version}")
        return ids, logprobs

    def _request(
        self, prompt: Prompt, num_completions: int, sampling: SamplingConfig, seed: int | None
    ) -> dict[str, Any]:
        params = {
            "n": num_completions,
            "temperature": 0.0 if seed is None else sampling.temperature,
            "max_tokens": sampling.max_completion_tokens,
            "stop": list(sampling.stop),
            "stop_token_ids": list(self._policy.eos_token_ids),
            "ignore_eos": True,  # the tokenizer's own end token counts only if it is one of the policy's
            "seed": seed,
            "logprobs": 0,
            "logit_bias": {str(token): _BAN for token in self._policy.banned_token_ids},
            "detokenize": bool(sampling.stop),
        }
        request: dict[str, Any] = {
            "token_ids": prompt.prompt_ids.tolist(),
            "sampling_params": params,
            "return_token_ids": True,
            "cache_salt": f"policy-{self.policy_version}",
        }
        if prompt.image_inputs:
            request["token_ids"] = collapsed(
                prompt.prompt_ids, self._policy.family.image_token_id(self._policy.model.config)
            )
            request["content_parts"] = [{"type": "image_url", "url": _data_url(prompt.image)}]
        return request

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Send a request and return the answer; connection failures are retried, because requests may be repeated."""
        pause = _FIRST_PAUSE_S
        for attempt in range(_ATTEMPTS):
            try:
                status, content = self._send(path, json.dumps(body).encode())
                break
            except (OSError, http.client.HTTPException) as error:
                if attempt == _ATTEMPTS - 1 or self._closed:
                    where = f"{self._url.scheme}://{self._url.netloc}{path}"
                    raise ServerError(f"{where} cannot be reached: {type(error).__name__}: {error}") from error
                time.sleep(pause)
                pause *= 2
        if status != 200:
            hint = ": start it with VLLM_SERVER_DEV_MODE=1 and --enable-scale-out" if status == 404 else ""
            told = content[:500].decode(errors="replace")
            raise RefusedError(f"{path}: the server answered {status}{hint}: {told}", status)
        answer = json.loads(content) if content else {}
        return answer if isinstance(answer, dict) else {}

    def _send(self, path: str, body: bytes) -> tuple[int, bytes]:
        kind = http.client.HTTPSConnection if self._url.scheme == "https" else http.client.HTTPConnection
        connection = kind(self._url.hostname or "", self._url.port, timeout=self._timeout_s)
        try:
            connection.request("POST", self._url.path.rstrip("/") + path, body, self._headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise RuntimeError("this ServerRollout is closed; make a new one")


def _clear_leftovers(weights_dir: Path) -> None:
    """Remove weights left by processes that were killed while pushing them; those of running processes stay."""
    for folder in weights_dir.glob("version-*"):
        if folder.is_dir() and not folder.is_symlink() and has_mark(folder, _MARK):
            with suppress(PathInUseError), claim_folder(folder, _MARK, option=_OPTION):
                shutil.rmtree(folder, ignore_errors=True)


def _data_url(image: Any) -> str:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
