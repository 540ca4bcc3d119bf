"""transformers' `generate` arguments in, our token streams inside, padded sequences out."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    MaxTimeCriteria,
    SequenceBiasLogitsProcessor,
    StoppingCriteriaList,
)
from transformers.utils.generic import ModelOutput

from orthrus.base.families import context_length
from orthrus.config import DecodeConfig, SamplingParams
from orthrus.engine.stream import TokenStream
from orthrus.errors import UserInputError
from orthrus.model.dual_view import DualView
from orthrus.types import DecodeStats

_DEFAULT_NEW_TOKENS = 20
_OURS = ("strategy", "block_size", "node_budget", "block_budget", "floor")
# Options that would change the law of the tokens or what is returned, with the values that leave them off.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "encoder_repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "token_healing": (None, False),
    "use_mtp": (None, False),
    "bad_words_ids": (None,),
    "suppress_tokens": (None,),
    "begin_suppress_tokens": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "exponential_decay_length_penalty": (None,),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "typical_p": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "top_h": (None,),
    "guidance_scale": (None, 1.0),
    "watermarking_config": (None,),
    "penalty_alpha": (None, 0.0),
    "dola_layers": (None,),
    "constraints": (None,),
    "force_words_ids": (None,),
    "prompt_lookup_num_tokens": (None,),
    "output_scores": (None, False),
    "output_logits": (None, False),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
}


@dataclass
class OrthrusGenerateOutput(ModelOutput):
    """`sequences` (B, T) int64 as stock `generate` pads them; `stats` one DecodeStats per row."""

    sequences: Tensor | None = None
    stats: tuple[DecodeStats, ...] | None = None


def generate(
    dual: DualView,
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
    criteria = StoppingCriteriaList(kwargs.pop("stopping_criteria", None) or [])
    tokenizer = kwargs.pop("tokenizer", None)
    ours: dict[str, Any] = {name: kwargs.pop(name) for name in _OURS if name in kwargs}
    if kwargs.pop("logits_processor", None):
        raise UserInputError("logits_processor is not supported yet; leave it out or use the stock model.")
    for harmless in ("use_cache", "synced_gpus", "cache_implementation"):
        kwargs.pop(harmless, None)
    settings = copy.deepcopy(generation_config or defaults)
    # As in transformers: what a given config leaves open comes from the model's own.
    settings.update(**defaults.to_dict(), defaults_only=True, allow_custom_entries=True)
    try:
        unknown = settings.update(**kwargs)
    except ValueError as e:
        # transformers checks the values and whether they go together.
        raise UserInputError(f"generate cannot work with these options: {' '.join(str(e).split())}") from e
    if unknown:
        raise UserInputError(f"generate does not take {', '.join(sorted(unknown))}; check the spelling.")
    _refuse_unsupported(settings)
    if settings.max_time is not None:
        criteria.append(MaxTimeCriteria(settings.max_time))

    eos_token_ids = frozenset(_eos_list(settings))
    rows = _unpadded_rows(input_ids_BT, attention_mask_BT, settings.pad_token_id, eos_token_ids)
    num_copies = settings.num_return_sequences or 1
    if streamer is not None and len(rows) * num_copies > 1:
        raise UserInputError("a streamer follows one sequence; give a batch of one.")
    outputs: list[tuple[list[int], DecodeStats]] = []
    for row_1T, prompt_ids in zip(input_ids_BT.split(1), rows, strict=True):
        for _ in range(num_copies):
            stream = TokenStream(
                dual,
                prompt_ids,
                _decode_config(settings, input_ids_BT.shape[1], ours),
                eos_token_ids=eos_token_ids,
                context_length=context_length(dual.base.config),
                tokenizer=tokenizer,
                should_stop=_stopping(criteria, row_1T),
            )
            outputs.append(_run(stream, row_1T, streamer))
    sequences_BT = _padded(input_ids_BT.repeat_interleave(num_copies, 0), outputs, settings)
    if settings.return_dict_in_generate:
        return OrthrusGenerateOutput(sequences=sequences_BT, stats=tuple(stats for _, stats in outputs))
    return sequences_BT


def _run(stream: TokenStream, input_ids_1T: Tensor, streamer: Any) -> tuple[list[int], DecodeStats]:
    """Drain one stream, passing its tokens to the streamer as they come."""
    if streamer is not None:
        streamer.put(input_ids_1T.cpu())
    for cycle in stream:
        if streamer is not None and cycle.token_ids:
            streamer.put(torch.tensor(cycle.token_ids))
    if streamer is not None:
        streamer.end()
    return list(stream.result.token_ids), stream.result.stats


def _stopping(criteria: StoppingCriteriaList, input_ids_1T: Tensor) -> Callable[[list[int]], bool] | None:
    """The criteria as the stream asks them: after every token, with the whole sequence so far."""
    if not criteria:
        return None

    def should_stop(token_ids: list[int]) -> bool:
        so_far_1T = torch.cat([input_ids_1T, input_ids_1T.new_tensor([token_ids])], dim=1)
        return bool(torch.as_tensor(criteria(so_far_1T, None)).all())

    return should_stop


def _take(kwargs: dict[str, Any], name: str, inputs: Tensor | None) -> Tensor:
    given: Tensor | None = kwargs.pop(name, None)
    if (given is None) == (inputs is None):
        raise UserInputError("generate needs input_ids, once: a (batch, length) tensor of token ids.")
    input_ids_BT = inputs if given is None else given
    assert input_ids_BT is not None
    if input_ids_BT.ndim != 2 or not len(input_ids_BT) or input_ids_BT.is_floating_point():
        raise UserInputError(
            f"input_ids must be a (batch, length) tensor of ids, not {tuple(input_ids_BT.shape)}."
        )
    return input_ids_BT


def _refuse_unsupported(settings: GenerationConfig) -> None:
    for name, off in _UNSUPPORTED.items():
        value = getattr(settings, name, None)
        if value not in off:
            raise UserInputError(
                f"{name}={value} is not supported by Orthrus yet; leave it out, or pass {name}={off[-1]} "
                "if it comes from the model's generation_config."
            )


def _eos_list(settings: GenerationConfig) -> list[int]:
    """One id, a list, a tensor or none at all; id 0 is an id like any other."""
    declared = settings.eos_token_id
    if declared is None:
        return []
    ids = declared.tolist() if isinstance(declared, Tensor) else declared
    return [ids] if isinstance(ids, int) else list(ids)


def _unpadded_rows(
    input_ids_BT: Tensor, attention_mask_BT: Tensor | None, pad_token_id: int | None, eos: frozenset[int]
) -> list[list[int]]:
    """Each row's real tokens. Without a mask, padding is inferred as the stock `generate` infers it."""
    if attention_mask_BT is None:
        attention_mask_BT = torch.ones_like(input_ids_BT)
        if pad_token_id is not None and pad_token_id not in eos:
            attention_mask_BT = (input_ids_BT != pad_token_id).long()
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
    stop = settings.stop_strings or ()
    return DecodeConfig(
        max_new_tokens=_DEFAULT_NEW_TOKENS if max_new_tokens is None else max_new_tokens,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
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


def _padded(
    input_ids_BT: Tensor,
    outputs: list[tuple[list[int], DecodeStats]],
    settings: GenerationConfig,
) -> Tensor:
    """Pad with pad_token_id or, as stock `generate` does, with the first of the end-of-sequence ids."""
    pad = settings.pad_token_id
    if pad is None:
        pad = next(iter(_eos_list(settings)), 0)
    longest = max(len(token_ids) for token_ids, _ in outputs)
    new_BT = input_ids_BT.new_full((len(outputs), longest), pad)
    for row, (token_ids, _) in enumerate(outputs):
        new_BT[row, : len(token_ids)] = input_ids_BT.new_tensor(token_ids)
    return torch.cat([input_ids_BT, new_BT], dim=1)
