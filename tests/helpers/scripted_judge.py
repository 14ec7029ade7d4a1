"""A scripted OpenAI-compatible server on loopback: answers as told, after a stated time, with stated faults.

with ScriptedServer(answer, latency_s=0.05, faults={"server_error": 0.2}) as server:
    server.url, server.counts, server.usage, server.bodies
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import random
import ssl
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web


@dataclass
class Asked:
    """One request, taken apart as a careful server would."""

    task: str
    system: str
    data: Any
    image: bytes | None
    texts: list[str]
    """Every text part of the user message, raw."""
    body: dict[str, Any]
    authorization: str | None

    @property
    def image_digest(self) -> str | None:
        return None if self.image is None else hashlib.sha256(self.image).hexdigest()


def take_apart(body: dict[str, Any], authorization: str | None = None) -> Asked:
    """Raises ``ValueError`` where the messages are not one system text and one user message of an image and one JSON object."""
    system, user = body["messages"]
    if (system["role"], user["role"]) != ("system", "user"):
        raise ValueError("expected one system and one user message")
    texts, image = [], None
    for part in user["content"]:
        if part["type"] == "text":
            texts.append(part["text"])
        else:
            image = base64.b64decode(part["image_url"]["url"].partition(";base64,")[2], validate=True)
    (text,) = texts
    response_format = body["response_format"]
    task = response_format["json_schema"]["name"] if response_format["type"] == "json_schema" else ""
    return Asked(task, system["content"], json.loads(text), image, texts, body, authorization)


def plain_answer(asked: Asked) -> dict[str, Any]:
    """A valid reply to any task that depends on the caption alone: every word an assertion, long ones true."""
    data, reply = asked.data, {}
    if asked.task in ("verify", "combined"):
        words = list(dict.fromkeys(w for w in data["caption"].split() if any(map(str.isalnum, w)) and len(w) > 2))
        most = sum(map(str.isalnum, data["caption"])) // 2
        reply["assertions"] = [
            {"text": w, "quote": w, "reason": "seen", "verified": len(w) > 4, "pointable": True} for w in words[:most]
        ]
    if asked.task in ("match", "combined"):
        reply["units"] = {n: unit.split()[0].lower() in data["caption"].lower() for n, unit in data["units"].items()}
    if asked.task in ("style", "combined"):
        reply |= {"clarity": 1 + len(data["caption"]) % 5, "fluency": 3, "coherence": 4}
    if asked.task == "decompose":
        reply["units"] = [s.strip() for s in data["reference"].split(".") if s.strip()] or ["nothing"]
    if asked.task == "recaption":
        reply["caption"] = "Anew: " + data["reference"]
    if asked.task == "questions":
        reply["answers"] = dict.fromkeys(data["questions"], "A")
    if asked.task == "rubric":
        reply["criteria"] = {
            n: text.split()[0].lower() in data["caption"].lower() for n, text in data["criteria"].items()
        }
    return reply


ENVELOPE_FAULTS = ("truncated_json", "empty", "huge", "content_type", "not_a_completion")
REPLY_FAULTS = ("wrong_schema", "nan", "out_of_range", "wrong_count", "cut_off", "text_not_json")
FAULTS = (
    "server_error", "overloaded", "overloaded_retry_after", "timeout", "slow_drip", "reset", *ENVELOPE_FAULTS, *REPLY_FAULTS,
)  # fmt: skip


@dataclass
class ScriptedServer:
    """Runs in a thread of its own from ``__enter__`` to ``__exit__``."""

    answer: Callable[[Asked], dict[str, Any]] = plain_answer
    latency_s: float = 0.0
    slots: int = 10_000
    faults: dict[str, float] = field(default_factory=dict)
    """Fault -> its share of the requests; the shares add up to 1 at most."""
    independent: bool = False
    """Each fault is drawn by itself, shares may add up to more; of those drawn for one request a lot decides which it gets."""
    seed: int = 0
    retry_after: str = "0.05"
    hang_s: float = 30.0
    keep_bodies: bool = False
    respond: Callable[[Asked, dict[str, Any]], web.Response | None] | None = None
    """Sends another response than the plain one, given what was asked and the plain reply; None from it: the plain one."""
    port: int = 0
    ssl_context: ssl.SSLContext | None = None
    counts: Counter[str] = field(default_factory=Counter)
    """``requests``, ``valid``, and each fault as often as it was injected."""
    usage: Counter[str] = field(default_factory=Counter)
    asked: list[Asked] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> ScriptedServer:
        self._random = random.Random(self.seed)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _start(self) -> None:
        app = web.Application(client_max_size=1 << 28)
        app.router.add_post("/v1/chat/completions", self._handle)
        self._room = asyncio.Semaphore(self.slots)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handle_signals=False)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, ssl_context=self.ssl_context)
        await site.start()
        self.port = self._runner.addresses[0][1]

    def _draw_fault(self) -> str | None:
        if self.independent:
            drawn = [fault for fault, share in self.faults.items() if self._random.random() < share]
            return self._random.choice(drawn) if drawn else None
        place = self._random.random()
        for fault, share in self.faults.items():
            place -= share
            if place < 0:
                return fault
        return None

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        self.counts["requests"] += 1
        try:
            return await self._respond(request)
        finally:
            self.in_flight -= 1

    async def _respond(self, request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.read())
        fault = self._draw_fault()
        if fault is not None:
            self.counts[fault] += 1
        if fault in ("overloaded", "overloaded_retry_after"):
            headers = {"Retry-After": self.retry_after} if fault == "overloaded_retry_after" else {}
            return web.json_response({"error": "no room"}, status=429, headers=headers)
        if fault == "timeout":
            await asyncio.sleep(self.hang_s)
        async with self._room:
            if self.latency_s:
                await asyncio.sleep(self.latency_s)
        if fault == "server_error":
            echo = f"failed for {request.headers.get('Authorization')}: {body}"
            return web.Response(status=500, text=echo)
        if fault == "reset":
            request.transport.abort()
            return web.Response()
        try:
            asked = take_apart(body, request.headers.get("Authorization"))
            reply = self.answer(asked)
        except Exception as error:
            self.problems.append(f"{type(error).__name__}: {error}")
            return web.json_response({"error": "bad request"}, status=400)
        if self.keep_bodies:
            self.asked.append(asked)
        if self.respond is not None:
            response = self.respond(asked, reply)
            if response is not None:
                return response
        return await self._send(request, asked, reply, fault)

    async def _send(self, request: web.Request, asked: Asked, reply: Any, fault: str | None) -> web.StreamResponse:
        text, reason = spoil(reply, fault)
        usage = {"prompt_tokens": 7 + len(asked.texts[0]), "completion_tokens": 1 + len(text)}
        envelope = {
            "id": "scripted", "object": "chat.completion", "model": asked.body["model"], "usage": usage,
            "choices": [{"index": 0, "finish_reason": reason, "message": {"role": "assistant", "content": text}}],
        }  # fmt: skip
        payload = json.dumps(envelope).encode()
        if fault == "truncated_json":
            payload = payload[: len(payload) // 2]
        elif fault == "empty":
            payload = b""
        elif fault == "huge":
            payload = payload[:-1] + b" " * 10_000_000 + b"}"
        elif fault == "not_a_completion":
            payload = b'{"detail": "hello"}'
        elif fault == "slow_drip":
            response = web.StreamResponse(headers={"Content-Type": "application/json"})
            await response.prepare(request)
            for byte in payload:
                await response.write(bytes([byte]))
                await asyncio.sleep(self.hang_s / 100)
            return response
        elif fault != "content_type":
            self.usage.update(usage)
            self.counts["told_usage"] += 1
            self.counts["valid"] += fault is None
        kind = "text/html" if fault == "content_type" else "application/json"
        return web.Response(body=payload, headers={"Content-Type": kind})


def spoil(reply: dict[str, Any], fault: str | None) -> tuple[str, str]:
    """The reply's text with a fault of ``REPLY_FAULTS``, and the finish reason."""
    if fault == "cut_off":
        return json.dumps(reply)[:-5], "length"
    if fault == "text_not_json":
        return "Sure! Here is my answer: " + str(reply), "stop"
    if fault == "wrong_schema":
        return json.dumps({"score": 5, "verdict": "great"}), "stop"
    if fault == "nan":
        return _with_first_value(reply, "NaN"), "stop"
    if fault == "out_of_range":
        return _with_first_value(reply, "900"), "stop"
    if fault == "wrong_count":
        wrong = dict(reply)
        if "units" in wrong and isinstance(wrong["units"], dict):
            wrong["units"] = {**wrong["units"], "999": True}
        elif "assertions" in wrong:
            one = {"text": "x", "quote": "x", "reason": "", "verified": True, "pointable": True}
            wrong["assertions"] = [{**one, "text": f"claim {i}"} for i in range(500)]
        else:
            wrong["another"] = 5
        return json.dumps(wrong), "stop"
    return json.dumps(reply), "stop"


def _with_first_value(reply: dict[str, Any], value: str) -> str:
    key = next(iter(reply))
    return json.dumps({**reply, key: "@@"}).replace('"@@"', value)
