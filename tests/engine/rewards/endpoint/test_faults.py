"""Faults of a judge server, each at 20% and all together: runs finish, counters add up, scores stay with their captions.

The judge's opinion of a caption is drawn from the caption's own words, so that another's scores are hardly ever the same.
"""

import hashlib
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scripted_judge import FAULTS, ScriptedServer, plain_answer

from balcaprl.config import EndpointConfig, RewardConfig
from balcaprl.kernels import grouped_advantages
from balcaprl.rewards import GroupScorer, advantage_inputs
from balcaprl.rewards.endpoint.judge import EndpointJudge
from balcaprl.types import Completion, Prompt, Rollout, RolloutGroup, Sample

REFERENCE = "A red cup stands on a table. A small dog sleeps. The wall is white."
KIND = {
    "server_error": {"server_error"},
    "overloaded": {"overloaded"},
    "overloaded_retry_after": {"overloaded"},
    "timeout": {"timeout"},
    "slow_drip": {"timeout"},
    "reset": {"connection"},
    "truncated_json": {"not_json"},
    "empty": {"empty"},
    "huge": {"too_large"},
    "content_type": {"content_type"},
    "not_a_completion": {"schema"},
    "wrong_schema": {"schema"},
    "nan": {"not_json", "schema"},
    "out_of_range": {"schema"},
    "wrong_count": {"count", "schema"},
    "cut_off": {"truncated"},
    "text_not_json": {"not_json"},
}
"""Fault -> how it may be counted."""
HANGING = ("timeout", "slow_drip")
"""Faults that are over only when the client's time is up. It is long beside a sound reply's on the slowest machine, so that
none but these run out of it, and the server hangs for longer still. So they are few, where others are many."""
LIMIT_S, HANG_S = 1.5, 120.0
STYLE = ("clarity", "fluency", "coherence")
REWARD = RewardConfig.model_validate({"judge": "endpoint", "protocol": {"model": "judge"}})


def lot(*texts):
    return hashlib.sha256("\0".join(texts).encode()).digest()[0]


def opinion(asked):
    """A valid reply in which every verdict and grade is drawn from the caption."""
    reply = plain_answer(asked)
    if asked.task == "verify":
        for each in reply["assertions"]:
            each["verified"] = lot(asked.data["caption"], each["text"]) % 2 == 0
    if asked.task == "match":
        reply["units"] = {n: lot(asked.data["caption"], unit) % 2 == 0 for n, unit in asked.data["units"].items()}
    if asked.task == "style":
        reply = {name: 1 + lot(asked.data["caption"], name) % 5 for name in STYLE}
    return reply


def judge_for(server, **changes):
    settings = {
        "timeout_s": 20, "retry_wait_s": 0.01, "max_retry_wait_s": 0.05, "breaker_wait_s": 0.05, "max_attempts": 8,
        "required_share": 0.95, "grace_s": 0.2, "patience_s": 30, "cache": None, **changes,
    }  # fmt: skip
    return EndpointJudge(REWARD, EndpointConfig.model_validate({"servers": [{"url": server.url}], **settings}))


def make_groups(step, num_groups=2, group_size=3):
    groups = []
    for i in range(num_groups):
        image = Image.fromarray(np.full((16, 16, 3), (step * 7 + i) % 250, np.uint8))
        prompt = Prompt(
            Sample(f"s{step}-{i}", lambda image=image: image, REFERENCE, "?"),
            torch.zeros(1, dtype=torch.long),
            {},
            None,
            "",
        )
        texts = [
            f"Bottle number{j} stands green beside dog {i} in front of wall{step} there." for j in range(group_size)
        ]
        groups.append(RolloutGroup(prompt, [Rollout(Completion([1], text, [0.0], True)) for text in texts]))
    return groups


def check_scores(text, told):
    """Each score that is there is the one drawn from this caption; returns how many are missing."""
    if not math.isnan(told.precision):
        words = [w for w in text.split() if len(w) > 2]
        verdicts = [lot(text, w) % 2 == 0 for w in words]
        assert [(a.text, a.verified) for a in told.assertions] == list(zip(words, verdicts, strict=True))
        assert told.precision == sum(verdicts) / len(words)
    if not math.isnan(told.recall):
        covered = [lot(text, unit.text) % 2 == 0 for unit in told.reference_units]
        assert [unit.covered for unit in told.reference_units] == covered
        assert told.recall == sum(covered) / 3
    if not math.isnan(told.linguistic):
        assert [told.clarity, told.fluency, told.coherence] == [1 + lot(text, name) % 5 for name in STYLE]
    return sum(map(math.isnan, told.rewards))


