"""The adaptive limit, the circuit breaker and the dispatcher, on a clock of their own."""

import asyncio
import heapq
import math
from collections import Counter

import pytest

from balcaprl.config import ServerConfig
from balcaprl.rewards.endpoint.server.concurrency import (
    AdaptiveLimit,
    AllServersGivenUpError,
    CircuitBreaker,
    Dispatcher,
    Server,
)


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def simulate(limit, clock, seconds, *, slots, latency_s, refuse_beyond=None, refuse_share=0.0):
    """A server that works on ``slots`` requests at once, queues the others, and may refuse; returns requests served."""
    events, running, queued, served, in_flight, number = [], 0, 0, 0, 0, 0
    end = clock.now + seconds
    while clock.now < end:
        while in_flight < limit.limit:
            in_flight, number = in_flight + 1, number + 1
            refused = (
                refuse_beyond is not None and in_flight > refuse_beyond
            ) or number * refuse_share % 1 >= 1 - refuse_share
            if refused:
                heapq.heappush(events, (clock.now + 0.01, number, clock.now, "refused"))
            elif running < slots:
                running += 1
                heapq.heappush(events, (clock.now + latency_s, number, clock.now, "served"))
            else:
                queued += 1
        clock.now, _, started, what = heapq.heappop(events)
        limit.note(in_flight=in_flight, overloaded=what == "refused", latency_s=clock.now - started)
        in_flight -= 1
        if what == "served":
            served, running = served + 1, running - 1
            if queued:
                queued, running = queued - 1, running + 1
                heapq.heappush(events, (clock.now + latency_s, number, started, "served"))
    return served


def test_the_limit_grows_to_what_the_server_can_do_and_not_far_beyond():
    clock = Clock()
    limit = AdaptiveLimit(512, 60.0, clock)
    limit.limit = 8
    simulate(limit, clock, 20, slots=64, latency_s=0.2)
    assert 64 <= limit.limit <= 192
    assert simulate(limit, clock, 20, slots=64, latency_s=0.2) > 0.95 * 20 * 64 / 0.2


def test_the_limit_stays_below_what_the_server_refuses():
    clock = Clock()
    limit = AdaptiveLimit(512, 60.0, clock)
    simulate(limit, clock, 60, slots=64, latency_s=0.2, refuse_beyond=40)
    assert 20 <= limit.limit <= 60
    assert simulate(limit, clock, 20, slots=64, latency_s=0.2, refuse_beyond=40) > 0.7 * 20 * 40 / 0.2


def test_refusals_that_do_not_come_from_us_do_not_starve_the_run():
    clock = Clock()
    limit = AdaptiveLimit(64, 60.0, clock)
    simulate(limit, clock, 60, slots=64, latency_s=0.2, refuse_share=0.2)
    assert limit.limit >= 32


def test_slow_replies_lower_the_limit():
    clock = Clock()
    limit = AdaptiveLimit(64, 1.0, clock)
    for _ in range(5000):
        clock.now += 0.01
        limit.note(in_flight=limit.limit, latency_s=0.9)
    assert limit.limit < 16


def test_an_idle_client_learns_nothing():
    clock = Clock()
    limit = AdaptiveLimit(64, 60.0, clock)
    limit.limit = before = 16
    for _ in range(500):
        clock.now += 1
        limit.note(in_flight=1, latency_s=0.1)
    assert limit.limit == before


def test_the_breaker_opens_probes_and_closes():
    clock = Clock()
    breaker = CircuitBreaker(3, 2.0, clock)
    for _ in range(2):
        breaker.note_failure()
    breaker.note_success()
    for _ in range(2):
        breaker.note_failure()
    assert not breaker.is_open
    breaker.note_failure()
    assert breaker.is_open
    assert breaker.num_opened == 1
    clock.now += 2.5
    assert not breaker.is_open
    breaker.note_start()
    assert breaker.is_open  # one probe at a time
    breaker.note_failure()
    clock.now += 2.5
    assert breaker.is_open  # the second pause is longer
    clock.now += 2.5
    breaker.note_start()
    breaker.note_success()
    assert not breaker.is_open


def servers(*weights, maximum=4, clock=None):
    clock = clock or Clock()
    return [
        Server.of(ServerConfig(url=f"http://s{i}", weight=w, max_concurrency=maximum), 60.0, 3, 2.0, clock)
        for i, w in enumerate(weights)
    ]


