"""Requests that can never succeed: one picture costs its own scores; where all are refused the run ends, and says why."""

import json
import logging
import math
from collections import Counter

import pytest
from aiohttp import web
from multidict import CIMultiDict
from picky_judge import Picky, completion, error, judge_of, run_steps
from PIL import Image
from scripted_judge import take_apart

from balcaprl.config import EndpointConfig, RewardConfig, TrainConfig
from balcaprl.rewards.endpoint.judge import EndpointJudge
from balcaprl.rewards.endpoint.prepare import prepare_units, recaption
from balcaprl.rewards.endpoint.server.outcomes import BLAME, Blame, error_of_status
from balcaprl.types import JudgeStoppedError

REFUSALS = {
    "openai": (error(400, "Your image may not be allowed", "content_policy_violation"), "content_filter"),
    "azure": (
        error(400, "The response was filtered", "content_filter", innererror={"code": "ResponsibleAIPolicyViolation"}),
        "content_filter",
    ),
    "azure in words": (error(400, "The prompt triggered our content management policy."), "content_filter"),
    "dashscope": (error(400, "Input data may contain inappropriate content.", "data_inspection_failed"), "content_filter"),
    "dashscope flat": ((400, {"code": "DataInspectionFailed", "message": "no"}), "content_filter"),
    "deepseek": (error(400, "Content Exists Risk", "invalid_request_error"), "content_filter"),
    "grok": ((403, {"code": "The caller has no permission", "error": "Content violates usage guidelines."}), "content_filter"),
    "openrouter": (error(403, "Flagged", 403, metadata={"reasons": ["x"], "raw": "failed moderation"}), "content_filter"),
    "legal": ((451, {}), "content_filter"),
    "filter behind a proxy": (error(500, "litellm", "content_policy_violation"), "content_filter"),
    "invalid image": (error(400, "You uploaded an unsupported image.", "invalid_image_format"), "image"),
    "image too large": (error(400, "no", "image_too_large"), "image"),
    "vllm image": (error(400, "cannot identify image file <_io.BytesIO>", 400, type="BadRequestError"), "image"),
    "dashscope size": (error(400, "The image length and width are too small", "InvalidParameter"), "image"),
    "image not found": (error(404, "Failed to load image"), "image"),
    "too long": (error(400, "This model's maximum context length is 4096 tokens", "context_length_exceeded"), "too_long"),
    "vllm too long": (error(400, "'max_tokens' must be at least 1, got -300", param="max_tokens"), "too_long"),
    "payload": ((413, "<html><h1>413 Request Entity Too Large</h1></html>"), "too_long"),
    "unprocessable": ((422, {"detail": [{"loc": ["body", "messages", 1], "msg": "bad", "type": "error"}]}), "bad_request"),
    "silent": ((400, ""), "bad_request"),
    "not json": ((400, "Bad Request"), "bad_request"),
    "finish reason": (completion("", "content_filter"), "content_filter"),
    "half a reply": (completion('{"asser', "content_filter"), "content_filter"),
    "gemini's finish reason": (completion(None, "content_filter: PROHIBITED_CONTENT"), "content_filter"),
    "zhipu's finish reason": (completion(None, "sensitive"), "content_filter"),
    "gemini's feedback": ((200, {"choices": [], "promptFeedback": {"blockReason": "SAFETY"}}), "content_filter"),
    "refusal": (completion(None, refusal="I'm sorry, I can't help with that."), "declined"),
    "refusal part": (completion([{"type": "refusal", "refusal": "I cannot."}]), "declined"),
    "error with status 200": ((200, {"error": {"message": "blocked", "code": "content_filter"}}), "content_filter"),
    "error in the choice": (
        (200, {"choices": [{"error": {"code": 400, "message": "image too large"}, "message": {"content": ""}}]}), "image",
    ),
}  # fmt: skip


class Closed(Picky):
    """Refuses everything of the tasks named."""

    tasks = ("verify",)

    def is_bad(self, asked):
        return asked.task in self.tasks


