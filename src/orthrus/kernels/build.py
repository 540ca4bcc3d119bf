"""Compile the kernels for this processor, once, and load them."""

import ctypes
import hashlib
import os
import shutil
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orthrus.base.compiled_files import kept_code
from orthrus.base.provenance import processor
from orthrus.base.storage import Progress

SOURCES = sorted(p for p in Path(__file__).parent.iterdir() if p.suffix in (".cpp", ".h"))
# Pipes between a compiler's stages: no temporary files of theirs, which stay where it is killed.
FLAGS = ["-Wno-psabi", "-fno-unsafe-math-optimizations", "-pipe"]


_loading, _are_loaded = threading.Lock(), threading.Event()


def load_kernels(progress: Progress | None = None) -> None:
    """Load the kernels as `torch.ops.orthrus`: compile them (once, half a minute or more), or load them from the
    cache folder.

    progress: called only while they are compiled. Safe to call from several threads. Raises what goes wrong: no
    compiler, or an error of the compiler; StorageError where the cache folder cannot be used.
    """
    with _loading:
        if _are_loaded.is_set():
            return
        sources = [path.read_bytes() for path in (Path(__file__), *SOURCES)]
        parts = (sources, FLAGS, torch.__version__, processor(), os.environ.get("CXX"))
        digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
        kept_code(f"kernels-{digest}", _build, _load, progress)
        torch.library.register_fake("orthrus::few_rows_linear", _shape_of_linear)
        torch.library.register_fake("orthrus::few_rows_twin_linear", _shape_of_twin_linear)
        torch.library.register_fake("orthrus::paged_attention", _shape_of_attention)
        _are_loaded.set()


def kernels_loaded() -> bool:
    """Whether `load_kernels` has loaded `torch.ops.orthrus`."""
    return _are_loaded.is_set()


def _load(path: Path) -> None:
    # Compiled layers find the functions by their names; loading registers the operators too.
    ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def _build(folder: Path) -> Path:
    """The library's path, made as PyTorch's compiler makes its own."""
    from torch._inductor.cpp_builder import CppBuilder

    def builder(name: str, sources: list[str], compile_only: bool) -> Any:
        return CppBuilder(name, sources, compiler_options(compile_only), output_dir=str(folder))

    copies = [Path(shutil.copy(source, folder)) for source in SOURCES]
    parts = [builder(copy.stem, [str(copy)], True) for copy in copies if copy.suffix == ".cpp"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # Read out, since that raises what a compiler says.
        list(pool.map(lambda part: part.build(), parts))
    library = builder("kernels", [part.get_target_file_path() for part in parts], False)
    library.build()
    return Path(library.get_target_file_path())


def compiler_options(compile_only: bool) -> Any:
    """PyTorch's options for its C++ compiler, with our flags."""
    from torch._inductor.cpp_builder import CppTorchOptions
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    with warnings.catch_warnings():
        # Our code includes no Python.h, so a system without Python's headers is no problem.
        warnings.filterwarnings("ignore", "Can't find Python.h")
        return CppTorchOptions(
            pick_vec_isa(), include_pytorch=True, compile_only=compile_only, extra_flags=FLAGS
        )


def _shape_of_linear(
    x: Tensor, weight: Tensor, scales: Tensor | None, bias: Tensor | None, columns: int
) -> Tensor:
    return x.new_empty((*x.shape[:-1], columns))


def _shape_of_twin_linear(x: Tensor, *weights_and_columns: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weights_and_columns[-1]))


def _shape_of_attention(query: Tensor, keys: Tensor, values: Tensor, *_: Any) -> Tensor:
    return query.new_empty((1, query.shape[2], query.shape[1], values.shape[3]))


def c_functions() -> dict[Any, list[str]]:
    """Our operators, and the C functions that compiled code calls instead of them."""
    return {
        torch.ops.orthrus.few_rows_linear.default: [
            "AOTITorchError aoti_torch_cpu_few_rows_linear(AtenTensorHandle, AtenTensorHandle, "
            "AtenTensorHandle*, AtenTensorHandle*, int64_t, AtenTensorHandle*)"
        ],
        torch.ops.orthrus.few_rows_twin_linear.default: [
            "AOTITorchError aoti_torch_cpu_few_rows_twin_linear(AtenTensorHandle, int64_t, AtenTensorHandle, "
            "AtenTensorHandle*, AtenTensorHandle*, AtenTensorHandle, AtenTensorHandle*, AtenTensorHandle*, "
            "int64_t, AtenTensorHandle*)"
        ],
        torch.ops.orthrus.paged_attention.default: [
            "AOTITorchError aoti_torch_cpu_paged_attention(AtenTensorHandle, AtenTensorHandle, "
            "AtenTensorHandle, AtenTensorHandle, double, int64_t, double, AtenTensorHandle*)"
        ],
    }
