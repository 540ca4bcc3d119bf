"""The view that comes with the package: found, matched by fingerprint, and done without."""

import dataclasses
from pathlib import Path

import pytest
import torch
from tests.tiny_orthrus import tiny_orthrus

from orthrus.base.fingerprint import fingerprint
from orthrus.base.loading import Base
from orthrus.base.resolve import Source
from orthrus.model import loading
from orthrus.model.checkpoint import CONFIG_FILE, save_view
from orthrus.model.twin import twins


def default_base(seed: int = 0) -> Base:
    """A tiny stock model that passes for the default one."""
    base = tiny_orthrus(seed=seed, disturb=0.0).base
    for path, twin in twins(base.model).items():
        parent, _, name = path.rpartition(".")
        setattr(base.model.get_submodule(parent), name, twin.ar)
    return dataclasses.replace(base, source=Source("default", "tiny"))


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A trained view of `default_base()` where the package keeps its own."""
    orthrus = tiny_orthrus(disturb=0.2)
    config = dataclasses.replace(
        orthrus.dual.config, trained=True, base_fingerprint=fingerprint(default_base().model)
    )
    orthrus.dual.config = config
    save_view(orthrus.dual, tmp_path / "view", "delta4")
    monkeypatch.setattr(loading, "shipped_view_folder", lambda name: tmp_path / "view")
    return tmp_path / "view"


def test_the_default_base_gets_it(shipped: Path) -> None:
    dual = loading._shipped_view(default_base())
    assert dual.config.trained
    assert any(not torch.equal(t.ar.weight, t.diffusion.weight) for t in twins(dual.base).values())


def test_other_weights_under_the_same_name_do_not(shipped: Path) -> None:
    assert not loading._shipped_view(default_base(seed=5)).config.trained


def test_without_one_the_view_is_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "shipped_view_folder", lambda name: None)
    assert not loading._shipped_view(default_base()).config.trained


@pytest.mark.parametrize("place", ["src/orthrus/_views", "views"])
def test_it_lies_in_the_package_or_in_the_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setattr(loading, "__file__", str(tmp_path / "src" / "orthrus" / "model" / "loading.py"))
    assert loading.shipped_view_folder("tiny") is None
    folder = tmp_path / place / "tiny"
    folder.mkdir(parents=True)
    (folder / CONFIG_FILE).touch()
    assert loading.shipped_view_folder("tiny") == folder


def test_an_installed_package_looks_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "lib" / "site-packages" / "orthrus"
    monkeypatch.setattr(loading, "__file__", str(package / "model" / "loading.py"))
    stray = tmp_path / "lib" / "views" / "tiny"
    stray.mkdir(parents=True)
    (stray / CONFIG_FILE).touch()
    assert loading.shipped_view_folder("tiny") is None
