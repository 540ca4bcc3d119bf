"""Receipts: records of an answer, with which anybody who has the model can decode it again and check it.

A receipt is JSON. It holds the model and its fingerprint, and the versions that ran it. For each text it holds the
prompt's token ids, the settings that decide the text, the seed that was used, and the token ids of the answer.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from orthrus.api import Orthrus
from orthrus.audit.plain import Answered, PlainReplay
from orthrus.base.provenance import installed_version
from orthrus.config import DRAFTING, DecodeConfig, Grammar, SamplingParams
from orthrus.errors import UserInputError

KIND, FORMAT = "orthrus-receipt", 1
_PACKAGES = ("orthrus-lm", "torch", "transformers")
_GRAMMARS = "llguidance"
_DECIDING = ("max_new_tokens", "min_tokens", "stop", "stop_token_ids", "ignore_eos")
"""Together with grammar and sampling, the settings that decide the text."""
_ABOUT = ("name", "base_fingerprint", "dtype", "device", "runner")


@dataclass(frozen=True, slots=True)
class Receipt:
    """A receipt that has been read. model, versions: as in the file."""

    model: dict[str, Any]
    versions: dict[str, str]
    texts: tuple[Answered, ...]


@dataclass(frozen=True, slots=True)
class Checked:
    """The result for one text.

    position: index of the first token that differs from plain decoding, None if all are equal. plain_token, our_token:
    the tokens there, None where that text has ended. text: what plain decoding writes.
    """

    num_tokens: int
    text: str
    position: int | None = None
    plain_token: int | None = None
    our_token: int | None = None
    verdict: str = "identical"
    reason: str = ""


def model_part(orthrus: Orthrus) -> dict[str, Any]:
    """A receipt's entry on the model. `load`: the name that loads it elsewhere, None for a local path."""
    about, base = orthrus.describe(), orthrus.base
    return {
        "name": base.name,
        "load": base.reference if base.source.kind in ("default", "hub") else None,
        "revision": base.source.revision,
        "base_fingerprint": about["base_fingerprint"],
        "quantised": base.quantised,
        "dtype": about["dtype"],
        "device": about["device"],
        "runner": about["runner"],
        "view": about["view"],
    }


def make_receipt(model: dict[str, Any], texts: Sequence[Answered]) -> dict[str, Any]:
    """The receipt of the answers to one request, JSON-ready. model: see `model_part`."""
    packages = [*_PACKAGES, *([_GRAMMARS] if any(t.config.grammar is not None for t in texts) else [])]
    return {
        "kind": KIND,
        "format_version": FORMAT,
        "versions": {package: installed_version(package) for package in packages},
        "model": model,
        "texts": [_text_part(text) for text in texts],
    }


def _text_part(text: Answered) -> dict[str, Any]:
    config = text.config
    settings = {name: getattr(config, name) for name in _DECIDING}
    settings["grammar"] = None if config.grammar is None else asdict(config.grammar)
    settings |= asdict(config.sampling)
    return {
        "settings": settings,
        "drafting": {name: getattr(config, name) for name in DRAFTING},
        "prompt_ids": text.prompt_ids,
        "prompt_digest": digest(text.prompt_ids),
        "token_ids": list(text.token_ids),
        "digest": digest(text.token_ids),
        "num_tokens": len(text.token_ids),
        "finish_reason": text.finish,
    }


def digest(token_ids: Sequence[int]) -> str:
    """A short name for token ids: BLAKE2b over them in decimal, separated by spaces."""
    return f"blake2b:{hashlib.blake2b(' '.join(map(str, token_ids)).encode(), digest_size=16).hexdigest()}"


def find_receipt(content: Any) -> Any:
    """The receipt itself, or the one that an answer holds. Raises UserInputError if there is none."""
    if isinstance(content, dict) and content.get("kind") == KIND:
        return content
    found = content
    if isinstance(content, dict) and "metrics" not in content:
        # The last event of /v1/responses holds the answer.
        found = content.get("response", content)
    for name in ("metrics", "orthrus", "receipt"):
        found = found.get(name) if isinstance(found, dict) else None
    if found is None:
        raise UserInputError(
            'there is no receipt in it; ask the server for one with "orthrus": {"receipt": true}.'
        )
    return found


def shown_texts(content: Any) -> list[str | None]:
    """The texts of an answer that holds a receipt, in the order of its texts. [] for a receipt alone.

    None stands for an answer with calls of tools, which are parts of the text. Reads the answers of chats, completions,
    messages and responses.
    """
    if not isinstance(content, dict):
        return []
    if isinstance(response := content.get("response"), dict):
        return shown_texts(response)
    if isinstance(choices := content.get("choices"), list):
        return [_shown(choice) if isinstance(choice, dict) else None for choice in choices]
    for name, kind in (("content", "text"), ("output", "message")):
        if isinstance(parts := content.get(name), list):
            whole = all(isinstance(part, dict) and part.get("type") == kind for part in parts)
            return [_joined(parts) if whole else None]
    return []


