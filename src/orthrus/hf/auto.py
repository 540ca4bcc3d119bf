"""The transformers interface: OrthrusForCausalLM and its Auto* registration.

transformers' import hooks import this module, maybe while the rest of orthrus is half imported: what imports
transformers in its turn is imported inside the functions here.
"""

from collections.abc import Hashable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
)

from orthrus.base.families import find_family
from orthrus.base.loading import Base
from orthrus.errors import UserInputError
from orthrus.hf import adapters  # noqa: F401  (PEFT learns about twins)
from orthrus.hf.changes import state_of
from orthrus.hf.config import OrthrusConfig
from orthrus.model.names import MODEL_TYPE

if TYPE_CHECKING:
    from orthrus.engine.engine import Engine
    from orthrus.hf.generate import OrthrusGenerateOutput
    from orthrus.model.dual_view import DualView
    from orthrus.model.merged import MergedLayout

_LOADING = ("dtype", "revision", "attn_implementation", "runner")
# What the Auto classes and users of from_pretrained pass along; it means nothing here.
_IGNORED = {
    "config", "trust_remote_code", "code_revision", "proxies", "use_safetensors", "low_cpu_mem_usage",
    "_from_auto", "_commit_hash", "adapter_kwargs", "weights_only",
}  # fmt: skip
# What the hub's client reads from the environment instead.
_ENVIRONMENT = {
    "token": "HF_TOKEN",
    "cache_dir": "HF_HUB_CACHE",
    "local_files_only": "HF_HUB_OFFLINE",
    "force_download": "HF_HUB_CACHE",
}
# Options of save_pretrained of which only False would change what is written.
_SAVE_FORMATS = ("safe_serialization", "save_peft_format", "save_original_format")


class OrthrusForCausalLM(PreTrainedModel, GenerationMixin):
    """A base model with its diffusion view behind the usual transformers interface.

    `forward` is the base model's own (the AR view); `generate` decodes in parallel. Loads view folders,
    merged folders, released Orthrus-Qwen3 checkpoints (no remote code) and stock bases (with an untrained view).
    """

    config_class = OrthrusConfig
    base_model_prefix = "base"
    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(
        self,
        config: OrthrusConfig,
        dual: "DualView | None" = None,
        base: Base | None = None,
        runner: str = "eager",
    ) -> None:
        """runner: "auto", "eager" or "compiled", as in `Orthrus.load`."""
        super().__init__(config)
        if dual is None:
            dual = _untrained_dual(config)
        self.dual = dual
        self._base = base
        self._runner = runner
        self._new_engine(state_of(dual.base))
        self.generation_config = getattr(dual.base, "generation_config", None) or GenerationConfig()

    @property
    def base(self) -> PreTrainedModel:
        """The stock model, with twins in its attention."""
        return self.dual.base

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path, *model_args: Any, view: str = "default", **kwargs: Any
    ) -> "OrthrusForCausalLM":
        """Load a folder or hub id; `view` as in `Orthrus.load`.

        Takes dtype (or torch_dtype), device_map as one device, revision, attn_implementation, and runner as
        `Orthrus.load` does. An option that is None, False or empty counts as not given.
        Raises UserInputError for other loading options, and what `Orthrus.load` raises.
        """
        from orthrus.engine.runners import chosen_runner
        from orthrus.model.loading import load_dual

        if model_args:
            raise UserInputError(
                "OrthrusForCausalLM.from_pretrained takes the model's name and keywords; give the other "
                "arguments by name."
            )
        if kwargs.get("torch_dtype") is not None:
            kwargs["dtype"] = kwargs["torch_dtype"]
        kwargs = {name: value for name, value in kwargs.items() if not _is_off(value)}
        kwargs.pop("torch_dtype", None)
        device_map = kwargs.pop("device_map", None)
        device = "cpu" if device_map is None else _single_device(device_map)
        options = {name: kwargs.pop(name) for name in _LOADING if name in kwargs}
        runner = chosen_runner(options.pop("runner", None))
        for name, variable in _ENVIRONMENT.items():
            if name in kwargs:
                raise UserInputError(
                    f"{name} is not taken here; set the environment variable {variable} instead."
                )
        unknown = kwargs.keys() - _IGNORED
        if unknown:
            raise UserInputError(
                f"OrthrusForCausalLM.from_pretrained does not take {', '.join(sorted(unknown))}; it takes "
                "dtype, device_map (one device), revision, attn_implementation, runner and view."
            )
        options.setdefault("dtype", "auto")
        base, dual = load_dual(str(pretrained_model_name_or_path), view, device=device, **options)
        config = OrthrusConfig(base.model.config, dtype=base.model.dtype)
        config.name_or_path = str(pretrained_model_name_or_path)
        loaded = cls(config, dual, base, runner)
        loaded.eval()  # type: ignore[no-untyped-call]
        return loaded

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        *,
        layout: "MergedLayout | Literal['view']" = "merged",
        max_shard_size: int | str | None = None,
        **kwargs: Any,
    ) -> None:
        """Write base and view: layout "merged" (any family), "released" (Qwen3), or "view" (the view alone).

        The folder must not exist, unless it is empty (as `push_to_hub` hands one over). `max_shard_size`
        splits the base's weights, as in transformers. Raises UserInputError for options that are not taken.
        """
        from orthrus.model.checkpoint import save_view
        from orthrus.model.merged import save_merged

        _check_saving(layout, kwargs)
        if not is_main_process:
            return
        folder = Path(save_directory)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        if layout == "view":
            save_view(self.dual, folder)
        else:
            save_merged(self.dual, self._base, folder, layout, max_shard_size=max_shard_size)

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> torch.nn.Embedding:
        """As the base model's own, head and config included.

        Raises UserInputError, before anything changes, where the new size would cut off the view's mask
        token, or where a runner or a draft vocabulary has made copies of the head.
        """
        dual = self.dual
        if new_num_tokens is None and pad_to_multiple_of is None:
            return dual.base.get_input_embeddings()  # type: ignore[return-value]
        if (
            self.engine.runner.name != "eager"
            or dual.draft_ids_N is not None
            or dual.precision
            or dual.draft_precision
        ):
            raise UserInputError(
                "the embeddings cannot be resized after the head has been packed; load the model with "
                "runner='eager', and without a draft vocabulary and int8 or int4."
            )
        least = (dual.config.mask_token_id or 0) + 1
        if new_num_tokens is not None and new_num_tokens < least:
            raise UserInputError(
                f"{new_num_tokens} embeddings would cut off the view's mask token {least - 1}; keep at least "
                f"{least}."
            )
        return dual.base.resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)

    def forward(self, input_ids: Tensor | None = None, **kwargs: Any) -> Any:
        """The AR view: exactly the base model's forward; logits_BTV in `.logits`."""
        return self.dual.base(input_ids=input_ids, **kwargs)

    def generate(  # type: ignore[override]
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        **kwargs: Any,
    ) -> "Tensor | OrthrusGenerateOutput":
        """As transformers' `generate` (input_ids_BT to sequences), decoded in parallel and lossless.

        Takes input_ids, attention_mask, generation_config and its fields (repetition_penalty and
        sequence_bias of single tokens among them), streamer, stopping_criteria, tokenizer (for stop_strings),
        return_dict_in_generate, and ours: strategy, block_size, node_budget, block_budget, floor. Options
        that it cannot honour (beams, logits processors) raise UserInputError. The sequences of a batch share
        passes, each with the text that it has alone: a penalty does not count the padding of a sequence, which
        transformers' own does. The text is that of the model as it is now: after training steps, with adapters of
        PEFT, or moved to another dtype or device. Adapters make it run eagerly.
        """
        from orthrus.hf.generate import generate

        return generate(self._engine_now(), inputs, self.generation_config, generation_config, kwargs)

    def _engine_now(self) -> "Engine":
        """The engine. If the model has changed, a new one: the old one has packed weights and pages of the model
        before.
        """
        with self.engine.held():
            state = state_of(self.dual.base)
            if state != self._engine_state:
                self._new_engine(state)
        return self.engine

    def _new_engine(self, state: Hashable) -> None:
        """An engine for the model in this state, see `state_of`."""
        from orthrus.engine.engine import Engine
        from orthrus.engine.runners import make_runner

        self.engine, self._engine_state = Engine(make_runner(self.dual, self._runner)), state

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.dual.base.get_input_embeddings()

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.dual.base.get_output_embeddings()  # type: ignore[no-any-return]