@pytest.mark.parametrize("name", REFUSALS)
def test_one_picture_that_is_always_refused_costs_its_own_scores_alone(name, tmp_path, caplog):
    """One in eight, all three rewards in one call: the run goes on, and neither it nor a resumed one asks again."""
    refusal, kind = REFUSALS[name]
    shades = [60, *range(100, 240, 20)]
    assert len(shades) == 8
    caplog.set_level(logging.WARNING)
    with Picky() as server:
        server.refusal = refusal
        scores, metrics = run_steps(judge_of(server, refusals=tmp_path / "r.jsonl"), range(3), shades)
        assert server.counts["refused"] == 2, "two captions, then the picture is known"
        assert metrics[f"judge/failed_{kind}"] == 2
        assert metrics["judge/refused"] == 6
        resumed, _ = run_steps(judge_of(server, refusals=tmp_path / "r.jsonl"), range(3, 5), shades)
        assert server.counts["refused"] == 2
    for told in (scores, resumed):
        assert all(math.isnan(reward) for b in told[0] for reward in b.rewards)
        assert all(b.error is not None for b in told[0])
        assert not any(math.isnan(reward) for i in range(1, 8) for b in told[i] for reward in b.rewards)
    assert sum("'s0'" in record.getMessage() for record in caplog.records) == 2, "once in each run"


def test_a_picture_that_is_refused_keeps_the_scores_that_need_no_picture():
    with Picky() as server:
        server.refusal = REFUSALS["azure"][0]
        scores, metrics = run_steps(judge_of(server, calls="separate"), range(2), [60, 100])
    assert all(math.isnan(b.precision) and b.recall >= 0 and b.linguistic >= 0 for b in scores[0])
    assert not any(math.isnan(r) for b in scores[1] for r in b.rewards)
    ends = ("cached", "shared", "valid", "given_up", "cancelled")
    assert metrics["judge/calls"] == sum(metrics[f"judge/{name}"] for name in ends)


def test_a_caption_that_is_refused_costs_no_other_caption_its_scores(tmp_path):
    class Prudish(Picky):
        def is_bad(self, asked):
            return "number 0 1" in asked.data.get("caption", "")

    with Prudish() as server:
        server.refusal = REFUSALS["azure"][0]
        scores, _ = run_steps(judge_of(server, refusals=tmp_path / "r"), range(2), [100, 120], group_size=3)
        run_steps(judge_of(server, refusals=tmp_path / "r"), range(2, 4), [100, 120])
        assert server.counts["refused"] == 2
    missing = [[math.isnan(b.precision) for b in breakdowns] for breakdowns in scores.values()]
    assert missing == [[False, True, False, False, False, False]] * 2


def test_a_reference_that_is_refused_costs_recall_alone():
    class Prudish(Picky):
        def is_bad(self, asked):
            return asked.task == "decompose" and "table 0" in asked.data["reference"]

    with Prudish() as server:
        server.refusal = REFUSALS["dashscope"][0]
        scores, _ = run_steps(judge_of(server, calls="separate"), range(2), [100, 120])
        assert server.counts["refused"] == 1
    assert all(math.isnan(b.recall) and b.precision >= 0 for b in scores[0])
    assert not any(math.isnan(b.recall) for b in scores[1])


@pytest.mark.parametrize("text", ["I'm sorry, but I can't assist with that.", '{"assertions": [{"te', ""])
def test_a_picture_to_which_no_usable_reply_ever_comes_does_not_end_the_run(text, tmp_path):
    """A refusal in plain words, or the same break-off each time: it is left out for a while."""
    with Picky() as server:
        server.refusal = completion(text)
        shades = [60, *range(100, 240, 20)]
        judge = judge_of(server, refusals=tmp_path / "r", max_attempts=2)
        scores, _ = run_steps(judge, range(2), shades)
        assert server.counts["refused"] <= 4 * 2 * 5, (
            "the captions of both steps at most; early rounds have no control yet"
        )
    assert all(math.isnan(b.precision) for b in scores[0])
    assert not any(math.isnan(r) for i in range(1, 8) for b in scores[i] for r in b.rewards)


# ------------------------------------------------------------------------------------------------------ all refused


