"""What vLLM calls in each of its processes, through the entry point group `vllm.general_plugins`."""

import logging

from orthrus.integrations.vllm.names import MODELS, PACKAGE
from orthrus.integrations.vllm.versions import refusal, vllm_version

logger = logging.getLogger("vllm.orthrus")


def register() -> None:
    """Tell vLLM our architectures. On a release that we do not know it says so and registers nothing: models
    of others, who only have Orthrus installed, go on as they are."""
    from vllm import ModelRegistry

    if (problem := refusal(vllm_version())) is not None:
        logger.warning("Orthrus stays away: %s", problem)
        return
    for architecture, name in MODELS.items():
        ModelRegistry.register_model(architecture, f"{PACKAGE}.models:{name}")
