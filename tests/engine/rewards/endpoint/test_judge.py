"""The endpoint judge against scripted servers: exact where the server is truthful, thrifty, complete, and able to stop."""

import asyncio
import itertools
import json
import logging
import math
import os
import signal
import threading
import time
from concurrent.futures import wait
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scripted_judge import ScriptedServer, plain_answer
from truthful_judge import truthful_answer

from balcaprl.config import EndpointConfig, RewardConfig
from balcaprl.data.scenes import flawed_caption, scene_sample
from balcaprl.rewards import GroupScorer, make_judge, score_groups
from balcaprl.rewards.endpoint.batch import EndpointBatch
from balcaprl.rewards.endpoint.judge import EndpointJudge
from balcaprl.rewards.endpoint.reference_units import UnitStore, units_path
from balcaprl.rewards.judge import BackgroundJudge
from balcaprl.rewards.scenes.judge import SceneJudge
from balcaprl.types import Completion, JudgeStoppedError, Prompt, Rollout, RolloutGroup, Sample

REFERENCE = "A red cup stands on a table. A small dog sleeps. The wall is white."


def sample(index=0, reference=REFERENCE, facts=None):
    image = Image.fromarray(np.full((40, 40, 3), index % 250, np.uint8))
    return Sample(f"s{index}", lambda: image, reference, "?", facts)


def group(sample_, captions):
    prompt = Prompt(sample_, torch.zeros(1, dtype=torch.long), {}, None, "")
    return RolloutGroup(prompt, [Rollout(Completion([1], text, [0.0], True)) for text in captions])


def make(server, *, reward=None, cache=None, **endpoint):
    plain = {"retry_wait_s": 0.01, "max_retry_wait_s": 0.1, "patience_s": 20, "cache": cache, **endpoint}
    urls = server if isinstance(server, list) else [{"url": server.url}]
    protocol = {"model": "judge", **(reward or {}).pop("protocol", {})} if reward else {"model": "judge"}
    return EndpointJudge(
        RewardConfig.model_validate({"judge": "endpoint", "protocol": protocol, **(reward or {})}),
        EndpointConfig.model_validate({"servers": urls, **plain}),
    )


@pytest.fixture
def judges():
    """Makes judges and closes them."""
    made = []

    def factory(*args, **kwargs):
        made.append(make(*args, **kwargs))
        return made[-1]

    yield factory
    for judge in made:
        judge.close()


def adds_up(metrics):
    """The invariants of the counters."""
    failed = sum(value for name, value in metrics.items() if name.startswith("judge/failed_"))
    assert metrics["judge/attempts"] == metrics["judge/valid"] + failed
    ends = ("cached", "shared", "valid", "given_up", "cancelled")
    assert metrics["judge/calls"] == sum(metrics[f"judge/{name}"] for name in ends)


# ------------------------------------------------------------------------------------------------------ exactness


@pytest.fixture(scope="module")
def scene_captions():
    """63 scenes with 8 captions each, flawed as the warm start's are; 504 captions."""
    samples = [scene_sample("train", i, instruction="?") for i in range(63)]
    rng = np.random.default_rng(0)
    captions, seen = [], set()
    for each in samples:
        texts = []
        while len(texts) < 8:
            text = flawed_caption(each.facts, rng)
            if text not in seen:
                seen.add(text)
                texts.append(text)
        captions.append(texts)
    return samples, captions


@pytest.mark.parametrize("calls", ["separate", "combined"])
def test_a_truthful_judge_gives_the_scene_judges_rewards_exactly(scene_captions, judges, calls):
    samples, captions = scene_captions
    protocol = {"calls": calls, "integer_scores": False, "image_format": "png"}
    with ScriptedServer(truthful_answer(samples, captions)) as server:
        judge = judges(server, reward={"protocol": protocol})
        batch = judge.open_batch()
        for each, texts in zip(samples, captions, strict=True):
            batch.submit(each, texts)
        judged = batch.results()
        assert not server.problems
    exact = SceneJudge()
    num_captions = 0
    for each, texts, breakdowns in zip(samples, captions, judged, strict=True):
        for told, truth in zip(breakdowns, exact.score(each, texts), strict=True):
            assert told.rewards == truth.rewards
            assert [a.counted for a in told.assertions] == [a.counted for a in truth.assertions]
            assert [a.spans[0] in b.spans for a, b in zip(truth.assertions, told.assertions, strict=True)]
            assert [u.covered for u in told.reference_units] == [u.covered for u in truth.reference_units]
            num_captions += 1
    assert num_captions >= 500


