"""A judge server that will have nothing to do with some pictures, and steps of the endpoint judge that meet it."""

import io
import json

import numpy as np
from aiohttp import web
from PIL import Image
from scripted_judge import ScriptedServer, take_apart

from balcaprl.config import EndpointConfig, RewardConfig
from balcaprl.rewards.endpoint.judge import EndpointJudge
from balcaprl.types import Sample


def error(status, message="", code=None, **more):
    return status, {"error": {"message": message, "code": code, **more}}


def completion(content=None, reason="stop", **message):
    choice = {"index": 0, "finish_reason": reason, "message": {"role": "assistant", "content": content, **message}}
    return 200, {"choices": [choice], "usage": {"prompt_tokens": 500, "completion_tokens": 0}}


class Picky(ScriptedServer):
    """Refuses pictures of one shade, or whatever ``is_bad`` says."""

    refusal = (400, "")

    def is_bad(self, asked):
        return asked.image is not None and shade(asked.image) == 60

    async def _respond(self, request):
        asked = take_apart(json.loads(await request.read()))
        if not self.is_bad(asked):
            return await super()._respond(request)
        self.counts["refused"] += 1
        status, payload = self.refusal
        if isinstance(payload, str):
            return web.Response(status=status, text=payload, content_type="text/html")
        return web.json_response(payload, status=status)


def shade(data):
    return Image.open(io.BytesIO(data)).getpixel((5, 5))[0]


def sample(index, value):
    image = Image.fromarray(np.full((40, 40, 3), value, np.uint8))
    reference = f"A red cup stands on table {index}. A small dog sleeps."
    return Sample(f"s{index}", lambda: image, reference, "?")


def judge_of(server, *, calls="combined", refusals=None, cache=None, **endpoint):
    settings = {"retry_wait_s": 0.01, "max_retry_wait_s": 0.05, "patience_s": 30, "cache": cache, **endpoint}
    protocol = {"model": "judge", "calls": calls, "image_format": "png"}
    return EndpointJudge(
        RewardConfig.model_validate({"judge": "endpoint", "protocol": protocol}),
        EndpointConfig.model_validate({"servers": [{"url": server.url}], **settings}),
        refusals_path=refusals,
    )


def run_steps(judge, steps, shades, group_size=2):
    """Scores by sample; each step has new captions."""
    scores = {}
    try:
        for step in steps:
            batch = judge.open_batch()
            for i, value in enumerate(shades):
                batch.submit(sample(i, value), [f"A red cup number {step} {j} stands." for j in range(group_size)])
            for i, breakdowns in enumerate(batch.results()):
                scores.setdefault(i, []).extend(breakdowns)
        return scores, judge.take_metrics()
    finally:
        judge.close()
