"""Converts the fields of a request to settings of the decoder. Each field is honoured, or refused by name."""

import json
import logging
from collections.abc import Callable
from secrets import randbits
from typing import Any

from orthrus.config import DecodeConfig, Grammar, SamplingParams
from orthrus.decoding.noise import choice_seed
from orthrus.errors import UserInputError
from orthrus.server.errors import ApiError, bad_request, param_of
from orthrus.server.schemas import (
    ChatRequest,
    CompletionRequest,
    Open,
    Sampling,
    unknown_fields,
)
from orthrus.server.tools import call_grammar, calling

log = logging.getLogger("orthrus.server")
DEFAULT_TEMPERATURE = 1.0
DEFAULT_COMPLETION_TOKENS = 16
"""Both as in OpenAI's interface."""
MOST_NAMED = 200

_Harmless = Callable[[Any], bool]
_UNSET: _Harmless = lambda value: value is None  # noqa: E731
_OFF: _Harmless = lambda value: value is None or value is False  # noqa: E731
REFUSED: dict[str, tuple[_Harmless, str]] = {
    "functions": (_UNSET, "use tools"),
    "function_call": (lambda value: value is None or value == "none", "use tool_choice"),
    "suffix": (lambda value: value in (None, ""), "text cannot be filled in before a suffix"),
    "best_of": (lambda value: value in (None, 1), "use n, and choose yourself"),
    "prompt_logprobs": (_UNSET, "log probs are given for the answer only"),
    "use_beam_search": (_OFF, "texts are sampled, or greedy with temperature 0"),
    "length_penalty": (lambda value: value in (None, 1, 1.0), "it belongs to beam search"),
    "chat_template": (_UNSET, "the model's own template is used"),
    "documents": (_UNSET, "put them into a message"),
    "include_stop_str_in_output": (_OFF, "texts end before a stop string"),
    "skip_special_tokens": (
        lambda value: value in (None, True),
        "special tokens are left out; return_token_ids shows them",
    ),
    "structured_outputs": (_UNSET, "use response_format"),
    "guided_json": (_UNSET, "use response_format"),
    "guided_regex": (_UNSET, "use response_format"),
    "guided_choice": (_UNSET, "use response_format"),
    "guided_grammar": (_UNSET, "use response_format"),
    "grammar": (_UNSET, "use response_format"),
    "logits_processors": (_UNSET, "use logit_bias"),
    "audio": (_UNSET, "texts are all that it writes"),
    "typical_p": (lambda value: value in (None, 1, 1.0), "use top_p or min_p"),
    "mirostat": (lambda value: value in (None, 0), "use top_p or min_p"),
}
"""Fields that would change the answer and are not supported: a test for values without effect, and advice."""

_NAMES = {
    name: name
    for name in (
        *("temperature", "top_k", "top_p", "min_p", "seed", "repetition_penalty", "frequency_penalty"),
        *("presence_penalty", "logit_bias", "min_tokens", "stop_token_ids", "ignore_eos", "priority"),
    )
} | {
    "block_size": "orthrus.block_size",
    "max_new_tokens": "max_tokens",
    "the prompt has token id": "prompt",
    "a token id of logit_bias": "logit_bias",
    "the json_schema grammar": "response_format",
    "the json_object grammar": "response_format",
    "the lark grammar": "tools",
}


class UnknownFields:
    """Warns of every unknown field once, as long as there are few of them."""

    def __init__(self) -> None:
        self._named: set[str] = set()

    def check(self, body: Open) -> None:
        """Raises ApiError for a known field that cannot be honoured."""
        for name, value in (body.model_extra or {}).items():
            is_harmless, reason = REFUSED.get(name, (lambda value: True, ""))
            if not is_harmless(value):
                raise bad_request(
                    f"{name} is not supported: {reason}.", param=name, code="unsupported_parameter"
                )
        for name in sorted(unknown_fields(body) - REFUSED.keys() - self._named):
            if len(self._named) < MOST_NAMED:
                self._named.add(name)
                log.warning("unknown field ignored", extra={"data": {"field": ascii(name)[:80]}})