def test_no_score_goes_to_another_caption(judges):
    """Replies come in any order; each caption's grades tell its own length."""

    def answer(asked):
        if "caption" in asked.data:
            time.sleep(0.001 * (hash(asked.data["caption"]) % 5))
        return plain_answer(asked)

    with ScriptedServer(answer, latency_s=0.01) as server:
        judge = judges(server)
        batch = judge.open_batch()
        texts = [[f"A cup of size {'x' * (i + 7 * j)} stands." for i in range(7)] for j in range(10)]
        for j, each in enumerate(texts):
            batch.submit(sample(j), each)
        for each, breakdowns in zip(texts, batch.results(), strict=True):
            assert [b.clarity for b in breakdowns] == [1 + len(text) % 5 for text in each]


# ------------------------------------------------------------------------------------------------------ thrift


def test_what_is_sent(judges):
    with ScriptedServer(keep_bodies=True) as server:
        judge = judges(server)
        judge.score(sample(), ["A red cup.", "A small dog."])
        tasks = sorted(asked.task for asked in server.asked)
        assert tasks == ["decompose", "match", "match", "style", "style", "verify", "verify"]
        for asked in server.asked:
            assert (asked.image is not None) == (asked.task == "verify")
            assert asked.body["model"] == "judge"
            assert asked.body["temperature"] == 0
            assert asked.authorization is None


def test_identical_captions_are_judged_once_and_the_cache_answers_the_rest(judges, tmp_path):
    captions = ["A red cup.", "A red cup.", "A small dog.", "A red cup."]
    with ScriptedServer(latency_s=0.02) as server:
        judge = judges(server, cache=tmp_path / "c.db")
        batch = judge.open_batch()
        batch.submit(sample(), captions)
        batch.submit(sample(), captions)
        first, second = batch.results()
        assert first == second
        assert first[0] == first[1] == first[3] != first[2]
        assert server.counts["requests"] == 7
        metrics = judge.take_metrics()
        adds_up(metrics)
        assert metrics["judge/shared"] + metrics["judge/cached"] == 7
        again = judges(server, cache=tmp_path / "c.db").score(sample(), captions)
        assert again == first
        assert server.counts["requests"] == 7


@pytest.mark.parametrize(
    ("first", "second"), [(("", "small"), ("", "big")), (("m", "small"), ("m", "big")), (("m", ""), ("n", ""))]
)
def test_the_cache_answers_for_no_other_model(judges, tmp_path, first, second):
    """Whether the protocol or the server names it: what the server is asked for counts."""

    def ask(server, protocol, model):
        judge = judges(
            [{"url": server.url, "model": model}], reward={"protocol": {"model": protocol}}, cache=tmp_path / "c.db"
        )
        return judge.score(sample(), ["A red cup."])

    with ScriptedServer(keep_bodies=True) as server:
        for names, expected in ((first, 4), (second, 8), (first, 8), (second, 8)):
            ask(server, *names)
            assert server.counts["requests"] == expected
        asked = {each.body["model"] for each in server.asked}
        assert asked == {first[1] or first[0], second[1] or second[0]}
        ask(server, "whatever", first[1] or first[0])
        assert server.counts["requests"] == 8, "the same model under its other name"


def test_the_cache_holds_neither_captions_nor_images(judges, tmp_path):
    secret = "A quetzalcoatlus juggles."

    def answer(asked):
        return {"assertions": []} if asked.task == "verify" else plain_answer(asked)

    with ScriptedServer(answer) as server:
        judge = judges(server, cache=tmp_path / "c.db")
        judge.score(sample(), [secret])
        judge.close()
    assert b"quetzal" not in b"".join(path.read_bytes() for path in tmp_path.iterdir())


