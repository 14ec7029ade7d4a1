"""Measures the throughput of the endpoint judge against a scripted server on loopback, and of the reply cache.

    python bench/judge.py [--captions 2000] [--latency 0.2] [--slots 64] [--memory_captions 10000] [--faults] [--output FILE]
    python bench/judge.py --run --latency 0.03 [--steps 6] [--sampler vllm] [--threads 1]  # only the overlap in a run

The server runs in its own process, works on at most ``slots`` requests at once and takes ``latency`` seconds for each.
The ideal time is what the server needs if its slots are never idle. The script prints one JSON object per line:

- ``throughput``: seconds, and their ratio to the ideal time.
- ``memory``: how much this process grows over one large step, and over the same captions in steps of a thousand.
- ``cache``: lookups and writes per second of the reply cache.
- ``overlap``: the share of the judge's time that is hidden behind sampling that takes longer.
- ``fault at 20%``, only with ``--faults``: throughput with each recoverable fault in 20% of the requests, as a share of
  the throughput without faults; and the share that a client which loses no time could reach. Time-outs and slowly
  dripping replies are not recoverable: they occupy one of the client's places until the time limit, whatever it does.
- ``overlap in a run``, only with ``--run``: the same share in a training run of the demo's policy, with ``--steps``,
  ``--sampler`` and ``--threads`` (see ``judging/run_overlap.py``).
"""

from __future__ import annotations

import argparse
import heapq
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from judging.serving import FAULTS, serving
from PIL import Image
from support.rows import append_rows

from balcaprl.config import EndpointConfig, RewardConfig
from balcaprl.rewards.endpoint.judge import EndpointJudge
from balcaprl.rewards.endpoint.reference_units import UnitStore
from balcaprl.rewards.endpoint.server.cache import ReplyCache
from balcaprl.types import Sample

REFERENCE = "A red cup stands on a table. A small dog sleeps. The wall is white."
GROUP = 8
REFUSALS = ("overloaded", "overloaded_retry_after")
"""Faults with which the server replies at once; all other faults come after the latency."""
SLOW = ("timeout", "slow_drip")
RECOVERABLE = tuple(fault for fault in FAULTS if fault not in SLOW)


