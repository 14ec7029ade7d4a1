"""Metrics of a step: how far sampler and trainer differ, their speed, the memory, and how busy the machine is.

This is the only module that imports NVIDIA's management library.
"""

from __future__ import annotations

import logging
import math
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from balcaprl.types import RolloutGroup, SyncReport

logger = logging.getLogger(__name__)


class SamplingGap:
    """Collects the sampler's log-probability minus the trainer's for each sampled token."""

    def __init__(self) -> None:
        self._differences: list[Tensor] = []

    def add(self, logprobs: Tensor, sampling_logprobs: Tensor) -> None:
        """Add the trainer's log-probabilities (T,) at the start of the update, and the sampler's (T,)."""
        self._differences.append((sampling_logprobs - logprobs.detach()).float())

    def take_metrics(self) -> dict[str, float]:
        """Standard deviation of the differences since the last call, and 99th percentile and maximum of their sizes.

        All are in nats. Without tokens since the last call, the result is empty.
        """
        if not self._differences:
            return {}
        gap = torch.cat(self._differences)
        self._differences = []
        if not gap.numel():
            return {}
        size = gap.abs().sort().values
        return {
            "sampling_gap/std": gap.std(correction=0).item(),
            "sampling_gap/p99": size[math.ceil(0.99 * len(size)) - 1].item(),
            "sampling_gap/max": size[-1].item(),
        }


class SamplingAlarm:
    """Logs an error when sampler and trainer drift apart, once each time that happens.

    Args:
        limit: largest absolute value of ``sampling_kl`` that counts as normal.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self.raised = False

    def check(self, sampling_kl: float, groups: list[RolloutGroup], policy_version: int) -> bool:
        """Return whether ``sampling_kl`` is outside its band; when it leaves the band, log the versions of both sides.

        Args:
            sampling_kl: value over the step's tokens; NaN if there were none.
            groups: the groups that were sampled.
            policy_version: version of the weights with which the trainer computed its log-probabilities.
        """
        outside = not math.isnan(sampling_kl) and abs(sampling_kl) > self._limit
        if outside and not self.raised:
            versions = sorted({g.policy_version for g in groups if g.policy_version is not None})
            logger.error(
                "sampling_kl is %.3g, outside its band of +-%.3g: the sampler (policy version %s) and the trainer (policy "
                "version %d) disagree on the same tokens. Check rollout.sync_probe: always, the data type, and the versions "
                "of vLLM and transformers",
                sampling_kl,
                self._limit,
                ", ".join(map(str, versions)) or "unknown",
                policy_version,
            )
        self.raised = outside
        return outside


def speed_metrics(groups: list[RolloutGroup], sampling_seconds: float, update_seconds: float) -> dict[str, float]:
    """Completion tokens per second of the sampler and of the update."""
    num_tokens = sum(len(rollout.completion.token_ids) for group in groups for rollout in group.rollouts)
    return {
        "sampler_tokens_per_second": num_tokens / sampling_seconds if sampling_seconds > 0 else math.nan,
        "update_tokens_per_second": num_tokens / update_seconds if update_seconds > 0 else math.nan,
    }


def sync_metrics(report: SyncReport) -> dict[str, float]:
    """What a weight sync moved; the time that it took is ``time/sync``."""
    return {"sync/bytes": float(report.bytes_copied), "sync/tensors": float(report.num_tensors)}


def memory_metrics() -> dict[str, float]:
    """Memory of this process in GiB.

    The metrics are its resident size and, if CUDA is in use, the peak of PyTorch's CUDA allocator since the step's
    update began (``PeakMemory`` resets it there).
    """
    metrics = {"memory/rss_gib": _resident_gib()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        metrics["memory/cuda_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return metrics


class PeakMemory:
    """Peak of the memory in use since the object was made: PyTorch's allocator on CUDA, otherwise this process.

    Linux records the peak of a process, and resets it on request. On other systems, ``gib`` returns the memory in use.
    """

    _CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            with suppress(OSError):
                self._CLEAR.write_text("5")

    def gib(self) -> float:
        """The peak in GiB."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / 2**30
        with suppress(OSError, StopIteration):
            line = next(x for x in self._STATUS.read_text().splitlines() if x.startswith("VmHWM:"))
            return int(line.split()[1]) / 2**20
        return _resident_gib()


def _resident_gib() -> float:
    return float(psutil.Process().memory_info().rss / 2**30)


def device_metrics(device: torch.device) -> dict[str, float]:
    """How busy the machine is.

    On CUDA, the metrics are the utilisation, memory and power of the NVIDIA GPU. Otherwise, they are the memory in use,
    and the load of the processors since the last call.
    """
    if device.type != "cuda":
        return {"device/cpu_percent": psutil.cpu_percent(), "device/memory_percent": psutil.virtual_memory().percent}
    library, handle = _nvml(device.index or 0)
    if library is None:
        return {}
    try:
        memory = library.nvmlDeviceGetMemoryInfo(handle)
        return {
            "device/gpu_percent": float(library.nvmlDeviceGetUtilizationRates(handle).gpu),
            "device/memory_percent": 100.0 * memory.used / memory.total,
            "device/power_watts": library.nvmlDeviceGetPowerUsage(handle) / 1000.0,
        }
    except library.NVMLError as error:
        logger.debug("no GPU metrics: %s", error)
        return {}


@lru_cache(maxsize=8)
def _nvml(index: int) -> tuple[Any, Any]:
    """NVIDIA's library and the handle of torch's device ``index``; (None, None) if they cannot be used."""
    try:
        import pynvml

        pynvml.nvmlInit()
        uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)  # NVML ignores CUDA_VISIBLE_DEVICES
        if uuid is None:
            return pynvml, pynvml.nvmlDeviceGetHandleByIndex(index)
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except Exception as error:  # missing package, library, driver or permission: metrics must not end a run
        logger.info("no GPU metrics (%s); install nvidia-ml-py to have them", error)
        return None, None
