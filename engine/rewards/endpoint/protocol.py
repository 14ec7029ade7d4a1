"""What a judge model is asked and what it may answer: prompts, data, requests, and the schemas of replies.

A *task* is one kind of call. Its prompt is a versioned file in ``prompts/``, and its data are written as ``encoding``
describes. Its reply is one JSON object of the task's reply class. The server constrains the reply by the JSON schema of
that class, and ``reply_checks`` validates the reply whatever the server did.

============  =====  ==========================================================================================
task          image  reply
============  =====  ==========================================================================================
``verify``    yes    the caption's assertions, each with its verdicts, quotation and reason: precision
``match``     no     for each reference unit whether the caption covers it: recall
``style``     no     clarity, fluency, coherence from 1 to 5: linguistic
``combined``  yes    all of these in one call
``decompose`` no     the units of a reference caption; once per image
``recaption`` yes    a better reference caption
``questions`` no     answers to multiple-choice questions from the caption only (CapRL)
``rubric``    yes    which criteria of a rubric the caption satisfies (RubiCap)
============  =====  ==========================================================================================
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from balcaprl.config import ProtocolConfig, RequestOptions, ServerConfig
from balcaprl.rewards.endpoint.encoding import EncodedImage, encode_data
from balcaprl.rewards.unicode_text import count_letters

PROMPTS = Path(__file__).parent / "prompts"
FORMAT_VERSION = 1
"""Version of the messages around the prompts; part of every cache key."""


class Reply(BaseModel):
    """Base of all replies: allows no unknown keys, no type conversions, no infinities and no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


Text = str
Score = float


class JudgedAssertion(Reply):
    """One atomic assertion of a caption, judged."""

    text: Text = Field(min_length=1, max_length=4000)
    quote: Text = Field(max_length=4000)
    reason: Text = Field(max_length=4000)
    verified: bool
    pointable: bool


class VerifyReply(Reply):
    """Reply of ``verify``."""

    assertions: list[JudgedAssertion] = Field(max_length=512)


class MatchReply(Reply):
    """Reply of ``match``."""

    units: dict[str, bool]
    """Unit's number from 1 -> whether the caption covers the unit."""


class StyleReply(Reply):
    """Reply of ``style``."""

    clarity: Score = Field(ge=1, le=5)
    fluency: Score = Field(ge=1, le=5)
    coherence: Score = Field(ge=1, le=5)


class CombinedReply(StyleReply, MatchReply, VerifyReply):
    """Reply of ``combined``; pydantic takes the fields of the last base first, so that the grades come last."""


class DecomposeReply(Reply):
    """Reply of ``decompose``."""

    units: list[Text] = Field(min_length=1, max_length=512)


class RecaptionReply(Reply):
    """Reply of ``recaption``."""

    caption: Text = Field(min_length=1, max_length=20_000)


class QuestionsReply(Reply):
    """Reply of ``questions``."""

    answers: dict[str, Text]
    """Question's number from 1 -> the chosen letter, or ``none``."""


class RubricReply(Reply):
    """Reply of ``rubric``."""

    criteria: dict[str, bool]
    """Criterion's number from 1 -> whether the caption satisfies the criterion."""


@dataclass(frozen=True)
class Task:
    """One kind of call."""

    name: str
    version: str
    reply: type[Reply]
    needs_image: bool

    @cached_property
    def prompt(self) -> str:
        """The instruction text, read from its file."""
        return (PROMPTS / f"{self.name}.{self.version}.txt").read_text(encoding="utf-8").strip()

    @cached_property
    def identity(self) -> str:
        """Name, version, prompt hash and format version, so that no reply to an earlier text of the prompt is used."""
        digest = hashlib.sha256(self.prompt.encode()).hexdigest()[:16]
        return f"{self.name}.{self.version}.{digest}.{FORMAT_VERSION}"