@pytest.mark.parametrize("name", ["azure", "vllm image", "silent", "finish reason", "refusal", "image not found"])
def test_where_everything_is_refused_the_run_ends_early(name, tmp_path):
    refusal, _ = REFUSALS[name]
    with Closed() as server:
        server.refusal = refusal
        with pytest.raises(JudgeStoppedError, match="refuse every call of the task verify, 8 items in a row") as caught:
            run_steps(judge_of(server, calls="separate", refusals=tmp_path / "r"), range(100), [20, 100, 120])
        assert server.counts["refused"] <= 9 * 2
        assert not (tmp_path / "r").exists(), "what is mended may be asked again"
    payload = refusal[1]
    if isinstance(payload, dict) and "error" in payload:
        assert payload["error"]["message"] in str(caught.value)


def test_a_server_that_begins_to_refuse_everything_ends_the_run_too(tmp_path):
    """After 32 of them, or a few more where several are under way together."""

    class Turning(Picky):
        def is_bad(self, asked):
            return asked.task == "combined" and self.counts["valid"] > 40

    with Turning() as server, pytest.raises(JudgeStoppedError, match=r"3\d items in a row"):
        run_steps(judge_of(server, refusals=tmp_path / "r"), range(100), range(100, 180, 10))


def test_quick_refusals_among_slow_replies_do_not_end_the_run():
    """Half of the pictures are refused at once, and the replies about the others take their time."""
    with Picky(latency_s=0.3) as server:
        server.refusal = REFUSALS["azure"][0]
        scores, _ = run_steps(judge_of(server), range(1), [100, *[60] * 12, 120])
    assert not any(math.isnan(r) for i in (0, 13) for b in scores[i] for r in b.rewards)


@pytest.mark.parametrize(
    "refusal",
    [
        error(
            400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.", "unsupported_parameter"
        ),
        error(400, "Unsupported value: 'temperature' does not support 0.0", "unsupported_value", param="temperature"),
        (422, {"detail": [{"loc": ["body", "chat_template_kwargs"], "msg": "Extra inputs are not permitted"}]}),
        error(400, "This service does not know response_format json_schema"),
        error(401, "Incorrect API key provided: sk-abcdefghijklmnop1234"),
        error(404, "The model `judge` does not exist.", "model_not_found"),
        error(402, "Insufficient credits"),
    ],
)
def test_faults_of_the_requests_form_and_of_access_are_no_matter_of_the_item(refusal, tmp_path):
    with Closed() as server:
        server.tasks = ("combined", "decompose")
        server.refusal = refusal
        with pytest.raises(JudgeStoppedError, match="no judge server is left") as caught:
            run_steps(judge_of(server, refusals=tmp_path / "r"), range(5), [100, 120])
        assert server.counts["refused"] < 20
        assert not (tmp_path / "r").exists()
    assert "sk-abc" not in str(caught.value)
    if "Unsupported" in str(refusal) or "Extra" in str(refusal):
        assert refusal[1].get("error", {}).get("message", "Extra inputs")[:20] in str(caught.value)


@pytest.mark.parametrize("status", [500, 502, 503, 529, 408, 409, 425, 429])
def test_what_may_pass_is_no_refusal(status):
    told = error_of_status(status, CIMultiDict(), b'{"error": {"message": "image overloaded"}}', 60)
    assert told.blame in (Blame.SERVER, Blame.OVERLOAD)


@pytest.mark.parametrize(
    "payload", [b"", b"\xff\xfe", b"[" * 5000, b'{"error": null}', b'{"error": {"code": {"a": [1]}}}', b"[]"]
)
@pytest.mark.parametrize("status", [400, 404, 418, 422, 500, 301])
def test_any_body_of_an_error_is_understood_or_passed_over(status, payload):
    told = error_of_status(status, CIMultiDict(), payload, 60)
    assert told.kind in BLAME
    assert f"HTTP {status}" in str(told)


