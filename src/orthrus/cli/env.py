"""`orthrus env`: facts about this machine, made to be pasted into a bug report."""

import os
import platform
import sys
from typing import Any

from orthrus.cli import options
from orthrus.cli.render import out, print_json

PACKAGES = (
    "orthrus-lm",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "huggingface-hub",
    "gguf",
    "numpy",
    "typer",
    "accelerate",
    "torchao",
    "bitsandbytes",
    "vllm",
)


def env(json: options.Json = False) -> None:
    """Print versions, hardware and the cache: what a bug report needs."""
    facts = collect()
    if json:
        print_json(facts)
        return
    width = max(len(name) for name in facts)
    out("".join(f"{name:<{width}}  {value}\n" for name, value in facts.items()))


def collect() -> dict[str, Any]:
    """All facts, flat: name to a text, number or truth value."""
    import psutil
    import torch

    from orthrus.base.memory import available_bytes
    from orthrus.base.provenance import cpu_model, installed_version
    from orthrus.base.storage import cache_dir, folder_bytes

    memory = psutil.virtual_memory()
    return {
        "python": f"{platform.python_version()} ({sys.executable})",
        **{name: installed_version(name) or "not installed" for name in PACKAGES},
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cores": f"{_usable_cores()} usable of {os.cpu_count()}, {psutil.cpu_count(logical=False)} physical",
        "memory": f"{memory.total / 1e9:.1f} GB, {available_bytes() / 1e9:.1f} GB available",
        "torch_threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_libraries": ", ".join(_cpu_libraries()) or "none",
        "accelerators": "; ".join(_accelerators()) or "none",
        "cache": str(cache_dir()),
        "cache_size_gb": round(folder_bytes(cache_dir()) / 1e9, 3),
        "default_model_cached": _default_model_cached(),
        "offline": bool(os.environ.get("HF_HUB_OFFLINE")),
    }


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_libraries() -> list[str]:
    import torch

    backends = {"MKL": torch.backends.mkl, "oneDNN": torch.backends.mkldnn, "OpenMP": torch.backends.openmp}
    return [name for name, backend in backends.items() if backend.is_available()]


def _accelerators() -> list[str]:
    import torch

    found = []
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(i)
            found.append(
                f"cuda:{i} {about.name}, {about.total_memory / 1e9:.1f} GB (CUDA {torch.version.cuda})"
            )
    if torch.backends.mps.is_available():
        found.append("mps")
    return found


def _default_model_cached() -> bool:
    """Whether the folder is there; loading looks into it."""
    from orthrus.base import default_model, gguf
    from orthrus.base.storage import MANIFEST, cache_dir

    models = cache_dir() / "models"
    converted = models / gguf.cache_key(default_model.GGUF_SHA256) / MANIFEST
    return converted.is_file() or (models / "default-from-hub.json").is_file()
