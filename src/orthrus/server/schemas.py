"""The schemas of requests: every field has a type and a range. Unknown fields are accepted and named in the log.

Validation of a list stops at its first wrong element, because a body of one megabyte can hold half a million of them.
"""

import json
from functools import partial
from math import isfinite
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    model_validator,
)

from orthrus.config import (
    LARGEST_COUNT_PENALTY,
    LARGEST_PENALTY,
    MOST_BLOCKS,
    MOST_LOGPROBS,
    MOST_NODES,
    Strategy,
)

MOST_ANSWERS = 128
MOST_STOPS = 16
LONGEST_STOP = 1024
MOST_MESSAGES = 10_000
MOST_TOOLS = 128
LARGEST_INT = 2**31 - 1
_LARGEST_BIAS = 100


class Open(BaseModel):
    """Unknown fields are kept, so that they can be named."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class Closed(BaseModel):
    """Our own objects: an unknown field is a mistake."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def _not_blank(value: str) -> str:
    if not value:
        raise ValueError("must not be empty")
    return value


def _are_biases(given: dict[str, Any]) -> dict[str, Any]:
    """Checks all entries at once, because pydantic would report each wrong one."""
    for key, value in given.items():
        is_id = key.isascii() and key.isdigit() and len(key) <= 10
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_id or not is_number or not -_LARGEST_BIAS <= value <= _LARGEST_BIAS:
            raise ValueError(
                f"must have token ids in digits as keys, and numbers from -{_LARGEST_BIAS} to {_LARGEST_BIAS} as values"
            )
    return given


def _otherwise(default: Any, value: Any) -> Any:
    return default if value is None else value


def null_is(default: Any) -> BeforeValidator:
    """Makes null mean the default."""
    return BeforeValidator(partial(_otherwise, default))


class PlacedError(ValueError):
    """A value that no request may hold. place: its path."""

    def __init__(self, message: str, place: list[str]) -> None:
        super().__init__(message)
        self.place = place


def _refused_value(value: Any) -> PlacedError | None:
    """The error for a value that JSON can spell and an answer cannot repeat, somewhere in a body; None without one.

    These are half a character (a lone surrogate), which no tokenizer reads either, and a number that is not finite.
    """
    left: list[tuple[list[str], Any]] = [([], value)]
    while left:
        place, value = left.pop()
        if isinstance(value, str):
            try:
                value.encode("utf-8")
            except UnicodeEncodeError:
                # A name may hold half a character too, so it is replaced in the message.
                names = [part.encode("utf-8", "replace").decode() for part in place]
                return PlacedError(
                    "must not have half of a character (U+D800 to U+DFFF): send whole characters", names
                )
        elif isinstance(value, float) and not isfinite(value):
            return PlacedError("must be a finite number", place)
        elif isinstance(value, dict):
            left += [(place, key) for key in value] + [([*place, str(k)], v) for k, v in value.items()]
        elif isinstance(value, list):
            left += [([*place, str(i)], v) for i, v in enumerate(value)]
    return None


class RequestBody(Open):
    """A whole request."""

    @model_validator(mode="before")
    @classmethod
    def _can_be_repeated(cls, data: Any) -> Any:
        """Raises PlacedError for a value that an answer cannot repeat, also in fields that are not looked at."""
        try:
            json.dumps(data, ensure_ascii=False, allow_nan=False).encode("utf-8")
        except ValueError:
            if (refused := _refused_value(data)) is not None:
                raise refused from None
        except (TypeError, RecursionError):
            # The data is not from JSON, or nested too deeply. The checks of the fields report that.
            pass
        return data


