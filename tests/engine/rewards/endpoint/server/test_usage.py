"""Budgets hold whatever servers tell: exceeded by one request at most, and by nothing that cannot be measured."""

import asyncio
import json
import math

import numpy as np
import pytest
from PIL import Image
from scripted_judge import ScriptedServer

from balcaprl.config import EndpointConfig, RewardConfig, ServerConfig
from balcaprl.rewards.endpoint.encoding import encode_image
from balcaprl.rewards.endpoint.judge import EndpointJudge
from balcaprl.rewards.endpoint.protocol import TASKS, Call, request_body
from balcaprl.rewards.endpoint.server.usage import BudgetSpentError, Ledger, Tokens, Usage, most_tokens, told_tokens
from balcaprl.types import JudgeStoppedError, Sample

URL = "http://127.0.0.1:1/v1"
PRICES = {"input_price": 1000.0, "output_price": 1000.0}
REPLY_TOKENS = 600


class Telling(ScriptedServer):
    """Tells what it is told to tell of its tokens."""

    tells = None

    async def _send(self, request, asked, reply, fault):
        response = await super()._send(request, asked, reply, fault)
        plain = json.loads(response.body)
        del plain["usage"]
        if self.tells is not None:
            plain["usage"] = self.tells
        response.body = json.dumps(plain, allow_nan=True).encode()
        return response


def judge_of(server, path=None, prices=PRICES, max_reply_tokens=REPLY_TOKENS, concurrency=64, **endpoint):
    protocol = {"model": "judge", "max_reply_tokens": max_reply_tokens}
    servers = [{"url": server.url, "max_concurrency": concurrency, **prices}]
    return EndpointJudge(
        RewardConfig.model_validate({"judge": "endpoint", "protocol": protocol, "recall_weight": 0}),
        EndpointConfig.model_validate({"servers": servers, "cache": None, "retry_wait_s": 0.01, **endpoint}),
        ledger_path=path,
    )


def score_many(judge, num=300):
    """Until the budget ends; the judge's metrics."""
    image = Image.fromarray(np.full((28, 28, 3), 7, np.uint8))
    sample = Sample("s", lambda: image, "A red cup stands.", "?")
    try:
        judge.score(sample, [f"A red cup number {i} stands." for i in range(num)])
    except JudgeStoppedError as error:
        return str(error), judge.take_metrics()
    finally:
        judge.close()
    return None, judge.take_metrics()


