"""transformers' `generate` arguments in, our token streams inside, padded sequences out."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    MaxTimeCriteria,
    SequenceBiasLogitsProcessor,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.utils.generic import ModelOutput

from orthrus.config import DecodeConfig, SamplingParams
from orthrus.engine.engine import Engine
from orthrus.engine.stream import TokenStream
from orthrus.errors import UserInputError
from orthrus.hf.options import check_types, refuse_unknown, refuse_unsupported
from orthrus.hf.sequences import Stream, run_all, run_in_step
from orthrus.types import DecodeStats

_DEFAULT_NEW_TOKENS = 20
_OURS = ("strategy", "block_size", "node_budget", "block_budget", "floor")


@dataclass
class OrthrusGenerateOutput(ModelOutput):
    """`sequences` (B, T) int64 as stock `generate` pads them; `stats` one DecodeStats per row."""

    sequences: Tensor | None = None
    stats: tuple[DecodeStats, ...] | None = None


def generate(
    engine: Engine,
    inputs: Tensor | None,
    defaults: GenerationConfig,
    generation_config: GenerationConfig | None,
    kwargs: dict[str, Any],
) -> Tensor | OrthrusGenerateOutput:
    """Decode each row of a batch; see `OrthrusForCausalLM.generate`. `defaults` are the model's own settings.

    Raises UserInputError for options that cannot be honoured, and never ignores one in silence.
    """
    kwargs = dict(kwargs)
    input_ids_BT = _take(kwargs, "input_ids", inputs)
    attention_mask_BT = kwargs.pop("attention_mask", None)
    streamer = kwargs.pop("streamer", None)
    if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
        raise UserInputError("streamer must have the methods put and end, as transformers' streamers do.")
    criteria = _criteria(kwargs.pop("stopping_criteria", None))
    tokenizer = kwargs.pop("tokenizer", None)
    ours: dict[str, Any] = {name: kwargs.pop(name) for name in _OURS if name in kwargs}
    if _given(kwargs.pop("logits_processor", None)):
        raise UserInputError("logits_processor is not supported yet; leave it out or use the stock model.")
    if generation_config is not None and not isinstance(generation_config, GenerationConfig):
        raise UserInputError("generation_config must be a GenerationConfig of transformers.")
    settings = copy.deepcopy(generation_config or defaults)
    # As in transformers: what a given config leaves open comes from the model's own.
    settings.update(**defaults.to_dict(), defaults_only=True, allow_custom_entries=True)
    check_types(kwargs)
    try:
        unknown = settings.update(**kwargs)
    except (ValueError, TypeError) as e:
        # transformers checks the values and whether they go together.
        raise UserInputError(
            f"generate cannot work with these options: {' '.join(str(e).split()).rstrip('.')}."
        ) from e
    refuse_unknown(unknown, engine.runner.dual.base)
    refuse_unsupported(settings)
    check_types(vars(settings))
    if settings.max_time is not None:
        criteria.append(MaxTimeCriteria(settings.max_time))
    if settings.stop_strings:
        criteria.append(_stop_strings(settings.stop_strings, tokenizer))

    eos_token_ids = frozenset(_eos_list(settings))
    prompts = _unpadded(input_ids_BT, attention_mask_BT, settings.pad_token_id, eos_token_ids)
    num_copies = settings.num_return_sequences or 1
    if streamer is not None and len(prompts) * num_copies > 1:
        raise UserInputError("a streamer follows one sequence; give a batch of one.")
    streams: list[Stream] = [
        TokenStream(
            engine,
            engine.submit(
                prompt_ids,
                _decode_config(settings, input_ids_BT.shape[1], ours),
                eos_token_ids=eos_token_ids,
            ),
        )
        for prompt_ids in prompts
        for _ in range(num_copies)
    ]
    repeated_BT = input_ids_BT.repeat_interleave(num_copies, 0)
    if criteria:
        outcomes = run_in_step(
            streams,
            repeated_BT,
            criteria,
            pad_token_id=_pad_token_id(settings),
            pads=bool(eos_token_ids),
            streamer=streamer,
        )
    else:
        outcomes = run_all(streams, repeated_BT, streamer)
    sequences_BT = _padded(repeated_BT, [o.token_ids for o in outcomes], _pad_token_id(settings))
    if settings.return_dict_in_generate:
        return OrthrusGenerateOutput(sequences=sequences_BT, stats=tuple(o.stats for o in outcomes))
    return sequences_BT


def _given(value: Any) -> bool:
    return value is not None and value is not False and not (isinstance(value, list | tuple) and not value)


def _criteria(given: Any) -> StoppingCriteriaList:
    criteria = list(given) if isinstance(given, list | tuple) else [given] if callable(given) else None
    if (criteria is None and given is not None) or not all(callable(one) for one in criteria or ()):
        raise UserInputError("stopping_criteria must be a list of callables, as in transformers.")
    return StoppingCriteriaList(criteria or [])


def _stop_strings(stop: Any, tokenizer: Any) -> StopStringCriteria:
    """transformers' own criterion: it matches special tokens too, and ends where the stock model ends."""
    if tokenizer is None:
        raise UserInputError("stop strings need a tokenizer; pass tokenizer=... or drop them.")
    texts = [stop] if isinstance(stop, str) else list(stop)
    if not all(isinstance(text, str) and text for text in texts):
        raise UserInputError(f"stop_strings must be texts that are not empty, not {stop!r}.")
    return StopStringCriteria(tokenizer, texts)