def check_together(body: ChatRequest | CompletionRequest) -> None:
    """Raises ApiError for fields that exclude or need each other."""
    if body.stream_options is not None and not body.stream:
        raise bad_request("stream_options is only allowed with stream.", param="stream_options")
    if isinstance(body, CompletionRequest):
        if body.echo and body.logprobs is not None:
            raise bad_request("echo has no log probs of the prompt: drop echo or logprobs.", param="echo")
        return
    if body.top_logprobs is not None and not body.logprobs:
        raise bad_request("top_logprobs needs logprobs to be true.", param="top_logprobs")
    if body.max_tokens and body.max_completion_tokens and body.max_tokens != body.max_completion_tokens:
        raise bad_request(
            "max_tokens and max_completion_tokens say the same: give one.", param="max_completion_tokens"
        )
    last_is_answer = body.messages[-1].role == "assistant" and not body.messages[-1].tool_calls
    if body.continue_final_message and body.add_generation_prompt:
        raise bad_request(
            "continue_final_message and add_generation_prompt exclude each other.",
            param="continue_final_message",
        )
    if body.continue_final_message and not last_is_answer:
        raise bad_request(
            "continue_final_message needs a last message of the assistant.", param="continue_final_message"
        )
    if last_is_answer and (body.continue_final_message is False or body.add_generation_prompt):
        name = "add_generation_prompt" if body.add_generation_prompt else "continue_final_message"
        raise bad_request(
            f"{name}: a last message of the assistant is always continued; end with another one.", param=name
        )
    if body.add_generation_prompt is False and not last_is_answer:
        raise bad_request(
            "add_generation_prompt cannot be switched off: an answer always begins with it.",
            param="add_generation_prompt",
        )


def base_seed(body: Sampling) -> int:
    """The requested seed, or a new one that is small enough for the number type of every client."""
    return randbits(53) if body.seed is None else body.seed


def decode_configs(
    body: ChatRequest | CompletionRequest, seed: int, room: int, prompt: int = 0
) -> list[DecodeConfig]:
    """One config per text. room: tokens that fit after the prompt. ApiError names the field that is wrong.

    prompt: the number of the prompt in its request. With a seed of the client, each prompt gets the texts that it
    would get alone. Without one, equal prompts get different samples.
    """
    first = prompt * body.n if body.seed is None else 0
    asked = body.max_tokens
    logprobs = body.logprobs if isinstance(body, CompletionRequest) else None
    if isinstance(body, ChatRequest):
        asked = body.max_completion_tokens or asked
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
    elif asked is None:
        asked = DEFAULT_COMPLETION_TOKENS
    most = room if asked is None else min(asked, room)
    how = body.orthrus
    own = {} if how is None else how.model_dump(exclude={"provenance", "receipt", "compact_json"})
    bias = {int(token_id): value for token_id, value in (body.logit_bias or {}).items()}
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    if asked is not None and body.min_tokens > asked:
        raise bad_request(
            f"min_tokens ({body.min_tokens}) is more than max_tokens ({asked}).", param="min_tokens"
        )
    grammar = _grammar(body)
    try:
        return [
            DecodeConfig(
                max_new_tokens=most,
                stop=stop,
                stop_token_ids=tuple(body.stop_token_ids or ()),
                min_tokens=min(body.min_tokens, most),
                ignore_eos=body.ignore_eos,
                logprobs=logprobs,
                grammar=grammar,
                priority=body.priority,
                sampling=SamplingParams(
                    temperature=DEFAULT_TEMPERATURE if body.temperature is None else body.temperature,
                    top_k=None if body.top_k in (None, -1) else body.top_k,
                    top_p=body.top_p,
                    min_p=body.min_p,
                    seed=choice_seed(seed, first + index),
                    repetition_penalty=_or(body.repetition_penalty, 1.0),
                    frequency_penalty=_or(body.frequency_penalty, 0.0),
                    presence_penalty=_or(body.presence_penalty, 0.0),
                    logit_bias=bias or None,
                ),
                **own,
            )
            for index in range(body.n)
        ]
    except UserInputError as error:
        raise named(error) from error


def named(error: UserInputError) -> ApiError:
    """A 400 that names the field that the sentence begins with."""
    return bad_request(str(error), param=param_of(str(error), _NAMES))


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _grammar(body: Sampling) -> Grammar | None:
    wanted, compact = body.response_format, body.orthrus is not None and body.orthrus.compact_json
    if isinstance(body, ChatRequest) and (allowed := calling(body)) is not None:
        return call_grammar(allowed, wanted, compact=compact)
    if wanted is None or wanted.type == "text":
        if compact:
            raise bad_request(
                "compact_json is for JSON: give a response_format or tools, or leave it out.",
                param="orthrus.compact_json",
            )
        return None
    if wanted.type == "json_object":
        return Grammar("json_object", compact=compact)
    if wanted.json_schema is None or wanted.json_schema.schema_ is None:
        raise bad_request(
            "response_format of type json_schema needs json_schema with a schema.",
            param="response_format.json_schema.schema",
        )
    try:
        return Grammar("json_schema", json.dumps(wanted.json_schema.schema_), compact)
    except (UserInputError, ValueError, RecursionError) as error:
        raise bad_request(f"response_format: {error}", param="response_format") from error
