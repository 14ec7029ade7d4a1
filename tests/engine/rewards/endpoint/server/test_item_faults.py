"""A picture on which the server always fails costs its own scores; a server that fails on all, or on many, is an outage."""

import asyncio
import json
import logging
import math

import pytest
from aiohttp import web
from picky_judge import Picky, completion, judge_of, run_steps, shade
from scripted_judge import take_apart

from balcaprl.rewards.endpoint.server.refusals import RefusalMemory
from balcaprl.types import JudgeStoppedError

FAILURES = {
    "bare 500": (500, ""),
    "500 with a page": (500, "<html><h1>Internal Server Error</h1></html>"),
    "500 with words": (500, {"error": {"message": "CUDA error: device-side assert", "code": 500}}),
    "502": (502, "Bad Gateway"),
    "503": (503, ""),
    "504": (504, ""),
    "408": (408, ""),
    "429": (429, {"error": {"message": "Request too large for tokens per min", "code": "rate_limit_exceeded"}}),
    "reset": "reset",
    "time-out": "time-out",
    "empty reply": (200, ""),
    "no completion": (200, {"object": "error"}),
    "error with status 200": (200, {"error": {"message": "engine dead", "code": 500}}),
    "no JSON": completion("I see nothing."),
    "another schema": completion('{"score": 5}'),
    "cut off": completion('{"assertions": [', "length"),
}
SHADES = [60, *range(100, 240, 20)]


class Failing(Picky):
    """Fails on pictures of one shade, as ``refusal`` says."""

    async def _respond(self, request):
        if self.refusal in ("reset", "time-out") and self.is_bad(take_apart(json.loads(await request.read()))):
            self.counts["refused"] += 1
            if self.refusal == "time-out":
                await asyncio.sleep(120)
            request.transport.abort()
            return web.Response()
        return await super()._respond(request)


def missing(scores):
    """Of each picture's captions those without the three rewards."""
    return {i: [all(map(math.isnan, b.rewards)) for b in breakdowns] for i, breakdowns in scores.items()}


def told_of(caplog, name):
    return [r.getMessage() for r in caplog.records if f"'{name}'" in r.getMessage()]


@pytest.mark.parametrize("name", FAILURES)
def test_one_picture_that_always_fails_costs_its_own_scores_alone(name, tmp_path, caplog):
    """One in eight, all three rewards in one call: the run goes on, and neither it nor a resumed one asks on and on."""
    caplog.set_level(logging.WARNING)
    hangs = {"timeout_s": 1.5, "max_attempts": 3} if name == "time-out" else {}
    with Failing() as server:
        server.refusal = FAILURES[name]
        scores, metrics = run_steps(judge_of(server, refusals=tmp_path / "r", **hangs), range(3), SHADES)
        asked = server.counts["refused"]
        assert metrics["judge/failing"] >= 4, "of six captions; once the share is there, one may be not waited for"
        ends = ("cached", "shared", "valid", "given_up", "cancelled")
        assert metrics["judge/calls"] == sum(metrics[f"judge/{end}"] for end in ends)
        resumed, more = run_steps(judge_of(server, refusals=tmp_path / "r", **hangs), range(3, 5), SHADES)
        assert server.counts["refused"] == asked, "remembered"
        assert more["judge/failing"] == 4
    for told in (scores, resumed):
        lost = missing(told)
        assert all(lost.pop(0))
        assert not any(map(any, lost.values()))
    assert len(told_of(caplog, "s0")) == 2, "once in each run"
    assert "while others are answered" in told_of(caplog, "s0")[0]


def test_a_caption_that_always_fails_costs_no_other_caption_its_scores(tmp_path):
    class Prudish(Failing):
        def is_bad(self, asked):
            return "number 0 1" in asked.data.get("caption", "")

    with Prudish() as server:
        server.refusal = (500, "")
        scores, _ = run_steps(judge_of(server, refusals=tmp_path / "r"), range(2), [100, 120], group_size=3)
    assert missing(scores) == {i: [False, True, False, False, False, False] for i in (0, 1)}


def test_a_run_of_which_all_else_is_cached_goes_on_too(tmp_path):
    """Nothing but the picture is asked for: that the server is up is seen from what it answered before."""
    with Failing() as server:
        server.refusal = (500, "")
        run_steps(judge_of(server, cache=tmp_path / "c.db"), range(1), SHADES[1:])
        judge = judge_of(server, cache=tmp_path / "c.db", refusals=tmp_path / "r")
        scores, metrics = run_steps(judge, range(1), [*SHADES[1:], 60])
    assert metrics["judge/cached"] > 0
    assert [i for i, lost in missing(scores).items() if any(lost)] == [7]


# ------------------------------------------------------------------------------------------------------ outages


def stops(server, record, shades, match, num_steps=20, **endpoint):
    endpoint = {"patience_s": 1.0, "breaker_wait_s": 0.05, "max_attempts": 3, **endpoint}
    with pytest.raises(JudgeStoppedError, match=match):
        run_steps(judge_of(server, refusals=record, **endpoint), range(num_steps), shades)


def remembered(record):
    """Subjects of which the record says that they fail."""
    lines = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    return {line["subject"] for line in lines if "failed_at" in line}


@pytest.mark.parametrize("name", ["bare 500", "429", "reset", "empty reply", "another schema"])
@pytest.mark.parametrize("begins", [0, 30])
def test_a_server_that_fails_on_all_is_an_outage(name, begins, tmp_path):
    class Down(Failing):
        def is_bad(self, asked):
            return self.counts["valid"] >= begins

    with Down() as server:
        server.refusal = FAILURES[name]
        stops(server, tmp_path / "r", SHADES, "no valid reply of a judge server|scores arrived")
    assert not remembered(tmp_path / "r")