def _single_device(device_map: Any) -> str | None:
    """The one device meant; None for "auto", the first accelerator there is."""
    if device_map == "auto":
        return None
    if isinstance(device_map, dict) and len(device_map) == 1:
        device_map = next(iter(device_map.values()))
    if isinstance(device_map, int):
        return f"cuda:{device_map}"
    if isinstance(device_map, (str, torch.device)):
        return str(device_map)
    raise UserInputError("device_map must name one device: Orthrus does not split a model over several yet.")


def _untrained_dual(config: OrthrusConfig) -> "DualView":
    """A model of random weights with an untrained view, as the Auto classes' `from_config` makes it."""
    from orthrus.model.checkpoint import DEFAULT_FRESH_BLOCK_SIZE
    from orthrus.model.dual_view import DualView
    from orthrus.model.view_config import ViewConfig

    if config.base is None:
        raise UserInputError("OrthrusConfig needs the base's config; give it as base_config.")
    stock = AutoModelForCausalLM.from_config(config.base)
    return DualView(stock.eval(), find_family(stock), ViewConfig(block_size=DEFAULT_FRESH_BLOCK_SIZE))


def _is_off(value: Any) -> bool:
    """Whether an option's value means that it is not used."""
    return value is None or value is False or (isinstance(value, str | dict | list | tuple) and not value)


def _check_saving(layout: str, options: dict[str, Any]) -> None:
    """UserInputError for a layout that does not exist, and for options that would change what is written."""
    if layout not in ("merged", "released", "view"):
        raise UserInputError(f"layout must be merged, released or view, not {layout!r}.")
    given = sorted(
        name
        for name, value in options.items()
        if (value is False if name in _SAVE_FORMATS else not _is_off(value) and name != "token")
    )
    if "push_to_hub" in given:
        raise UserInputError("save_pretrained writes to the disk only; call push_to_hub(...) to upload.")
    if given:
        raise UserInputError(
            f"OrthrusForCausalLM.save_pretrained does not take {', '.join(given)}; it takes layout, "
            "max_shard_size and is_main_process."
        )


AutoConfig.register(MODEL_TYPE, OrthrusConfig, exist_ok=True)
AutoModelForCausalLM.register(OrthrusConfig, OrthrusForCausalLM, exist_ok=True)