Name = Annotated[str, Field(max_length=256)]
TokenId = Annotated[int, Field(ge=0, le=LARGEST_INT)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
StopText = Annotated[str, Field(max_length=LONGEST_STOP), AfterValidator(_not_blank)]
NumTokens = Annotated[int, Field(ge=1, le=LARGEST_INT)]
Objects = Annotated[list[dict[str, JsonValue]], Field(fail_fast=True)]


class ContentPart(Open):
    """A part of a message. Only text is supported. Other types are refused with an error that names them."""

    type: str = "text"
    text: str | None = None


class Message(Open):
    """A turn of a chat. `content` may be null if an assistant message has tool calls."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[ContentPart | str], Field(fail_fast=True)] | None = None
    tool_calls: Objects | None = None
    tool_call_id: str | None = None
    name: str | None = None


class StreamOptions(Open):
    include_usage: bool = False


class JsonSchema(Open):
    """`schema` is a JSON Schema. `strict` has no effect: the schema is always enforced."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, JsonValue] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Open):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Function(Open):
    """A function that the model may call. `strict` has no effect: the schema is always enforced."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, JsonValue] | None = None
    strict: bool | None = None


class Tool(Open):
    type: Literal["function"]
    function: Function


class FunctionName(Open):
    name: str = Field(min_length=1, max_length=64)


class NamedTool(Open):
    type: Literal["function"]
    function: FunctionName


class OrthrusOptions(Closed):
    """How the answer is decoded. Only `compact_json` changes the text. See docs/strategies.md.

    copies: `auto` may draft copies of what followed an earlier occurrence of the last tokens. compact_json: JSON has
    no whitespace between its parts, in a response format and in arguments of calls. provenance: chunks of a stream
    say for each token whether it was drafted. receipt: the answer's metrics hold a receipt for `orthrus verify`, which
    includes the prompt's token ids.
    """

    strategy: Strategy = "auto"
    block_size: int | None = Field(default=None, ge=2, le=4096)
    node_budget: int = Field(default=24, ge=1, le=MOST_NODES)
    block_budget: int = Field(default=3, ge=1, le=MOST_BLOCKS)
    copies: bool = True
    compact_json: bool = False
    provenance: bool = False
    receipt: bool = False


class Sampling(RequestBody):
    """The common fields of chats and completions. logit_bias: numbers by token id in digits."""

    model: Name | None = None
    max_tokens: NumTokens | None = None
    min_tokens: Annotated[int, Field(ge=0, le=LARGEST_INT), null_is(0)] = 0
    n: Annotated[int, Field(ge=1, le=MOST_ANSWERS), null_is(1)] = 1
    temperature: float | None = Field(default=None, ge=0.0, le=100.0)
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    top_k: int | None = Field(default=None, ge=-1, le=LARGEST_INT)
    min_p: float | None = Field(default=None, ge=0.0, le=1.0)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    frequency_penalty: float | None = Field(default=None, ge=-LARGEST_COUNT_PENALTY, le=LARGEST_COUNT_PENALTY)
    presence_penalty: float | None = Field(default=None, ge=-LARGEST_COUNT_PENALTY, le=LARGEST_COUNT_PENALTY)
    repetition_penalty: float | None = Field(default=None, ge=1.0 / LARGEST_PENALTY, le=LARGEST_PENALTY)
    logit_bias: Annotated[dict[str, Any], AfterValidator(_are_biases)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=MOST_STOPS, fail_fast=True)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=1024, fail_fast=True)] | None = None
    ignore_eos: Annotated[bool, null_is(False)] = False
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    priority: Annotated[int, Field(ge=-LARGEST_INT, le=LARGEST_INT), null_is(0)] = 0
    return_token_ids: bool | None = None
    user: str | None = None
    orthrus: OrthrusOptions | None = None


Tools = Annotated[list[Tool], Field(min_length=1, max_length=MOST_TOOLS, fail_fast=True)]
Messages = Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)]


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: NumTokens | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MOST_LOGPROBS)
    tools: Tools | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, JsonValue] | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None


class CompletionRequest(Sampling):
    """POST /v1/completions. prompt: one text or several, as text or as token ids."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MOST_ANSWERS, fail_fast=True)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MOST_ANSWERS, fail_fast=True)]
    )
    logprobs: int | None = Field(default=None, ge=0, le=MOST_LOGPROBS)
    echo: bool | None = None


class TokenizeRequest(RequestBody):
    """POST /tokenize. prompt (as vLLM has it), content (as llama.cpp has it), or messages."""

    model: Name | None = None
    prompt: str | None = None
    content: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    add_special: bool | None = None
    tools: Tools | None = None
    chat_template_kwargs: dict[str, JsonValue] | None = None


class DetokenizeRequest(RequestBody):
    """POST /detokenize."""

    model: Name | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]


def unknown_fields(body: BaseModel) -> set[str]:
    """Names of unknown fields. Those of nested objects are written with a dot."""
    names = set(body.model_extra or {})
    for name in type(body).model_fields:
        value: Any = getattr(body, name)
        if isinstance(value, Open) and not isinstance(value, JsonSchema):
            names |= {f"{name}.{inner}" for inner in value.model_extra or {}}
    return names
