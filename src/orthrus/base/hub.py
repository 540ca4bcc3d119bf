"""Fetch a model folder from the Hugging Face hub; every failure becomes one sentence."""

from pathlib import Path
from typing import Any

from orthrus.base.storage import Progress, storage_errors
from orthrus.errors import ModelNotFoundError, OrthrusError, UnsupportedModelError, UserInputError

# Weights as safetensors only: other formats can run code when they are opened.
_WANTED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
# Sub-folders hold exports for other programs; "consolidated" repeats the weights in another layout.
_UNWANTED = ["*/*", "consolidated*"]
ADAPTER_FILE = "adapter_config.json"
"""Of a PEFT adapter, which has no config.json."""


def fetch(
    repo_id: str,
    revision: str | None = None,
    *,
    progress: Progress | None = None,
    local_only: bool = False,
) -> Path:
    """Download what is missing of a hub model and return its folder; honours `HF_HUB_OFFLINE`.

    Raises:
        ModelNotFoundError: no such id or revision, gated, offline or unreachable.
        UserInputError: the hub refuses the id as malformed.
        UnsupportedModelError: the repository has no safetensors weights.
        StorageError: the disk is full or the hub's cache cannot be written.
    """
    folder = _downloaded(repo_id, revision, _WANTED, progress, local_only)
    return _checked(folder, repo_id)


def fetch_config(repo_id: str, revision: str | None = None) -> Path:
    """The folder of a hub model with its config.json, without the weights. Errors as `fetch`."""
    folder = _downloaded(repo_id, revision, ["config.json"], None, False)
    if not (folder / "config.json").is_file():
        raise UnsupportedModelError(f"{repo_id} has no config.json, so it is no transformers model.")
    return folder


def _downloaded(
    repo_id: str, revision: str | None, wanted: list[str], progress: Progress | None, local_only: bool
) -> Path:
    from huggingface_hub import constants, errors, snapshot_download

    named = f"{repo_id} at revision '{revision}'" if revision is not None else repo_id
    kwargs: dict[str, Any] = {} if progress is None else {"tqdm_class": _reporter(repo_id, progress)}
    cache = Path(constants.HF_HUB_CACHE)
    try:
        with storage_errors(cache, needed_bytes=0):
            return Path(
                snapshot_download(
                    repo_id,
                    revision=revision,
                    allow_patterns=wanted,
                    ignore_patterns=_UNWANTED,
                    local_files_only=local_only,
                    **kwargs,
                )
            )
    except errors.GatedRepoError as error:
        raise ModelNotFoundError(
            f"{repo_id} is gated: accept its terms on huggingface.co/{repo_id}, then run `hf auth login`."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"The hub has no model {repo_id} that you may see: check the spelling, or run `hf auth login`."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelNotFoundError(
            f"{repo_id} has no revision '{revision}': give a branch, tag or commit of it."
        ) from error
    except errors.HFValidationError as error:
        raise UserInputError(f"'{repo_id}' is not a valid hub id: it has to read 'owner/name'.") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        if constants.HF_HUB_OFFLINE:
            raise ModelNotFoundError(
                f"{named} is not complete in the local cache and HF_HUB_OFFLINE is set: unset it to download."
            ) from error
        raise ModelNotFoundError(
            f"{named} is no folder here, it is not complete in the local cache, and the hub cannot be reached: "
            "check the name, or the network."
        ) from error
    except OrthrusError:
        raise
    except Exception as error:
        # The hub client passes on what its HTTP library raises, whichever that is in this version.
        raise ModelNotFoundError(
            f"Downloading {named} failed ({_first_line(error)}): check the network and try again."
        ) from error


def _checked(folder: Path, repo_id: str) -> Path:
    if not (folder / "config.json").is_file() and not (folder / ADAPTER_FILE).is_file():
        raise UnsupportedModelError(f"{repo_id} has no config.json, so it is no transformers model.")
    if not any(folder.glob("*.safetensors")):
        raise UnsupportedModelError(
            f"{repo_id} has no safetensors weights: convert it, or choose another upload of the model."
        )
    return folder


def _reporter(repo_id: str, progress: Progress) -> type[Any]:
    """A bar class for the hub client that draws nothing and forwards byte counts."""
    from huggingface_hub.utils.tqdm import tqdm

    class Reporter(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            # Bytes written; the second bar of bytes, those received, would make ours jump.
            received = str(kwargs.get("name")).endswith(".transfer")
            self._counts_bytes = kwargs.get("unit") == "B" and not received
            self._done = 0
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]
            # A disabled bar skips setting what the hub client reads back.
            self.total, self.n = kwargs.get("total"), 0

        def update(self, n: float | None = 1) -> bool | None:
            self._done += int(n or 0)
            if self._counts_bytes:
                progress(f"downloading {repo_id}", self._done, int(self.total) if self.total else None)
            return None

    return Reporter


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__