def test_words_that_are_shown_hold_neither_captions_nor_keys(monkeypatch, tmp_path):
    monkeypatch.setenv("JUDGE_KEY", "secret-key-0123456789abcdef")

    class Echoing(Closed):
        async def _respond(self, request):
            asked = take_apart(json.loads(await request.read()))
            self.counts["refused"] += 1
            text = f"bad \x1b[31m\n{request.headers['Authorization']} {asked.data['caption']} " + "x " * 5000
            return web.json_response({"error": {"message": text}}, status=400)

    with Echoing() as server:
        judge = EndpointJudge(
            RewardConfig.model_validate({"judge": "endpoint", "protocol": {"model": "m"}, "recall_weight": 0}),
            EndpointConfig.model_validate(
                {"servers": [{"url": server.url, "api_key_env": "JUDGE_KEY"}], "cache": None}
            ),
        )
        with pytest.raises(JudgeStoppedError, match="bad") as caught:
            run_steps(judge, range(100), [100, 120])
    assert not any(bad in str(caught.value) for bad in ("0123456789abcdef", "A red cup number", "\x1b", "\n"))
    assert len(str(caught.value)) < 1200


# ------------------------------------------------------------------------------------------------------ prepare, recaption


def data_of(tmp_path, num):
    lines = []
    for i in range(num):
        Image.new("RGB", (32, 32), (60 if i == 2 else 100 + i, 0, 0)).save(tmp_path / f"{i}.png")
        lines.append({"id": f"r{i}", "image": f"{i}.png", "reference": f"A cup of number {i} stands."})
    path = tmp_path / "captions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def config_of(path, server):
    return TrainConfig.model_validate(
        {
            "data": {"kind": "jsonl", "path": str(path)},
            "reward": {"judge": "endpoint", "protocol": {"model": "m", "image_format": "png"}},
            "endpoint": {"servers": [{"url": server.url, "max_concurrency": 2}], "cache": None, "retry_wait_s": 0.01},
        }
    )


@pytest.mark.parametrize("name", ["azure", "silent", "gemini's feedback"])
def test_prepare_and_recaption_remember_what_is_refused(name, tmp_path):
    path = data_of(tmp_path, 6)

    class Prudish(Picky):
        def is_bad(self, asked):
            return "number 2" in asked.data["reference"]

    with Prudish() as server:
        server.refusal = REFUSALS[name][0]
        for command in (prepare_units, lambda config: recaption(config, tmp_path / "out.jsonl")):
            server.counts.clear()
            report = command(config_of(path, server))
            assert (report.num_done, report.num_refused) == (5, 1)
            assert report.errors.total() == 1
            again = command(config_of(path, server))
            assert (again.num_present, again.num_refused, server.counts["refused"]) == (5, 1, 1)
            assert str(again.refusals) in str(again)
            again.refusals.unlink()
            command(config_of(path, server))
            assert server.counts["refused"] == 1 + (command is not prepare_units or 1), (
                "asked again once the record is gone"
            )
    ids = [json.loads(line)["id"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert ids == ["r0", "r1", "r3", "r4", "r5"]


def test_prepare_ends_early_where_everything_is_refused(tmp_path):
    path = data_of(tmp_path, 200)
    with Closed() as server:
        server.tasks = ("decompose",)
        server.refusal = error(400, "nobody home")
        with pytest.raises(JudgeStoppedError, match="nobody home"):
            prepare_units(config_of(path, server))
        assert server.counts["requests"] < 20


@pytest.mark.parametrize("content", [b"", b"notes of mine\n", b'{"format": "balcaprl refusals"}\n', b"\xff\x00" * 50])
def test_a_foreign_file_in_place_of_the_record_is_left_alone(content, tmp_path):
    record = tmp_path / "r"
    record.write_bytes(content)
    with Picky() as server:
        server.refusal = REFUSALS["azure"][0]
        run_steps(judge_of(server, refusals=record), range(2), [60, 100])
    assert record.read_bytes().startswith(content)
    assert (record.read_bytes() == content) == bool(content)


def test_a_damaged_record_loses_its_damaged_lines_alone(tmp_path):
    record = tmp_path / "r"
    with Picky() as server:
        server.refusal = REFUSALS["azure"][0]
        run_steps(judge_of(server, refusals=record), range(2), [60, 100])
        lines = record.read_bytes().splitlines(keepends=True)
        record.write_bytes(lines[0] + b'nonsense\n{"key": 5}\n' + b"".join(lines[1:]) + b'{"key": "ab')
        run_steps(judge_of(server, refusals=record), range(2, 4), [60, 100])
        assert server.counts["refused"] == 2
    assert not Counter(server.problems)