def test_calls_about_one_image_come_together(judges):
    with ScriptedServer(latency_s=0.005, keep_bodies=True) as server:
        judge = judges([{"url": server.url, "max_concurrency": 2}])
        batch = judge.open_batch()
        for i in range(6):
            batch.submit(sample(i), [f"A cup {j} of {i}." for j in range(6)])
        batch.results()
        order = [asked.data["caption"].split()[-1] for asked in server.asked if asked.task == "verify"]
        changes = sum(a != b for a, b in itertools.pairwise(order))
        assert changes <= 2 * 6
        assert server.most_in_flight <= 2


def test_only_rewards_that_count_are_asked_for(judges):
    with ScriptedServer(keep_bodies=True) as server:
        judge = judges(server, reward={"precision_weight": 0, "recall_weight": 0})
        (breakdown,) = judge.score(sample(), ["A red cup."])
        assert {asked.task for asked in server.asked} == {"style"}
        assert math.isnan(breakdown.precision)
        assert breakdown.linguistic > 0
        conditions = [{"reward": "linguistic", "on": "precision", "at_least": 0.5}]
        judge = judges(server, reward={"precision_weight": 0, "recall_weight": 0, "conditions": conditions})
        assert judge.tasks == ("verify", "style")


def test_combined_calls_are_one_a_caption(judges):
    with ScriptedServer(keep_bodies=True) as server:
        judge = judges(server, reward={"protocol": {"calls": "combined"}})
        (breakdown,) = judge.score(sample(), ["A red cup."])
        assert sorted(asked.task for asked in server.asked) == ["combined", "decompose"]
        assert not any(map(math.isnan, breakdown.rewards))


def test_captions_without_words_are_not_sent(judges):
    with ScriptedServer(keep_bodies=True) as server:
        judge = judges(server)
        breakdowns = judge.score(sample(), ["", " \n", "... !?", "\u200b", "\U0001f600"])
        assert {b.rewards for b in breakdowns} == {(0.0, 0.0, 0.0)}
        assert not server.asked


def test_prepared_units_are_used(judges, tmp_path):
    data = tmp_path / "captions.jsonl"
    data.write_text("")
    store = UnitStore(units_path(data))
    store.add(REFERENCE, ["red cup", "white wall"], "judge")
    store.close()
    with ScriptedServer(keep_bodies=True) as server:
        config = RewardConfig.model_validate({"judge": "endpoint", "protocol": {"model": "judge"}})
        endpoint = EndpointConfig.model_validate({"servers": [{"url": server.url}], "cache": None})
        judge = make_judge(config, "jsonl", endpoint=endpoint, data_path=data)
        (breakdown,) = judge.score(sample(), ["A red cup."])
        judge.close()
        assert [u.text for u in breakdown.reference_units] == ["red cup", "white wall"]
        assert breakdown.recall == 0.5
        assert "decompose" not in {asked.task for asked in server.asked}


# ------------------------------------------------------------------------------------------------------ partial results


def test_a_component_that_fails_is_missing_by_itself(judges):
    def answer(asked):
        if asked.task == "match":
            raise ValueError("HTTP 400")
        return plain_answer(asked)

    with ScriptedServer(answer) as server:
        judge = judges(server, required_share=0.6, grace_s=0)
        (breakdown,) = judge.score(sample(), ["A red cup stands."])
        assert math.isnan(breakdown.recall)
        assert breakdown.precision > 0
        assert breakdown.linguistic > 0
        assert breakdown.error is None
        metrics = judge.take_metrics()
        adds_up(metrics)
        assert metrics["judge/failed_bad_request"] == 1  # hopeless: not tried again


def test_an_unusable_image_costs_precision_alone(judges):
    def broken():
        raise OSError("truncated file")

    with ScriptedServer() as server:
        judge = judges(server)
        (breakdown,) = judge.score(replace(sample(), load_image=broken), ["A red cup stands."])
        assert math.isnan(breakdown.precision)
        assert breakdown.recall > 0


class SlowServer(ScriptedServer):
    """Holds what is asked about a straggler back for so long as ``holds`` says."""

    def holds(self):
        return True

    async def _respond(self, request):
        if b"straggler" in await request.read():
            while self.holds():
                await asyncio.sleep(0.01)
        return await super()._respond(request)


