"""The view's settings and ours, as they reach the processes of vLLM."""

from dataclasses import dataclass, fields
from typing import Any

from orthrus.errors import CheckpointError, UserInputError
from orthrus.integrations.vllm.names import CONFIG_KEY
from orthrus.model.view_config import ViewConfig


@dataclass(frozen=True, slots=True)
class Settings:
    """floor: the draft pass carries the anchor as an AR row too. adaptive: how many tokens are drafted follows
    what is seen of acceptance and time; else always as many as `num_speculative_tokens` says."""

    floor: bool = True
    adaptive: bool = True

    @staticmethod
    def of(additional_config: Any) -> "Settings":
        """From `additional_config`; UserInputError for what is not known there."""
        raw = additional_config.get(CONFIG_KEY, {}) if isinstance(additional_config, dict) else {}
        known = [field.name for field in fields(Settings)]
        if not isinstance(raw, dict) or not set(raw) <= set(known):
            raise UserInputError(
                f"additional_config[{CONFIG_KEY!r}] may hold {' and '.join(known)}, not {raw!r}."
            )
        if wrong := [name for name, value in raw.items() if type(value) is not bool]:
            raise UserInputError(f"{wrong[0]} of additional_config[{CONFIG_KEY!r}] must be true or false.")
        return Settings(**raw)


def view_config(hf_config: Any) -> ViewConfig:
    """The view's settings in a config.json: ours under `orthrus`, or the two keys of the released layout.

    Raises CheckpointError when there are none, or of twins that this integration has no place for.
    """
    raw = getattr(hf_config, CONFIG_KEY, None)
    if isinstance(raw, dict):
        config = ViewConfig.from_dict(raw)
    elif getattr(hf_config, "block_size", None) and getattr(hf_config, "mask_token_id", None) is not None:
        config = ViewConfig(
            block_size=int(hf_config.block_size), mask_token_id=int(hf_config.mask_token_id), trained=True
        )
    else:
        raise CheckpointError(
            "config.json says nothing about a diffusion view: write the folder with `orthrus export vllm`."
        )
    if config.rank is not None or config.twins is not None:
        raise CheckpointError(
            "vLLM needs full twins of all the attention in a layer: write the folder with `orthrus export vllm`."
        )
    return config