def main() -> None:
    """Parses arguments, prints one row per measurement, and appends them to ``--output``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=2000)
    parser.add_argument("--latency", type=float, default=0.2, help="seconds that the server takes for a request")
    parser.add_argument("--slots", type=int, default=64, help="requests that the server works on at once")
    parser.add_argument("--memory_captions", type=int, default=10_000)
    parser.add_argument("--lookups", type=int, default=20_000)
    parser.add_argument("--faults", action="store_true", help="also each recoverable fault at 20%%")
    parser.add_argument("--run", action="store_true", help="only the overlap in a training run")
    parser.add_argument("--steps", type=int, default=6, help="of that run")
    parser.add_argument("--sampler", default="vllm", choices=["vllm", "hf"], help="of that run")
    parser.add_argument("--threads", type=int, default=0, help="of that run; 0: all")
    parser.add_argument("--output", type=Path, help="JSON lines are appended here too")
    options = parser.parse_args()
    for row in run_rows(options) if options.run else rows(options):
        append_rows([row], options.output)


def run_rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yields the row of a training run. The trainer is imported here because no other measurement needs it."""
    from judging.run_overlap import overlap_in_run

    yield overlap_in_run(options)


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Runs all measurements in order and yields one row for each."""
    latency, slots = options.latency, options.slots
    with serving(latency_s=latency, slots=slots) as url:
        seconds, metrics = score(url, options.captions, slots)
    ideal = -(-options.captions // slots) * latency
    yield {
        "what": "throughput", "captions": options.captions, "latency_s": latency, "slots": slots, "seconds": seconds,
        "ideal_s": ideal, "over_ideal": seconds / ideal, "limit": metrics["judge/limit"],
    }  # fmt: skip
    with serving(latency_s=0.0, slots=slots) as url:
        yield memory(url, options.memory_captions, slots)
    yield cache(options.lookups)
    with serving(latency_s=latency, slots=slots) as url:
        yield overlap(url, slots, latency)
    if options.faults:
        yield from faults(options.captions, latency, slots)


def faults(count: int, latency: float, slots: int) -> Iterator[dict[str, Any]]:
    """One row per recoverable fault: a run without faults, then a run with the fault in 20% of the requests."""
    for fault in RECOVERABLE:
        with serving(latency_s=latency, slots=slots) as url:
            clean, _ = score(url, count, slots)
        with serving(latency_s=latency, slots=slots, faults={fault: 0.2}, retry_after=str(latency)) as url:
            seconds, _ = score(url, count, slots)
        ideal = -(-count // slots) * latency
        best = fastest(count, slots, latency, 0.2, 0.0 if fault in REFUSALS else latency)
        yield {
            "what": "fault at 20%", "fault": fault, "captions": count, "seconds": seconds, "clean_seconds": clean,
            "of_clean_throughput": clean / seconds, "possible": ideal / best,
        }  # fmt: skip


def fastest(count: int, slots: int, latency: float, share: float, fault_latency: float) -> float:
    """Seconds that a client needs if it refills each free slot at once, until every request has succeeded; mean of 20
    draws."""
    means = []
    for seed in range(20):
        draw, ends, waiting, now = random.Random(seed), [], count, 0.0
        while waiting or ends:
            while waiting and len(ends) < slots:
                waiting -= 1
                failed = draw.random() < share
                heapq.heappush(ends, (now + (fault_latency if failed else latency), failed))
            now, failed = heapq.heappop(ends)
            waiting += failed
        means.append(now)
    return statistics.mean(means)


def make_judge(url: str, slots: int, **endpoint: Any) -> EndpointJudge:
    """A judge that sends one request per caption: calls are combined, and the reference units are already stored."""
    reward = RewardConfig.model_validate({"judge": "endpoint", "protocol": {"model": "m", "calls": "combined"}})
    servers = [{"url": url, "max_concurrency": slots}]
    settings = {
        "servers": servers,
        "cache": None,
        "retry_wait_s": 0.05,
        "required_share": 1.0,
        "max_attempts": 20,
        **endpoint,
    }
    with tempfile.TemporaryDirectory() as folder:
        units = UnitStore(Path(folder) / "units.jsonl")
        units.add(REFERENCE, ["red cup", "small dog", "white wall"], "m")
        units.close()
    return EndpointJudge(reward, EndpointConfig.model_validate(settings), units=units)


def sample(index: int) -> Sample:
    """A sample with a different image for each ``index``."""
    pixels = np.random.default_rng(index).integers(0, 255, (112, 112, 3), dtype=np.uint8)
    return Sample(f"s{index}", lambda: Image.fromarray(pixels), REFERENCE, "?")


def captions(index: int) -> list[str]:
    """The captions of one group, which differ from those of all other groups."""
    return [f"A red cup {index} stands beside dog number {j}, in front of a white wall." for j in range(GROUP)]


def score(url: str, count: int, slots: int) -> tuple[float, dict[str, float]]:
    """Seconds from the first submitted caption to the last score, and the judge's metrics."""
    judge = make_judge(url, slots)
    batch = judge.open_batch()
    started = time.perf_counter()
    for i in range(-(-count // GROUP)):
        batch.submit(sample(i), captions(i))
    batch.results()
    seconds = time.perf_counter() - started
    metrics = judge.take_metrics()
    judge.close()
    return seconds, metrics


def memory(url: str, count: int, slots: int) -> dict[str, Any]:
    """Growth of this process, after a warm-up, while it scores ``count`` captions, first in steps of a thousand, then
    all in one step."""
    score(url, 2000, slots)
    row: dict[str, Any] = {"what": "memory", "captions": count}
    for name, per_step in (("growth_in_steps_mib", 1000), ("growth_mib", count)):
        process = psutil.Process()
        before = peak = process.memory_info().rss
        judge = make_judge(url, slots)
        for start in range(0, count, per_step):
            batch = judge.open_batch()
            numbers = range(start // GROUP, min(count, start + per_step) // GROUP)
            for future in [batch.submit(sample(i), captions(i)) for i in numbers]:
                future.result(600)
                peak = max(peak, process.memory_info().rss)
        judge.close()
        row[name] = (peak - before) / 2**20
    return row


def cache(count: int) -> dict[str, Any]:
    """Writes per second into a new cache, and lookups per second of what was written, for replies of 1,500 bytes."""
    with tempfile.TemporaryDirectory() as folder:
        store = ReplyCache(Path(folder) / "cache.db", 1 << 30)
        keys = [i.to_bytes(32, "big") for i in range(count)]
        started = time.perf_counter()
        for key in keys:
            store.put(key, b"x" * 1500, task="verify.v1", model="m")
        put = time.perf_counter() - started
        started = time.perf_counter()
        found = sum(store.get(key) is not None for key in keys)
        got = time.perf_counter() - started
        store.close()
    assert found == count
    return {"what": "cache", "lookups_per_second": count / got, "writes_per_second": count / put}


def overlap(url: str, slots: int, latency: float) -> dict[str, Any]:
    """Measures how much of the judge's time is hidden if a sampler submits a group every ``latency`` seconds."""
    alone, _ = score(url, 8 * GROUP, slots)
    judge = make_judge(url, slots)
    batch = judge.open_batch()
    for i in range(8):
        time.sleep(latency)
        batch.submit(sample(100 + i), captions(100 + i))
    time.sleep(latency)  # stands for the step's longest completion, which is still being sampled
    started = time.perf_counter()
    batch.results()
    waited = time.perf_counter() - started
    judge.close()
    return {"what": "overlap", "judge_alone_s": alone, "waited_s": waited, "hidden": 1 - waited / alone}


if __name__ == "__main__":
    main()