def _take(kwargs: dict[str, Any], name: str, inputs: Tensor | None) -> Tensor:
    given: Tensor | None = kwargs.pop(name, None)
    input_ids_BT = inputs if given is None else given
    if (given is None) == (inputs is None) or not isinstance(input_ids_BT, Tensor):
        raise UserInputError("generate needs input_ids, once: a (batch, length) tensor of token ids.")
    if (
        input_ids_BT.ndim != 2
        or not len(input_ids_BT)
        or input_ids_BT.dtype not in (torch.int64, torch.int32)
    ):
        raise UserInputError(
            f"input_ids must be a (batch, length) tensor of ids, not {tuple(input_ids_BT.shape)}."
        )
    return input_ids_BT


def _eos_list(settings: GenerationConfig) -> list[int]:
    """One id, a list, a tensor or none at all; id 0 is an id like any other."""
    declared = settings.eos_token_id
    if declared is None:
        return []
    ids = declared.tolist() if isinstance(declared, Tensor) else declared
    return [ids] if isinstance(ids, int) else list(ids)


def _unpadded(
    input_ids_BT: Tensor, attention_mask_BT: Tensor | None, pad_token_id: int | None, eos: frozenset[int]
) -> list[list[int]]:
    """Each sequence's real tokens. Without a mask, padding is inferred as the stock `generate` infers it."""
    if attention_mask_BT is None:
        attention_mask_BT = torch.ones_like(input_ids_BT)
        if pad_token_id is not None and pad_token_id not in eos:
            attention_mask_BT = (input_ids_BT != pad_token_id).long()
    if not isinstance(attention_mask_BT, Tensor):
        raise UserInputError("attention_mask must be a (batch, length) tensor of ones and zeros.")
    if attention_mask_BT.shape != input_ids_BT.shape:
        raise UserInputError(
            f"attention_mask has shape {tuple(attention_mask_BT.shape)}, input_ids "
            f"{tuple(input_ids_BT.shape)}; give one mask value per id."
        )
    return [ids[mask.bool()].tolist() for ids, mask in zip(input_ids_BT, attention_mask_BT, strict=True)]


def _decode_config(settings: GenerationConfig, input_length: int, ours: dict[str, Any]) -> DecodeConfig:
    """max_new_tokens wins over max_length, which counts the prompt; neither given means 20 new tokens."""
    max_new_tokens = settings.max_new_tokens
    if max_new_tokens is None and settings.max_length is not None:
        max_new_tokens = settings.max_length - input_length
        if max_new_tokens < 1:
            raise UserInputError(
                f"max_length {settings.max_length} leaves no room behind the input of {input_length} tokens; "
                "raise it or use max_new_tokens."
            )
    rules: dict[str, Any] = {"logit_bias": _logit_bias(settings.sequence_bias)}
    if settings.repetition_penalty is not None:
        rules["repetition_penalty"] = settings.repetition_penalty
    sampling = SamplingParams(**rules)
    if settings.do_sample:
        sampling = SamplingParams(
            temperature=1.0 if settings.temperature is None else settings.temperature,
            top_k=50 if settings.top_k is None else settings.top_k,
            top_p=settings.top_p,
            min_p=settings.min_p,
            # transformers samples from torch's global state, so manual_seed must reach us.
            seed=int(torch.randint(2**62, ())),
            **rules,
        )
    return DecodeConfig(
        max_new_tokens=_DEFAULT_NEW_TOKENS if max_new_tokens is None else max_new_tokens,
        sampling=sampling,
        **ours,
    )


def _logit_bias(sequence_bias: Any) -> dict[int, float] | None:
    """transformers' `sequence_bias`, {(id,): bias} or [[[id], bias]], by token id; sequences of one only."""
    if sequence_bias is None:
        return None
    try:
        # Its own check; what it makes of either form is a dict.
        given = SequenceBiasLogitsProcessor(sequence_bias).sequence_bias
    except (ValueError, TypeError, IndexError) as e:
        raise UserInputError(f"sequence_bias is malformed: {' '.join(str(e).split())}") from e
    if longer := next((ids for ids in given if len(ids) > 1), None):
        raise UserInputError(
            f"sequence_bias of {longer} is not supported by Orthrus yet: give sequences of one token only."
        )
    return {int(token_id): bias for (token_id,), bias in given.items()}


def _pad_token_id(settings: GenerationConfig) -> int:
    """pad_token_id or, as stock `generate` does, the first of the end-of-sequence ids."""
    pad = settings.pad_token_id
    return next(iter(_eos_list(settings)), 0) if pad is None else int(pad)


def _padded(input_ids_BT: Tensor, new_token_ids: list[list[int]], pad_token_id: int) -> Tensor:
    """Inputs and new tokens (B, T), as long as the longest."""
    longest = max(len(token_ids) for token_ids in new_token_ids)
    new_BT = input_ids_BT.new_full((len(new_token_ids), longest), pad_token_id)
    for i, token_ids in enumerate(new_token_ids):
        new_BT[i, : len(token_ids)] = input_ids_BT.new_tensor(token_ids)
    return torch.cat([input_ids_BT, new_BT], dim=1)