def test_a_task_that_fails_for_all_is_an_outage_whatever_else_is_answered(tmp_path):
    """No picture can be looked at, and texts can."""

    class Blind(Failing):
        def is_bad(self, asked):
            return asked.image is not None

    with Blind() as server:
        server.refusal = (500, "")
        stops(server, tmp_path / "r", SHADES, "no valid reply of a judge server|scores arrived", calls="separate")
    assert not remembered(tmp_path / "r")


def test_more_pictures_than_the_allowed_share_end_the_run(tmp_path):
    """Half of them: as many as may be a coincidence are left out, then the scores count as missing."""

    class Half(Failing):
        def is_bad(self, asked):
            return asked.image is not None and shade(asked.image) % 2 == 0

    with Half() as server:
        server.refusal = (500, "")
        stops(server, tmp_path / "r", range(100, 124), r"scores arrived \(endpoint.required_share is 90%\)")
    assert len(remembered(tmp_path / "r")) == 4


def test_more_captions_than_the_allowed_share_end_the_run(tmp_path):
    class Fickle(Failing):
        def is_bad(self, asked):
            return " 0 stands" in asked.data.get("caption", "")

    with Fickle() as server:
        server.refusal = (500, "")
        stops(server, tmp_path / "r", SHADES, r"scores arrived \(endpoint.required_share is 90%\)")


def test_an_outage_that_passes_leaves_nothing_out(tmp_path):
    class Recovering(Failing):
        def is_bad(self, asked):
            return 20 <= self.counts["requests"] < 120

    with Recovering() as server:
        server.refusal = (500, "")
        judge = judge_of(server, refusals=tmp_path / "r", required_share=1.0, max_attempts=3, breaker_failures=1000)
        scores, metrics = run_steps(judge, range(3), SHADES)
    assert metrics["judge/failed_server_error"] > 50
    assert metrics["judge/failing"] == 0
    assert not any(map(any, missing(scores).values()))


def test_a_server_that_fails_at_random_leaves_nothing_out(tmp_path):
    with Picky(faults={"server_error": 0.4}, seed=1) as server:
        server.is_bad = lambda asked: False
        judge = judge_of(server, refusals=tmp_path / "r", required_share=1.0, max_attempts=10)
        scores, metrics = run_steps(judge, range(4), SHADES)
    assert metrics["judge/failed_server_error"] > 30
    assert metrics["judge/failing"] == 0
    assert not any(map(any, missing(scores).values()))


def test_a_server_that_is_down_beside_one_that_is_up_leaves_nothing_out(tmp_path):
    with Failing() as up, Failing() as down:
        up.is_bad, down.is_bad, down.refusal = (lambda asked: False), (lambda asked: True), (500, "")
        servers = [{"url": up.url}, {"url": down.url}]
        judge = judge_of(up, refusals=tmp_path / "r", servers=servers, required_share=1.0, breaker_wait_s=0.05)
        scores, metrics = run_steps(judge, range(3), SHADES)
    assert down.counts["refused"] > 0
    assert metrics["judge/failing"] == 0
    assert not any(map(any, missing(scores).values()))


# ------------------------------------------------------------------------------------------------------ memory


def fails(memory, key, subject=b"picture"):
    memory.add("verify", key, subject, "server_error", for_good=False)


def test_what_fails_is_asked_for_again_after_longer_and_longer_pauses(tmp_path):
    """An hour, two, and so on up to a day; calls that fail together count once, and a restart changes nothing."""
    hour, now = 3600.0, [1e9]
    pauses = []
    for round_ in range(7):
        memory = RefusalMemory(tmp_path / "r", now=lambda: now[0])
        memory.note_answered("verify", None)
        assert memory.paused(b"new", b"picture") is None
        for call in (b"a", b"b", b"c"):
            fails(memory, b"%d" % round_ + call)
        began = now[0]
        while memory.paused(b"new", b"picture"):
            assert memory.known(b"new", b"picture") is None
            now[0] += hour
        pauses.append((now[0] - began) / hour)
        memory.close()
    assert pauses == [1, 2, 4, 8, 16, 24, 24]


def test_one_call_that_fails_or_one_that_is_answered_clears_the_picture():
    memory = RefusalMemory(now=lambda: 0.0)
    fails(memory, b"a")
    assert memory.paused(b"a", b"picture") == "server_error"
    assert memory.paused(b"b", b"picture") is None
    memory.note_answered("verify", b"picture")
    fails(memory, b"b")
    assert memory.paused(b"b", b"picture") == "server_error"
    assert memory.paused(b"c", b"picture") is None


@pytest.mark.parametrize("failed_at", ["1e300", "NaN", "-1e400", '"soon"', "null", "[]", "99999999999"])
def test_a_record_of_another_time_pauses_nothing_for_longer_than_an_hour(failed_at, tmp_path):
    record, now = tmp_path / "r", [1e9]
    memory = RefusalMemory(record, now=lambda: now[0])
    memory.note_answered("verify", None)
    fails(memory, b"a")
    memory.close()
    record.write_text(record.read_text().replace("1000000000.0", failed_at))
    memory = RefusalMemory(record, now=lambda: now[0])
    now[0] += 3600
    assert memory.paused(b"a", b"picture") is None
