"""Checks transformers' generation options, and has the messages for those that Orthrus does not support."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

from orthrus.errors import UserInputError

# Options that would change the distribution of the tokens or the returned values, with the values that switch them off.
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
# Options that only affect how the stock model runs.
_HARMLESS = ("use_cache", "synced_gpus", "cache_implementation", "logits_to_keep", "return_legacy_cache")


def refuse_unsupported(settings: GenerationConfig) -> None:
    """Raises UserInputError for an unsupported setting that is not switched off."""
    for name, off in _UNSUPPORTED.items():
        value = getattr(settings, name, None)
        if not any(value is o or (type(value) in (int, float, bool) and value == o) for o in off):
            raise UserInputError(
                f"{name}={value} is not supported by Orthrus yet; leave it out, or pass {name}={off[-1]} "
                "if it comes from the model's generation_config."
            )


def check_types(settings: Mapping[str, Any]) -> None:
    """Raises UserInputError for a value of a wrong type, because transformers checks only some."""
    for name in ("max_new_tokens", "max_length", "num_return_sequences", "pad_token_id", "top_k"):
        value = settings.get(name)
        least = 0 if name in ("pad_token_id", "top_k") else 1
        if value is not None and (type(value) is not int or value < least):
            raise UserInputError(f"{name} must be a whole number from {least}, not {value!r}.")
    for name in ("max_time", "temperature", "top_p", "min_p", "repetition_penalty"):
        value = settings.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise UserInputError(f"{name} must be a number, not {value!r}.")
    ends = settings.get("eos_token_id")
    ends = ends.tolist() if isinstance(ends, Tensor) else ends
    if ends is not None and not all(type(i) is int for i in (ends if isinstance(ends, list) else [ends])):
        raise UserInputError(f"eos_token_id must be a token id or a list of them, not {ends!r}.")


def refuse_unknown(unknown: dict[str, Any], model: PreTrainedModel) -> None:
    """UserInputError for keywords that are no settings: transformers' own that we lack, or misspelt ones.

    None, False and empty values of transformers' own count as not given.
    """
    known = {*inspect.signature(GenerationMixin.generate).parameters}
    known |= {*inspect.signature(model.forward).parameters, *_MODEL_INPUTS}
    misspelt = sorted(name for name in unknown if name not in known)
    if misspelt:
        raise UserInputError(f"generate does not take {', '.join(misspelt)}; check the spelling.")
    given = sorted(
        name
        for name, value in unknown.items()
        if name not in _HARMLESS
        and not (value is None or value is False or (isinstance(value, list | dict | str) and not value))
    )
    if given:
        raise UserInputError(f"{', '.join(given)} is not supported by Orthrus yet; leave it out.")


# Keywords that transformers' generate hands to models of some kinds.
_MODEL_INPUTS = (
    "token_type_ids",
    "encoder_outputs",
    "decoder_input_ids",
    "cache_position",
    "past_key_values",
    "position_ids",
    "inputs_embeds",
    "use_cache",
    "logits_to_keep",
    "output_attentions",
    "return_legacy_cache",
)