UNTOLD = [
    None, {}, [], "many", 5, {"prompt_tokens": None}, {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
    {"prompt_tokens": -100, "completion_tokens": -20}, {"prompt_tokens": True, "completion_tokens": True},
    {"prompt_tokens": 10**30, "completion_tokens": 10**30}, {"prompt_tokens": math.nan, "completion_tokens": math.inf},
    {"prompt_tokens": "1e2", "completion_tokens": {}}, {"prompt_tokens": 1e300, "completion_tokens": 0.5},
    {"total_tokens": 0}, {"total_tokens": 10**15},
]  # fmt: skip


@pytest.mark.parametrize("tells", UNTOLD, ids=str)
@pytest.mark.parametrize("limit", [{"budget": 60.0}, {"token_budget": 60_000}], ids=str)
def test_what_is_not_told_or_cannot_be_counts_as_the_most_that_it_can_be(tells, limit):
    with Telling() as server:
        server.tells = tells
        told, metrics = score_many(judge_of(server, **limit))
        requests = server.counts["requests"]
    assert told is not None
    assert "endpoint." in told
    assert 3 < requests < 60
    assert metrics["judge/estimated_tokens"] == metrics["judge/prompt_tokens"] + metrics["judge/completion_tokens"] > 0
    assert metrics["judge/prompt_tokens"] + metrics["judge/completion_tokens"] < 60_000 + 8_000


@pytest.mark.parametrize(
    "tells",
    [
        {"prompt_tokens": 1000, "completion_tokens": 100},
        {"prompt_tokens": 1000.0, "completion_tokens": 100.0},
        {"prompt_tokens": "1000", "completion_tokens": "100"},
        {"input_tokens": 1000, "output_tokens": 100},
        {"total_tokens": 1100},
        {"prompt_tokens": 1000, "total_tokens": 1100},
        {"completion_tokens": 100, "total_tokens": 1100},
        {"prompt_tokens": 1000, "completion_tokens": 20, "total_tokens": 1100, "completion_tokens_details": {}},
        {"prompt_tokens": 1000, "completion_tokens": 100, "total_tokens": 0},
    ],
    ids=str,
)
def test_all_ways_of_telling_are_understood(tells):
    with Telling() as server:
        server.tells = tells
        told, metrics = score_many(judge_of(server, budget=22.5, concurrency=1))
        assert "budget is spent: 22 of endpoint.budget 22.5" in told
        assert server.counts["requests"] == 20
        assert metrics["judge/cost"] == pytest.approx(22.0)
        assert metrics["judge/estimated_tokens"] == 0


@pytest.mark.parametrize("tells", [{"prompt_tokens": 900, "completion_tokens": 500}, None])
@pytest.mark.parametrize("token_budget", [1, 5_000, 40_000, 200_000])
def test_a_budget_is_exceeded_by_one_request_at_most_however_many_are_under_way(tells, token_budget):
    with Telling(latency_s=0.02) as server:
        server.tells = tells
        told, metrics = score_many(judge_of(server, token_budget=token_budget))
        real = 1400 * server.counts["requests"]
        concurrent = server.most_in_flight
    booked = metrics["judge/prompt_tokens"] + metrics["judge/completion_tokens"]
    assert told is not None
    assert booked <= token_budget + 8_000
    assert tells is None or (booked == real and real > token_budget - 2 * 1400)
    assert concurrent <= max(1, token_budget // 600)
    assert concurrent > 5 or token_budget < 200_000


def test_a_server_that_bills_more_than_was_thought_possible_is_reckoned_with():
    with Telling(latency_s=0.01) as server:
        server.tells = {"prompt_tokens": 100_000, "completion_tokens": 600}
        _, metrics = score_many(judge_of(server, token_budget=2_000_000, concurrency=4))
    assert metrics["judge/estimated_tokens"] == 0
    assert metrics["judge/prompt_tokens"] + metrics["judge/completion_tokens"] <= 2_000_000 + 4 * 100_600


@pytest.mark.parametrize("fault", ["timeout", "reset", "slow_drip", "content_type", "huge", "truncated_json"])
def test_requests_without_a_reply_are_paid_all_the_same(fault):
    with ScriptedServer(faults={fault: 1.0}, hang_s=2) as server:
        judge = judge_of(server, token_budget=30_000, timeout_s=0.5, breaker_failures=1000, max_attempts=1000)
        told, metrics = score_many(judge, 8)
        assert "token_budget" in told
        assert server.counts["requests"] < 30
        assert metrics["judge/estimated_tokens"] > 0


@pytest.mark.parametrize("fault", ["server_error", "overloaded"])
def test_errors_cost_nothing(fault):
    with ScriptedServer(faults={fault: 0.5}, seed=1) as server:
        _, metrics = score_many(judge_of(server), 20)
    assert metrics["judge/estimated_tokens"] == 0


def test_where_no_server_can_be_reached_nothing_is_spent():
    class Nowhere:
        url = "http://127.0.0.1:9/v1"

    told, metrics = score_many(judge_of(Nowhere(), token_budget=20_000, patience_s=0.5), 3)
    assert "patience" in told
    assert metrics["judge/estimated_tokens"] == 0


# ------------------------------------------------------------------------------------------------------ restarts


def test_what_was_spent_before_counts_after_a_restart(tmp_path):
    path = tmp_path / "judge_usage.json"
    with Telling() as server:
        server.tells = {"prompt_tokens": 900, "completion_tokens": 100}
        for expected in (10, 0, 0):
            server.counts.clear()
            told, _ = score_many(judge_of(server, path, token_budget=10_500, concurrency=1))
            assert "tokens are spent: 10,000" in told
            assert server.counts["requests"] == expected


def test_what_was_under_way_at_a_kill_counts_as_spent(tmp_path):
    path = tmp_path / "judge_usage.json"
    config = EndpointConfig.model_validate({"token_budget": 10_000, "servers": [{"url": URL}]})
    server, now = ServerConfig(url=URL), [0.0]

    async def killed():
        ledger, usage = Ledger(config, path, clock=lambda: now[0]), Usage()
        first = await ledger.reserve(server, Tokens(1000, 500))
        second = await ledger.reserve(server, Tokens(2000, 1000))
        ledger.book(usage, first, {"prompt_tokens": 400, "completion_tokens": 100}, 100)
        second.is_sent = True
        now[0] = 5.0
        ledger.release(usage, first)  # writes, as more than a second has passed
        assert json.loads(path.read_text())["prompt_tokens"] == 400

    asyncio.run(killed())
    again = Ledger(config, path)
    assert (again.totals["prompt_tokens"], again.totals["completion_tokens"]) == (2400, 1100)
    again.save()
    assert Ledger(config, path).totals == again.totals, "counted once"


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"num_replies": 1}', "null", "[" * 3000, *(
        json.dumps({"num_replies": 1, "prompt_tokens": bad, "completion_tokens": 1, "cost": 1.0})
        for bad in (-1, True, "5", None, math.nan, math.inf, [1])
    )],
)  # fmt: skip
def test_a_damaged_account_is_refused_and_not_taken_for_none(content, tmp_path):
    path = tmp_path / "judge_usage.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="damaged account"):
        Ledger(EndpointConfig(), path)