CAPTIONS = [*(f"A red cup {i}." for i in range(9)), "A straggler stands."]


def test_a_step_goes_on_without_its_stragglers(judges):
    gone_on = threading.Event()
    with SlowServer() as server:
        server.holds = lambda: not gone_on.is_set()
        judge = judges(server, required_share=0.8, grace_s=0.3)
        breakdowns = judge.score(sample(), CAPTIONS)
        gone_on.set()
        assert all(b.precision >= 0 for b in breakdowns[:9])
        assert breakdowns[9].error is not None
        metrics = judge.take_metrics()
        adds_up(metrics)
        assert metrics["judge/cancelled"] > 0, "not waited for until its time was up"
        assert "judge/failed_timeout" not in metrics


def test_stragglers_that_come_within_the_grace_count(judges):
    with SlowServer() as server:
        server.holds = lambda: server.counts["valid"] < 1 + 9 * 3  # the units, and all about the others
        judge = judges(server, required_share=0.8, grace_s=60)
        assert not any(math.isnan(r) for b in judge.score(sample(), CAPTIONS) for r in b.rewards)


def test_missing_scores_are_asked_for_again_until_the_share_is_there(judges):
    """A server that fails every call at first, more often than a call is tried."""
    count = [0]

    class Recovering(ScriptedServer):
        def _draw_fault(self):
            count[0] += 1
            return "wrong_schema" if count[0] <= 60 else None

    with Recovering() as server:
        judge = judges(server, max_attempts=2)
        breakdowns = judge.score(sample(), [f"A red cup {i}." for i in range(5)])
        assert not any(math.isnan(r) for b in breakdowns for r in b.rewards)
        metrics = judge.take_metrics()
        adds_up(metrics)
        assert metrics["judge/failed_schema"] == 60
        assert metrics["judge/given_up"] > 0


# ------------------------------------------------------------------------------------------------------ stopping


def test_a_dead_endpoint_ends_the_wait_after_the_patience(judges):
    judge = judges([{"url": "http://127.0.0.1:9/v1"}], patience_s=0.6, max_attempts=1000)
    message = r"no valid reply of a judge server for 0\.6 s .*patience.*127\.0\.0\.1:9.*connection"
    with pytest.raises(JudgeStoppedError, match=message):
        judge.score(sample(), ["A red cup."])


def test_scores_that_never_come_end_the_wait_too(judges):
    with ScriptedServer(faults={"wrong_schema": 1.0}) as server:
        judge = judges(server, patience_s=0.6, max_attempts=1)
        with pytest.raises(JudgeStoppedError, match="patience"):
            judge.score(sample(), ["A red cup."])
        adds_up(judge.take_metrics())


@pytest.mark.parametrize("status", [401, 403, 404, 301])
def test_a_server_that_refuses_us_ends_the_run_at_once(judges, status):
    class Refusing(ScriptedServer):
        async def _respond(self, request):
            from aiohttp import web

            self.counts["requests"] += 0
            return web.Response(
                status=status, headers={"Location": "http://127.0.0.1:9/elsewhere"} if status == 301 else {}
            )

    with Refusing() as server:
        judge = judges(server)
        with pytest.raises(
            JudgeStoppedError, match=f"no judge server is left.*HTTP {status}: check url, model and key"
        ):
            judge.score(sample(), ["A red cup."])


def test_a_server_that_dies_is_replaced_by_the_others(judges):
    with ScriptedServer() as server:
        judge = judges([{"url": "http://127.0.0.1:9/v1"}, {"url": server.url}])
        batch = judge.open_batch()
        for i in range(10):
            batch.submit(sample(i), [f"A red cup {i} {j}." for j in range(4)])
        assert not any(math.isnan(r) for g in batch.results() for b in g for r in b.rewards)


def test_a_server_that_comes_back_is_used_again(judges):
    with ScriptedServer() as server:
        port = server.port
    judge = judges([{"url": f"http://127.0.0.1:{port}/v1"}], breaker_failures=2, breaker_wait_s=0.2, max_attempts=50)
    batch = judge.open_batch()
    batch.submit(sample(), ["A red cup."])
    time.sleep(0.5)
    with ScriptedServer(port=port):
        ((breakdown,),) = batch.results()
    assert breakdown.precision >= 0
    metrics = judge.take_metrics()
    adds_up(metrics)
    assert metrics["judge/breaker_opened"] >= 1
    assert metrics["judge/failed_connection"] >= 2