def _shown(choice: dict[str, Any]) -> str | None:
    message = choice.get("message")
    if not isinstance(message, dict):
        text = choice.get("text")
        return text if isinstance(text, str) else None
    text = message.get("content")
    return text if isinstance(text, str) and not message.get("tool_calls") else None


def _joined(parts: Sequence[dict[str, Any]]) -> str:
    texts = []
    for part in parts:
        inner = part.get("content")
        texts.append(_joined(inner) if isinstance(inner, list) else str(part.get("text", "")))
    return "".join(texts)


def read_receipt(content: Any) -> Receipt:
    """A receipt from its JSON. Raises UserInputError if it is no receipt, has another format, or was changed."""
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise UserInputError(f'it is no receipt; one has "kind": "{KIND}".')
    if content.get("format_version") != FORMAT:
        raise UserInputError(
            f"the receipt has format {content.get('format_version')!r}, but this version reads {FORMAT}; "
            "use the version of Orthrus that made it."
        )
    try:
        model, versions = dict(content["model"]), dict(content["versions"])
        if not all(isinstance(model[name], str) for name in _ABOUT):
            raise TypeError("the model")
        texts = tuple(_read_text(part) for part in content["texts"])
    except (KeyError, TypeError, ValueError, AttributeError, UserInputError) as error:
        reason = str(error) or type(error).__name__
        raise UserInputError(f"the receipt is damaged ({reason.rstrip('.')}); get it again.") from error
    if not texts:
        raise UserInputError("the receipt has no text; get it again.")
    return Receipt(model, {str(name): str(value) for name, value in versions.items()}, texts)


def _read_text(part: Any) -> Answered:
    settings, drafting = dict(part["settings"]), dict(part["drafting"])
    sampling = {field.name: settings.pop(field.name) for field in fields(SamplingParams)}
    if sampling["logit_bias"] is not None:
        sampling["logit_bias"] = {int(token_id): bias for token_id, bias in sampling["logit_bias"].items()}
    if sampling["seed"] is None:
        raise ValueError("a text has no seed")
    grammar = settings.pop("grammar")
    config = DecodeConfig(
        **{name: settings[name] for name in _DECIDING} | {"stop": tuple(settings["stop"])},
        **{name: drafting[name] for name in DRAFTING},
        grammar=None if grammar is None else Grammar(**grammar),
        sampling=SamplingParams(**sampling),
    )
    for name, digest_name in (("prompt_ids", "prompt_digest"), ("token_ids", "digest")):
        ids = part[name]
        if not ids or not all(type(token_id) is int for token_id in ids):
            raise ValueError(f"{name} are no token ids")
        if digest(ids) != part[digest_name]:
            raise ValueError(f"{name} have another {digest_name}")
    return Answered(list(part["prompt_ids"]), config, tuple(part["token_ids"]), str(part["finish_reason"]))


def check_versions(receipt: Receipt) -> None:
    """Raises UserInputError for the first package that is here in another version, or not at all."""
    for package, version in receipt.versions.items():
        found = installed_version(package)
        if found != version:
            raise UserInputError(
                f"the answer was made with {package} {version}, here is {found or 'none'}, which may round "
                "otherwise; install that one, or try with --any-version."
            )


def check_model(orthrus: Orthrus, receipt: Receipt) -> None:
    """Raises UserInputError where the loaded model is another one than the receipt's, or lacks its tokens."""
    here, there = model_part(orthrus), receipt.model
    for name, words in (("base_fingerprint", "weights"), ("dtype", "dtype"), ("quantised", "quantisation")):
        if here[name] != there.get(name):
            raise UserInputError(
                f"the answer was made by {there['name']} with the {words} {there.get(name)}, but {here['name']} "
                f"has {here[name]}; name the model that answered."
            )
    for token_id in (token_id for text in receipt.texts for token_id in text.token_ids):
        if not 0 <= token_id < orthrus.dual.vocab_size:
            raise UserInputError(
                f"the model has no token {token_id}, so the receipt is damaged; get it again."
            )


def verify(
    orthrus: Orthrus, receipt: Receipt, on_progress: Callable[[int, int], None] = lambda *_: None
) -> list[Checked]:
    """Make each text of a receipt again by plain decoding, and compare; a difference is explained.

    on_progress: called with (texts done, of how many). No other thread may decode meanwhile. Raises
    UserInputError for a prompt that the model cannot take.
    """
    found = []
    for done, answered in enumerate(receipt.texts):
        on_progress(done, len(receipt.texts))
        replay = PlainReplay(orthrus, answered)
        while not replay.done:
            replay.step()
        found.append(_checked(orthrus, answered, replay))
    on_progress(len(receipt.texts), len(receipt.texts))
    return found


def _checked(orthrus: Orthrus, answered: Answered, replay: PlainReplay) -> Checked:
    num_tokens, position = len(answered.token_ids), replay.difference
    if position is None:
        return Checked(num_tokens, replay.text)
    plain, ours = (ids[position : position + 1] for ids in (replay.token_ids, answered.token_ids))
    judged = replay.explain(orthrus)
    return Checked(
        num_tokens,
        replay.text,
        position,
        plain[0] if plain else None,
        ours[0] if ours else None,
        judged.verdict,
        judged.reason,
    )