def check_step(groups):
    """Scores and advantages of a step; returns how many scores are missing."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    missing = sum(check_scores(rollout.completion.text, rollout.breakdown) for rollout in rollouts)
    advantages = grouped_advantages(**advantage_inputs(groups, REWARD), group_size=len(groups[0].rollouts))
    assert torch.isfinite(advantages).all()
    return missing


def run_steps(server, num_steps, num_groups=2, **changes):
    """Scores so many steps of groups of 3; returns the summed metrics and the number of missing scores."""
    judge, totals, missing = judge_for(server, **changes), {}, 0
    try:
        for step in range(num_steps):
            scorer = GroupScorer(judge, REWARD)
            groups = make_groups(step, num_groups)
            for group in groups:
                scorer.submit(group)
            for name, value in scorer.finish().judge_metrics.items():
                totals[name] = totals.get(name, 0.0) + value
            missing += check_step(groups)
    finally:
        judge.close()
    return totals, missing


def failed(metrics):
    return {
        name.removeprefix("judge/failed_"): int(v) for name, v in metrics.items() if name.startswith("judge/failed_")
    }


def check_counters(metrics, server):
    counted = failed(metrics)
    assert metrics["judge/attempts"] == metrics["judge/valid"] + sum(counted.values())
    ends = ("cached", "shared", "valid", "given_up", "cancelled")
    assert metrics["judge/calls"] == sum(metrics[f"judge/{name}"] for name in ends)
    # Requests that were cancelled may or may not have reached the server.
    cancelled = counted.pop("cancelled", 0)
    sent = metrics["judge/attempts"]
    assert sent - cancelled <= server.counts["requests"] <= sent
    # A sound answer was not taken only if it was no longer waited for: on a slow machine some come after the limit.
    late = server.counts["valid"] - metrics["judge/valid"]
    assert 0 <= late <= cancelled + counted.get("timeout", 0)
    return counted, cancelled, late


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_at_a_fifth(fault):
    """All scores arrive but those that were not waited for; each fault is counted as what it is."""
    num_steps, limit = (3, LIMIT_S) if fault in HANGING else (8, 20)
    with ScriptedServer(opinion, faults={fault: 0.2}, hang_s=HANG_S, seed=FAULTS.index(fault)) as server:
        metrics, missing = run_steps(server, num_steps, timeout_s=limit)
        counted, cancelled, late = check_counters(metrics, server)
        assert server.counts[fault] > 0
        assert set(counted) <= KIND[fault]
        assert server.counts[fault] - cancelled <= sum(counted.values()) <= server.counts[fault] + late
        assert missing <= 0.06 * num_steps * 18
        assert not server.problems


def test_all_faults_together_for_fifty_steps():
    """Every kind at once, 3% each but for those that hang: half of all replies are faulty."""
    faults = {fault: 0.005 if fault in HANGING else 0.033 for fault in FAULTS}
    with ScriptedServer(opinion, faults=faults, hang_s=HANG_S, seed=5) as server:
        metrics, missing = run_steps(server, 50, timeout_s=LIMIT_S, grace_s=0.1)
        counted, cancelled, late = check_counters(metrics, server)
        assert all(server.counts[fault] > 0 for fault in FAULTS)
        injected = sum(server.counts[fault] for fault in FAULTS)
        assert injected - cancelled <= sum(counted.values()) <= injected + late
        assert set(counted) == set().union(*KIND.values())
        assert missing <= 0.1 * 50 * 18


def test_a_fifth_of_each_fault_all_at_once():
    """Each kind drawn by itself at 20%, those that hang at 2%: all but one of 30 replies are faulty. Steps go on with what
    there is.
    """
    num_steps = 8
    faults = {fault: 0.02 if fault in HANGING else 0.2 for fault in FAULTS}
    with ScriptedServer(opinion, faults=faults, independent=True, hang_s=HANG_S, seed=6) as server:
        waits = {"timeout_s": LIMIT_S, "retry_wait_s": 0.0, "breaker_wait_s": 0.01, "grace_s": 0.0}
        metrics, missing = run_steps(server, num_steps, num_groups=1, required_share=0.3, **waits)
        counted, cancelled, late = check_counters(metrics, server)
        injected = sum(server.counts[fault] for fault in FAULTS)
        assert 0.94 < injected / server.counts["requests"] < 0.99
        assert min(server.counts[fault] for fault in FAULTS if fault not in HANGING) > 0.03 * server.counts["requests"]
        assert injected - cancelled <= sum(counted.values()) <= injected + late
        assert set(counted) == set().union(*KIND.values())
        # A share of .3 needs three of a step's nine scores, and none is left out for good: that takes five proofs in a row
        # that the server answers another call, each with a chance of 1 in 30.
        assert missing <= 6 * num_steps
        assert not server.problems


def test_no_reply_is_read_beyond_its_bound():
    """A server that never stops talking: memory stays where it was."""
    import psutil
    from aiohttp import web

    class Endless(ScriptedServer):
        async def _respond(self, request):
            response = web.StreamResponse(headers={"Content-Type": "application/json"})
            await response.prepare(request)
            try:
                for _ in range(3000):
                    await response.write(b"[" * 65536)
            except ConnectionError:
                self.counts["hung_up"] += 1
            return response

    with Endless() as server:
        judge = judge_for(server, required_share=0.9, patience_s=1, max_attempts=2, timeout_s=20)
        before = psutil.Process().memory_info().rss
        with pytest.raises(RuntimeError, match="patience"):
            judge.score(make_groups(0)[0].prompt.sample, ["A cup."])
        metrics = judge.take_metrics()
        judge.close()
        assert metrics["judge/failed_too_large"] > 0
        assert psutil.Process().memory_info().rss - before < 100 << 20