NUMBERED = {"units": "units", "answers": "questions", "criteria": "criteria"}
"""Key of the verdicts in a reply -> key, in the call's data, of the things that the verdicts are about."""
NO_ANSWER = "none"

TASKS = {
    task.name: task
    for task in (
        Task("verify", "v1", VerifyReply, needs_image=True),
        Task("match", "v1", MatchReply, needs_image=False),
        Task("style", "v1", StyleReply, needs_image=False),
        Task("combined", "v1", CombinedReply, needs_image=True),
        Task("decompose", "v1", DecomposeReply, needs_image=False),
        Task("recaption", "v1", RecaptionReply, needs_image=True),
        Task("questions", "v1", QuestionsReply, needs_image=False),
        Task("rubric", "v1", RubricReply, needs_image=True),
    )
}


@dataclass(frozen=True)
class Call:
    """One request to a judge model, before any server is chosen."""

    task: Task
    data: dict[str, Any]
    """What the model is shown: strings, whole numbers, mappings of these; things judged one by one are ``numbered``."""
    image: EncodedImage | None = None

    def __post_init__(self) -> None:
        if self.task.needs_image != (self.image is not None):
            raise ValueError(
                f"image: the task {self.task.name} {'needs one' if self.task.needs_image else 'takes none'}"
            )


def numbered(items: Sequence[Any]) -> dict[str, Any]:
    """Number things that are judged one by one: keys are "1", "2" and so on, and replies use the same keys."""
    return {str(number): item for number, item in enumerate(items, 1)}


def messages(call: Call) -> list[dict[str, Any]]:
    """The messages of a call: prompt, image, data, so that the calls of a task about one image share a prefix."""
    content: list[dict[str, Any]] = []
    if call.image is not None:
        content.append({"type": "image_url", "image_url": {"url": call.image.url}})
    content.append({"type": "text", "text": encode_data(call.data)})
    return [{"role": "system", "content": call.task.prompt}, {"role": "user", "content": content}]


def request_form(server: ServerConfig, model: str) -> str:
    """The model's name at a server and the server's request options; servers that agree in both get the same bodies."""
    options = server.request.model_dump_json(exclude_defaults=True)
    return (server.model or model) + (f" {options}" if options != "{}" else "")


def request_headers(server: ServerConfig) -> dict[str, str]:
    """The headers of all requests to a server, with its key.

    Raises:
        ValueError: the environment holds no usable key for the server.
    """
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if server.api_key_env:
        key = os.environ.get(server.api_key_env, "").strip()
        if not key:
            raise ValueError(
                f"endpoint.servers: the environment variable {server.api_key_env} holds no key for {server.url}"
            )
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise ValueError(f"endpoint.servers: {server.api_key_env} holds no key, but spaces or control characters")
        headers["Authorization"] = f"Bearer {key}"
    return headers


def request_body(
    call: Call, config: ProtocolConfig, model: str, options: RequestOptions | None = None
) -> dict[str, Any]:
    """The body of a chat completion request, in the form that a server takes."""
    options = options or RequestOptions()
    body: dict[str, Any] = {
        "model": model,
        "messages": messages(call),
        "temperature": config.temperature,
        options.token_limit: config.max_reply_tokens,
        "response_format": {"type": "json_object"},
    }
    if not options.temperature:
        del body["temperature"]
    if config.response_format == "json_schema":
        plain = reply_schema(call, config)
        schema = {
            "name": call.task.name,
            "strict": True,
            "schema": plain if options.schema_bounds else _without_bounds(plain),
        }
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    if config.disable_thinking:
        body["chat_template_kwargs"] = {"enable_thinking": False}
    return {**body, **options.extra_body}