# ------------------------------------------------------------------------------------------------------ start


@pytest.mark.parametrize(
    "servers",
    [
        [{}],
        [{"input_price": 1.0}],
        [{"output_price": 1.0}],
        [PRICES, {}],
        [{"input_price": 0.0, "output_price": 0.0}],
    ],
    ids=str,
)
def test_a_budget_that_cannot_be_kept_is_refused_at_the_start(servers):
    plain = [{"url": f"http://127.0.0.1:{i}/v1", **server} for i, server in enumerate(servers, 1)]
    config = EndpointConfig.model_validate({"servers": plain, "budget": 1.0, "cache": None})
    with pytest.raises(ValueError, match=r"endpoint\.budget: .*token_budget"):
        EndpointJudge(RewardConfig.model_validate({"judge": "endpoint", "protocol": {"model": "m"}}), config)


def test_a_free_server_beside_a_paid_one_is_no_obstacle():
    servers = [{"url": URL, **PRICES}, {"url": URL, "input_price": 0, "output_price": 0}]
    Ledger(EndpointConfig.model_validate({"servers": servers, "budget": 1.0}))


def test_the_most_that_a_request_takes_is_no_less_than_a_tokenizer_of_bytes_makes():
    image = encode_image(Image.new("RGB", (280, 140)), max_pixels=1 << 20, image_format="png")
    call = Call(TASKS["verify"], {"caption": "红色的球 " * 50}, image)
    config = RewardConfig.model_validate({"protocol": {"model": "m", "max_reply_tokens": 99}}).protocol
    most = most_tokens(request_body(call, config, "m"), image.num_pixels)
    text = len(call.task.prompt.encode()) + 50 * len("红色的球 ".encode())
    assert most.prompt >= text + 280 * 140 // 196
    assert most.completion == 99


def test_the_ledger_waits_for_those_under_way_before_it_says_that_all_is_spent():
    config = EndpointConfig.model_validate({"token_budget": 3_000, "servers": [{"url": URL}]})

    async def scenario():
        ledger, usage, server = Ledger(config), Usage(), ServerConfig(url=URL)
        first = await ledger.reserve(server, Tokens(1500, 500))
        waiting = asyncio.create_task(ledger.reserve(server, Tokens(1500, 500)))
        await asyncio.sleep(0)
        assert not waiting.done()
        ledger.book(usage, first, {"prompt_tokens": 200, "completion_tokens": 10}, 50)
        ledger.release(usage, first)
        second = await waiting
        ledger.book(usage, second, {"prompt_tokens": 2700, "completion_tokens": 80}, 50)
        ledger.release(usage, second)
        with pytest.raises(BudgetSpentError, match="2,990 of"):
            await ledger.reserve(server, Tokens(1500, 500))

    asyncio.run(scenario())


def test_a_told_number_is_taken_where_it_can_be():
    estimate = Tokens(10_000, 300)
    assert told_tokens({"prompt_tokens": 2500, "completion_tokens": 80}, estimate, estimate) == (Tokens(2500, 80), 0)
    assert told_tokens({"prompt_tokens": 2500}, estimate, estimate) == (Tokens(2500, 300), 300)
    assert told_tokens({"prompt_tokens": 3, "completion_tokens": 80}, estimate, estimate) == (
        Tokens(10_000, 80),
        10_000,
    )


@pytest.mark.parametrize(
    "content", ["[" * 50_000, "\x00" * 100, " " * (1 << 20) + "{}", '{"cost": 1' + "0" * 400 + "}"]
)
def test_a_hostile_account_is_refused_too_and_left_as_it_is(content, tmp_path):
    path = tmp_path / "judge_usage.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="damaged account"):
        Ledger(EndpointConfig(token_budget=10), path)
    assert path.read_text() == content


def test_a_link_under_the_temporary_name_is_not_written_through(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("precious")
    (tmp_path / "judge_usage.json.tmp").symlink_to(precious)
    Ledger(EndpointConfig(), tmp_path / "judge_usage.json").save()
    assert precious.read_text() == "precious"
