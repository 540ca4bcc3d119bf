"""The transformers interface: OrthrusForCausalLM, its config, and their Auto* registration."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)

from orthrus.base.families import find_family
from orthrus.base.loading import Base
from orthrus.engine.hf_generate import OrthrusGenerateOutput, generate
from orthrus.errors import UserInputError
from orthrus.model.checkpoint import ARCHITECTURE, DEFAULT_FRESH_BLOCK_SIZE, MODEL_TYPE, save_view
from orthrus.model.dual_view import DualView
from orthrus.model.loading import load_dual
from orthrus.model.merged import MergedLayout, save_merged
from orthrus.model.view_config import ViewConfig

_LOADING = ("dtype", "revision", "attn_implementation")
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


class OrthrusConfig(PreTrainedConfig):
    """Config of a merged folder: the base's own config (`base_config`), and the view's in its own file."""

    model_type = MODEL_TYPE

    def __init__(self, base_config: dict[str, Any] | PreTrainedConfig | None = None, **kwargs: Any) -> None:
        if isinstance(base_config, PreTrainedConfig):
            base_config = base_config.to_dict()
        self.base_config = base_config or {}
        kwargs.setdefault("architectures", [ARCHITECTURE])
        for shared in ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings"):
            kwargs.setdefault(shared, self.base_config.get(shared))
        super().__init__(**kwargs)


class OrthrusForCausalLM(PreTrainedModel, GenerationMixin):
    """A base model with its diffusion view behind the usual transformers interface.

    `forward` is the base model's own (the AR view); `generate` decodes in parallel. Loads view folders,
    merged folders, released Orthrus-Qwen3 checkpoints (no remote code) and stock bases (with a fresh view).
    """

    config_class = OrthrusConfig
    base_model_prefix = "base"
    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(self, config: OrthrusConfig, dual: DualView | None = None, base: Base | None = None) -> None:
        super().__init__(config)
        if dual is None:
            stock = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config.base_config))
            dual = DualView(stock.eval(), find_family(stock), ViewConfig(block_size=DEFAULT_FRESH_BLOCK_SIZE))
        self.dual = dual
        self._base = base
        self.generation_config = getattr(dual.base, "generation_config", None) or GenerationConfig()

    @property
    def base(self) -> PreTrainedModel:
        """The stock model, with twins in its attention."""
        return self.dual.base

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path, *_: Any, view: str = "default", **kwargs: Any
    ) -> "OrthrusForCausalLM":
        """Load a folder or hub id; `view` as in `Orthrus.load`.

        Takes dtype (or torch_dtype), device_map as one device, revision and attn_implementation.
        Raises UserInputError for other loading options, and what `Orthrus.load` raises.
        """
        if "torch_dtype" in kwargs:
            kwargs["dtype"] = kwargs.pop("torch_dtype")
        device_map = kwargs.pop("device_map", None)
        device = "cpu" if device_map is None else _single_device(device_map)
        options = {name: kwargs.pop(name) for name in _LOADING if kwargs.get(name) is not None}
        for name, variable in _ENVIRONMENT.items():
            if kwargs.pop(name, None):
                raise UserInputError(
                    f"{name} is not taken here; set the environment variable {variable} instead."
                )
        unknown = kwargs.keys() - _IGNORED - set(_LOADING)
        if unknown:
            raise UserInputError(
                f"OrthrusForCausalLM.from_pretrained does not take {', '.join(sorted(unknown))}; it takes "
                "dtype, device_map (one device), revision, attn_implementation and view."
            )
        options.setdefault("dtype", "auto")
        base, dual = load_dual(str(pretrained_model_name_or_path), view, device=device, **options)
        config = OrthrusConfig(base.model.config, dtype=base.model.dtype)
        config.name_or_path = str(pretrained_model_name_or_path)
        loaded = cls(config, dual, base)
        loaded.eval()  # type: ignore[no-untyped-call]
        return loaded

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | Path, *_: Any, layout: MergedLayout | str = "merged", **__: Any
    ) -> None:
        """Write base and view: layout "merged" (any family), "released" (Qwen3), or "view" (the view alone).

        The folder must not exist, unless it is empty (as `push_to_hub` hands one over).
        """
        folder = Path(save_directory)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        if layout == "view":
            save_view(self.dual, folder)
        elif layout in ("merged", "released"):
            save_merged(self.dual, self._base, folder, layout)  # type: ignore[arg-type]
        else:
            raise UserInputError(f"layout must be merged, released or view, not {layout!r}.")

    def forward(self, input_ids: Tensor | None = None, **kwargs: Any) -> Any:
        """The AR view: exactly the base model's forward; logits_BTV in `.logits`."""
        return self.dual.base(input_ids=input_ids, **kwargs)

    def generate(  # type: ignore[override]
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        **kwargs: Any,
    ) -> Tensor | OrthrusGenerateOutput:
        """As transformers' `generate` (input_ids_BT to sequences), decoded in parallel and lossless.

        Takes input_ids, attention_mask, generation_config and its fields (repetition_penalty and
        sequence_bias of single tokens among them), streamer, stopping_criteria, tokenizer (for stop_strings),
        return_dict_in_generate, and ours: strategy, block_size, node_budget, block_budget, floor. Options
        that it cannot honour (beams, logits processors) raise UserInputError. Rows of a batch run one by one,
        each as if alone: a penalty does not count the padding of a row, which transformers' own does.
        """
        return generate(self.dual, inputs, self.generation_config, generation_config, kwargs)

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


AutoConfig.register(MODEL_TYPE, OrthrusConfig, exist_ok=True)
AutoModelForCausalLM.register(OrthrusConfig, OrthrusForCausalLM, exist_ok=True)