def cache_key(
    call: Call, config: ProtocolConfig, model: str | None = None, options: RequestOptions | None = None
) -> bytes:
    """SHA-256 of all that a reply depends on: the request as a server gets it, prompt and schema included.

    Args:
        call: the call; its image is replaced by the image's digest.
        config: the protocol settings.
        model: the server's name for the model; default: ``config.model``.
        options: the form in which the server takes requests.
    """
    image = None if call.image is None else replace(call.image, url=f"sha256:{call.image.digest}")
    body = request_body(replace(call, image=image), config, config.model if model is None else model, options)
    parts = [call.task.identity, body, reply_schema(call, config)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).digest()


def subject_key(call: Call, config: ProtocolConfig, model: str) -> bytes | None:
    """SHA-256 of a call without its caption: the same for all calls of a task about one picture or reference.

    It is None if the call has only a caption.
    """
    rest = {name: value for name, value in call.data.items() if name != "caption"}
    if not rest and call.image is None:
        return None
    parts = [call.task.identity, config.model_dump(mode="json"), model, rest, call.image.digest if call.image else None]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).digest()


# ------------------------------------------------------------------------------------------------------ schemas


def reply_schema(call: Call, config: ProtocolConfig) -> dict[str, Any]:
    """The JSON schema that constrains the reply on the server: without ``$ref``, and bounded so that a reply ends."""
    schema = json.loads(_plain_schema(call.task.name, config.max_items, config.max_text_chars, config.integer_scores))
    for key, data_key in NUMBERED.items():
        if key in schema["properties"] and isinstance(call.data.get(data_key), dict):
            schema["properties"][key] = _numbered_schema(key, call.data[data_key])
    if "assertions" in schema["properties"]:
        schema["properties"]["assertions"]["maxItems"] = min(config.max_items, most_assertions(call.data["caption"]))
    return schema


def _without_bounds(node: Any, key: str = "") -> Any:
    """Remove a schema's bounds, for services that take a subset of JSON Schema; replies are validated in any case."""
    if isinstance(node, list):
        return [_without_bounds(item) for item in node]
    if not isinstance(node, dict):
        return node
    bounds = () if key == "properties" else ("minLength", "maxLength", "minItems", "maxItems", "minimum", "maximum")
    return {name: _without_bounds(item, name) for name, item in node.items() if name not in bounds}


def most_assertions(caption: str) -> int:
    """Upper bound of the assertions in a caption.

    It is 1, plus 1 for every two letters or digits. In scripts without spaces, where one letter can be a word, each one
    adds 1.
    """
    spaced, unspaced = count_letters(caption)
    return 1 + spaced // 2 + unspaced


def _numbered_schema(key: str, asked: dict[str, Any]) -> dict[str, Any]:
    """The schema of an object with one verdict on each thing that was asked about, by its number."""
    properties: dict[str, Any] = {number: {"type": "boolean"} for number in asked}
    if key == "answers":
        properties = {n: {"type": "string", "enum": [*q["options"], NO_ANSWER]} for n, q in asked.items()}
    return {"type": "object", "properties": properties, "required": list(asked), "additionalProperties": False}


@lru_cache(maxsize=64)
def _plain_schema(name: str, max_items: int, max_chars: int, integer_scores: bool) -> str:
    schema = TASKS[name].reply.model_json_schema()
    definitions = schema.pop("$defs", {})

    def resolve(node: Any, key: str = "") -> Any:
        if isinstance(node, list):
            return [resolve(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return resolve(definitions[node["$ref"].rpartition("/")[2]])
        node = {k: resolve(v, k) for k, v in node.items() if k == "properties" or k not in ("title", "description")}
        if key == "properties":
            return node
        if node.get("type") == "array":
            node["maxItems"] = min(max_items, node.get("maxItems", max_items))
        elif node.get("type") == "string" and key != "caption":
            node["maxLength"] = min(max_chars, node.get("maxLength", max_chars))
        elif node.get("type") == "number" and integer_scores:
            return {"type": "integer", "enum": [1, 2, 3, 4, 5]}
        return node

    return json.dumps(resolve(schema))
