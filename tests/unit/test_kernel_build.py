"""Options for the compiler of our kernels."""

import sysconfig
from pathlib import Path
from typing import Any

import pytest

from orthrus.kernels.build import compiler_options


def test_a_system_without_pythons_headers_gets_no_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    paths = sysconfig.get_path

    def without_headers(name: str, *args: Any, **named: Any) -> str | None:
        return str(tmp_path) if name == "include" else paths(name, *args, **named)

    monkeypatch.setattr(sysconfig, "get_path", without_headers)
    # In tests, a warning is an error.
    options = compiler_options(compile_only=True)
    assert str(tmp_path) in options.get_include_dirs()
