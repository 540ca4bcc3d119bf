"""`orthrus pack`: what train would do by itself, elsewhere where asked, and a check of what is packed."""

import json
import shutil
from pathlib import Path

import torch
from tests.run_states import state

from .conftest import Cli, assert_refused


def test_a_packed_corpus_trains_as_the_corpus_does(
    cli: Cli, recipe: str, corpus: str, tmp_path: Path
) -> None:
    packed = str(tmp_path / "packed")
    made = cli("pack", corpus, "--sequence-length", "96", "--output", packed, "--json")
    assert made.code == 0
    report = json.loads(made.out)
    assert report["path"] == packed
    assert report["answer_tokens"] < report["tokens"] <= report["sequences"] * 96
    assert cli("pack", packed, "--json").out == made.out

    settings = ("steps=2", "evaluate_prompts=0")
    assert cli("train", recipe, *settings).code == 0
    # The packed folder is enough.
    other = (f"corpus={packed}", f"output={tmp_path / 'other'}")
    assert cli("train", recipe, *settings, *other).code == 0
    for name, tensor in state(tmp_path / "run")["view"].items():
        assert torch.equal(state(tmp_path / "other")["view"][name], tensor)
    provenance = json.loads((tmp_path / "other" / "view" / "view_config.json").read_text())["provenance"]
    assert provenance["corpus"]["digest"] == report["digest"]
    assert provenance["corpus"]["sources"] == ["prompts.jsonl"]


def test_what_pack_refuses(cli: Cli, corpus: str, tmp_path: Path) -> None:
    assert_refused(cli("pack", corpus), "--sequence-length")
    assert_refused(cli("pack", "~nobody-here/corpus", "--sequence-length", "96"), "no home folder")
    assert_refused(cli("pack", str(tmp_path / "nowhere")), "nowhere is not a folder")
    assert_refused(cli("pack", str(tmp_path), "--sequence-length", "96"), "orthrus synth")
    assert_refused(cli("pack", corpus, "--sequence-length", "3"), "longer than a sequence of 3")
    assert_refused(cli("pack", corpus, "--sequence-length", "100000000000"), "less than or equal to 1048576")
    mine = shutil.copytree(corpus, tmp_path / "mine")
    made = cli("pack", str(mine), "--sequence-length", "96")
    assert made.code == 0
    assert "sequences of 96 tokens in" in made.out
    packed = mine / "packed" / "96"
    assert_refused(cli("pack", str(packed), "--sequence-length", "96"), "packed already")
    assert_refused(cli("pack", corpus, "--sequence-length", "96", "-o", str(packed)), "exists already")
    file = packed / "sequences-00000.u32"
    file.write_bytes(b"\1" + file.read_bytes()[1:])
    assert_refused(cli("pack", str(packed)), "sequences-00000.u32 is damaged")
