"""What a step tells of itself: the gap between sampler and trainer, its alarm, speeds, the machine."""

import logging
import math
import sys
from types import SimpleNamespace

import pytest
import torch

from balcaprl.training import telemetry
from balcaprl.training.telemetry import (
    PeakMemory,
    SamplingAlarm,
    SamplingGap,
    device_metrics,
    memory_metrics,
    speed_metrics,
    sync_metrics,
)
from balcaprl.types import Completion, Rollout, RolloutGroup, SyncReport


def test_the_gap_is_taken_token_by_token():
    gap = SamplingGap()
    assert gap.take_metrics() == {}
    gap.add(torch.zeros(150, requires_grad=True), torch.zeros(150))
    gap.add(torch.zeros(50), torch.cat([torch.tensor([-3.0, 0.5]), torch.zeros(48)]))
    metrics = gap.take_metrics()
    assert metrics["sampling_gap/max"] == 3.0
    assert metrics["sampling_gap/p99"] == 0.0
    values = torch.cat([torch.tensor([-3.0, 0.5]), torch.zeros(198)])
    assert metrics["sampling_gap/std"] == pytest.approx(values.std(correction=0).item())
    assert gap.take_metrics() == {}


def test_the_alarm_names_both_versions_once_each_time(caplog):
    alarm = SamplingAlarm(0.1)
    groups = [RolloutGroup(None, [], 6), RolloutGroup(None, [], 6)]
    with caplog.at_level(logging.ERROR):
        assert not alarm.check(0.05, groups, 7)
        assert not alarm.check(math.nan, groups, 7)
        assert not caplog.messages
        assert alarm.check(-0.3, groups, 7)
        assert alarm.check(0.4, groups, 8)
        assert len(caplog.messages) == 1
        assert "sampler (policy version 6) and the trainer (policy version 7)" in caplog.messages[0]
        assert not alarm.check(0.0, groups, 9)
        assert alarm.check(0.4, [RolloutGroup(None)], 10)
    assert len(caplog.messages) == 2
    assert "policy version unknown" in caplog.messages[1]


def test_speeds_and_sync():
    group = RolloutGroup(None, [Rollout(Completion([1, 2, 3], "", [0.0] * 3, True))] * 2)
    assert speed_metrics([group], 2.0, 0.5) == {"sampler_tokens_per_second": 3.0, "update_tokens_per_second": 12.0}
    assert math.isnan(speed_metrics([group], 0.0, 0.5)["sampler_tokens_per_second"])
    assert sync_metrics(SyncReport("inplace", 3, 40, 0.1, 2)) == {"sync/bytes": 40.0, "sync/tensors": 3.0}


def test_memory_follows_what_is_held_and_its_peak_what_was_freed():
    peak = PeakMemory(torch.device("cpu"))
    before, peak_before = memory_metrics()["memory/rss_gib"], peak.gib()
    held = torch.ones(64 << 20)  # 256 MiB
    assert memory_metrics()["memory/rss_gib"] > before + 0.2
    del held
    assert peak.gib() > peak_before + 0.2


def test_processor_and_gpu_metrics(monkeypatch):
    device_metrics(torch.device("cpu"))
    sum(range(10**7))
    on_cpu = device_metrics(torch.device("cpu"))
    assert set(on_cpu) == {"device/cpu_percent", "device/memory_percent"}
    assert all(0 < value <= 100 for value in on_cpu.values()), "this test itself keeps a processor busy"
    library = SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=20, total=80),
        nvmlDeviceGetUtilizationRates=lambda handle: SimpleNamespace(gpu=73),
        nvmlDeviceGetPowerUsage=lambda handle: 412_000,
    )
    monkeypatch.setitem(sys.modules, "pynvml", library)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace())
    telemetry._nvml.cache_clear()
    on_gpu = device_metrics(torch.device("cuda:1"))
    assert on_gpu == {"device/gpu_percent": 73.0, "device/memory_percent": 25.0, "device/power_watts": 412.0}

    def forbidden(handle):
        raise RuntimeError("insufficient permissions")

    library.nvmlDeviceGetPowerUsage = forbidden
    assert device_metrics(torch.device("cuda:1")) == {}
    telemetry._nvml.cache_clear()
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert device_metrics(torch.device("cuda:1")) == {}
    telemetry._nvml.cache_clear()