def test_the_budget_stops_the_run_and_survives_it(tmp_path):
    with ScriptedServer() as server:
        servers = [{"url": server.url, "input_price": 1e3, "output_price": 2e3, "max_concurrency": 1}]
        config = RewardConfig.model_validate({"judge": "endpoint", "protocol": {"model": "judge"}})
        for budget, goes_on in ((3.0, False), (3.0, False), (1e6, True)):
            endpoint = EndpointConfig.model_validate({"servers": servers, "cache": None, "budget": budget})
            judge = make_judge(config, "jsonl", endpoint=endpoint, run_dir=tmp_path)
            captions = [f"A red cup {i}." for i in range(40)]
            try:
                if goes_on:
                    judge.score(sample(), captions)
                else:
                    with pytest.raises(JudgeStoppedError, match=r"budget is spent: .* of endpoint\.budget 3; raise it"):
                        judge.score(sample(), captions)
            finally:
                judge.close()
            cost = json.loads((tmp_path / "judge_usage.json").read_text())["cost"]
            paid = (1e3 * server.usage["prompt_tokens"] + 2e3 * server.usage["completion_tokens"]) / 1e6
            assert cost == pytest.approx(paid)
            assert goes_on or 2.0 < cost <= 3.0


def test_tokens_are_counted_as_the_server_counts_them(judges):
    with ScriptedServer(faults={"wrong_schema": 0.2, "out_of_range": 0.2}) as server:
        judge = judges(server)
        judge.score(sample(), [f"A red cup {i}." for i in range(30)])
        metrics = judge.take_metrics()
        adds_up(metrics)
        assert metrics["judge/prompt_tokens"] == server.usage["prompt_tokens"]
        assert metrics["judge/completion_tokens"] == server.usage["completion_tokens"]
        assert metrics["judge/attempts"] == server.counts["requests"]
        assert metrics["judge/valid"] == server.counts["valid"]


def test_the_token_budget_stops_the_run(judges):
    with ScriptedServer() as server:
        judge = judges([{"url": server.url, "max_concurrency": 1}], token_budget=2000)
        with pytest.raises(JudgeStoppedError, match=r"tokens are spent: .* of endpoint\.token_budget 2,000"):
            judge.score(sample(), [f"A red cup {i}." for i in range(90)])
        assert sum(server.usage.values()) <= 2000


def test_an_interrupt_is_not_swallowed_and_leaves_nothing_running(judges):
    with ScriptedServer(latency_s=5) as server:
        judge = judges(server)
        batch = judge.open_batch()
        batch.submit(sample(), ["A red cup."])
        # A shell's background job starts with SIGINT ignored: Python then does not raise KeyboardInterrupt by itself.
        previous = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
            with pytest.raises(KeyboardInterrupt):
                batch.results()
        finally:
            signal.signal(signal.SIGINT, previous)
        time.sleep(0.1)
        assert judge.client.servers[0].in_flight == 0


# ------------------------------------------------------------------------------------------------------ overlap


def test_groups_are_scored_while_others_are_sampled(judges, monkeypatch):
    """Every group that was handed over gets its scores before anyone asks for them."""
    groups, open_group = [], EndpointBatch.open_group
    monkeypatch.setattr(EndpointBatch, "open_group", lambda *given: groups.append(open_group(*given)) or groups[-1])
    with ScriptedServer(latency_s=0.05) as server:
        judge = judges(server)
        assert isinstance(judge, BackgroundJudge)
        scorer = GroupScorer(judge, RewardConfig(judge="endpoint"))
        for i in range(6):
            scorer.submit(group(sample(i), [f"A red cup {i} {j}." for j in range(4)]))
        assert len(groups) == 6
        assert not wait([each.future for each in groups], timeout=20).not_done
        requests = server.counts["requests"]
        stats = scorer.finish()
        assert server.counts["requests"] == requests
    assert stats.num_unscorable == 0
    assert stats.num_captions == 24
    adds_up(stats.metrics())