def test_places_are_given_in_order_and_up_to_the_limit():
    async def run():
        (server,) = servers(1, maximum=8)
        dispatcher = Dispatcher([server], server.clock)
        order = []

        async def work(i):
            given = await dispatcher.acquire("image")
            order.append(i)
            most.append(server.in_flight)
            await asyncio.sleep(0)
            dispatcher.release(given)

        most = []
        await asyncio.gather(*(work(i) for i in range(20)))
        assert order == list(range(20))
        assert max(most) == server.limit.limit == 8
        assert server.in_flight == 0

    asyncio.run(run())


def test_what_is_tried_again_goes_first():
    """Among themselves in order; else a step would end with calls that fail anew while all other places are idle."""

    async def run():
        (server,) = servers(1, maximum=1)
        dispatcher = Dispatcher([server], server.clock)
        held = await dispatcher.acquire("a")
        order = []

        async def work(name, again):
            given = await dispatcher.acquire("a", again=again)
            order.append(name)
            dispatcher.release(given)

        names = [("first", False), ("again", True), ("second", False), ("again too", True)]
        waiting = [asyncio.ensure_future(work(*each)) for each in names]
        await asyncio.sleep(0)
        dispatcher.release(held)
        await asyncio.gather(*waiting)
        assert order == ["again", "again too", "first", "second"]

    asyncio.run(run())


def test_a_server_is_sound_while_most_replies_are_good():
    (server,) = servers(1)
    assert not server.is_sound  # nothing is known yet
    for _ in range(40):
        server.note_served(0.1)
    for _ in range(15):
        server.note_failed()
    assert server.is_sound
    server.note_overloaded(0.0)
    assert not server.is_sound
    for _ in range(17):
        server.note_served(0.1)
    assert server.is_sound
    for _ in range(32):
        server.note_served(0.1, valid=False)
    assert not server.is_sound


def test_an_image_keeps_its_server_and_weights_share_the_images():
    async def run():
        pool = servers(1, 3, maximum=4000)
        dispatcher = Dispatcher(pool, pool[0].clock)
        chosen = Counter()
        for image in range(400):
            first = await dispatcher.acquire(f"image {image}")
            again = await dispatcher.acquire(f"image {image}")
            assert first is again
            chosen[first.config.url] += 1
        assert 60 <= chosen["http://s0"] <= 140

    asyncio.run(run())


def test_where_the_preferred_server_is_full_or_down_another_takes_over():
    async def run():
        pool = servers(1, 1, maximum=1)
        dispatcher = Dispatcher(pool, pool[0].clock)
        first, second = await dispatcher.acquire("x"), await dispatcher.acquire("x")
        assert first is not second  # one place each at the start
        dispatcher.release(first)
        dispatcher.release(second)
        for _ in range(3):
            first.note_failed()
        assert await dispatcher.acquire("x") is second

    asyncio.run(run())


def test_a_cancelled_wait_gives_its_place_back():
    async def run():
        (server,) = servers(1, maximum=1)
        dispatcher = Dispatcher([server], server.clock)
        held = await dispatcher.acquire("a")
        waiting = [asyncio.ensure_future(dispatcher.acquire("a")) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        dispatcher.release(held)
        waiting[1].cancel()
        await asyncio.gather(*waiting[:2], return_exceptions=True)
        assert await asyncio.wait_for(waiting[2], 1) is server
        dispatcher.release(server)
        assert server.in_flight == 0

    asyncio.run(run())


def test_those_who_wait_go_on_when_a_pause_ends():
    async def run():
        loop = asyncio.get_running_loop()
        (server,) = servers(1, clock=loop.time)
        dispatcher = Dispatcher([server], loop.time)
        server.paused_until = loop.time() + 0.05
        await asyncio.wait_for(dispatcher.acquire("a"), 60)
        assert loop.time() >= server.paused_until

    asyncio.run(run())


def test_a_server_that_refuses_us_is_given_up_and_told():
    async def run():
        pool = servers(1, 1)
        dispatcher = Dispatcher(pool, pool[0].clock)
        for server in pool:
            for _ in range(3):
                server.note_refused("HTTP 401")
            assert math.isinf(server.opens_at)
        with pytest.raises(AllServersGivenUpError, match=r"http://s0: HTTP 401; http://s1: HTTP 401"):
            await dispatcher.acquire("a")

    asyncio.run(run())


def test_one_refusal_for_lack_of_room_stops_nobody_else_many_do():
    clock = Clock()
    (server,) = servers(1, clock=clock)
    server.note_overloaded(5.0)
    assert server.is_free
    for _ in range(8):
        server.note_overloaded(5.0)
    assert not server.is_free
    clock.now += 5.1
    assert server.is_free
