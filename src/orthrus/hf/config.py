"""The config of a merged folder: the base's own, behind our model type."""

from typing import Any

from transformers import PreTrainedConfig

from orthrus.base.loading import config_from
from orthrus.model.names import ARCHITECTURE, MODEL_TYPE


class OrthrusConfig(PreTrainedConfig):
    """Stands for the base's own config: whatever the base's has can be read and set here too.

    `base_config` is the base's as a dictionary, as config.json holds it; the view's settings have a file of
    their own. Raises CorruptFileError for a `base_config` that transformers cannot read.
    """

    model_type = MODEL_TYPE

    def __init__(self, base_config: dict[str, Any] | PreTrainedConfig | None = None, **kwargs: Any) -> None:
        base = (
            config_from(base_config, "OrthrusConfig")
            if isinstance(base_config, dict) and base_config
            else base_config
        )
        kwargs.setdefault("architectures", [ARCHITECTURE])
        if isinstance(base, PreTrainedConfig):
            own = {*PreTrainedConfig().__dict__, "name_or_path"}
            kwargs = {name: value for name, value in kwargs.items() if name in own or not hasattr(base, name)}
        super().__init__(**kwargs)
        # Last: until here, what transformers asks for must not be answered by the base's config.
        self.__dict__["_base"] = base if isinstance(base, PreTrainedConfig) else None

    @property
    def base(self) -> PreTrainedConfig | None:
        """The base's config itself."""
        return self.__dict__.get("_base")

    @property
    def base_config(self) -> dict[str, Any]:
        return {} if self.base is None else self.base.to_dict()

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        return self if self.base is None else self.base.get_text_config(*args, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        fields: dict[str, Any] = super().to_dict()
        fields.pop("_base", None)
        return fields | {"base_config": self.base_config}

    def __getattr__(self, name: str) -> Any:
        base = self.__dict__.get("_base")
        if base is None or name.startswith("_"):
            raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")
        return getattr(base, name)

    def __setattr__(self, name: str, value: Any) -> None:
        base = self.__dict__.get("_base")
        ours = name.startswith("_") or name in self.__dict__ or hasattr(type(self), name)
        if base is None or ours or not hasattr(base, name):
            super().__setattr__(name, value)  # type: ignore[no-untyped-call]
        else:
            setattr(base, name, value)