def test_captions_are_scored_while_others_of_their_group_are_sampled(judges):
    """In any order, equal ones once, and each score reaches its own rollout; the image and its units are asked for once."""
    captions = ["A red cup.", "A blue cup on a table.", "A red cup.", "A dog."]
    with ScriptedServer(latency_s=0.01) as server:
        judge = judges(server)
        whole, parts = group(sample(0), captions), group(sample(1), captions)
        score_groups(judge, [whole], RewardConfig(judge="endpoint"))
        asked = server.counts["requests"]
        scorer = GroupScorer(judge, RewardConfig(judge="endpoint"))
        handle = scorer.open_group(sample(1))
        for position in (3, 0, 2):
            handle.add(position, parts.rollouts[position])
            deadline = time.monotonic() + 120  # only a hang takes so long
            before = server.counts["requests"]
            while position != 2 and server.counts["requests"] < before + 3 and time.monotonic() < deadline:
                time.sleep(0.01)
        early = server.counts["requests"] - asked
        assert 6 <= early < asked, "two of the three distinct captions are being judged"
        scorer.submit(parts, handle)
        stats = scorer.finish()
        assert server.counts["requests"] == 2 * asked
    assert stats.num_unscorable == 0
    for one, other in zip(whole.rollouts, parts.rollouts, strict=True):
        assert one.breakdown.rewards == other.breakdown.rewards
    assert len({r.breakdown.rewards for r in parts.rollouts}) == 3


def test_a_group_can_be_used_as_soon_as_it_is_scored(judges):
    with ScriptedServer(latency_s=0.02) as server:
        judge = judges(server)
        batch = judge.open_batch()
        futures = [batch.submit(sample(i), [f"A red cup {i}."]) for i in range(3)]
        early = [future.result(timeout=10) for future in futures]
        assert early == batch.results()


def test_scoring_groups_tells_the_metrics(judges):
    with ScriptedServer() as server:
        judge = judges(server)
        groups = [group(sample(i), ["A green bottle.", ""]) for i in range(3)]
        stats = score_groups(judge, groups, RewardConfig(judge="endpoint"))
        assert stats.metrics()["judge/valid"] == server.counts["valid"] > 0
        assert groups[0].rollouts[0].breakdown.precision > 0


# ------------------------------------------------------------------------------------------------------ configuration


def test_bad_configurations_say_what_to_do(monkeypatch):
    reward = RewardConfig(judge="endpoint")
    with pytest.raises(ValueError, match=r"endpoint\.servers: the endpoint judge needs at least one server"):
        make_judge(reward, "jsonl")
    server = {"url": "http://127.0.0.1:1/v1"}
    with pytest.raises(ValueError, match=r"reward\.protocol\.model"):
        make_judge(reward, "jsonl", endpoint=EndpointConfig.model_validate({"servers": [server], "cache": None}))
    named = EndpointConfig.model_validate(
        {"servers": [{**server, "model": "m", "api_key_env": "MY_KEY"}], "cache": None}
    )
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(ValueError, match="the environment variable MY_KEY holds no key"):
        make_judge(reward, "jsonl", endpoint=named)
    monkeypatch.setenv("MY_KEY", "abc\r\nX-Evil: 1")
    with pytest.raises(ValueError, match="MY_KEY") as caught:
        make_judge(reward, "jsonl", endpoint=named)
    assert "abc" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["ftp://x", "http://user:secret@host/v1", "host:8000", "http://host/v1?key=secret", "http://host/v1#x", ""]
)
def test_bad_addresses_are_refused(url):
    with pytest.raises(ValueError, match="url"):
        EndpointConfig.model_validate({"servers": [{"url": url}]})


def test_a_key_in_place_of_its_variables_name_is_refused():
    with pytest.raises(ValueError, match="api_key_env"):
        EndpointConfig.model_validate({"servers": [{"url": "http://h", "api_key_env": "sk-abcdef1234567890"}]})


def test_no_library_logs_requests(judges, caplog):
    caplog.set_level(logging.DEBUG)
    with ScriptedServer() as server:
        judges(server).score(sample(), ["A zeppelin."])
    assert "zeppelin" not in caplog.text
