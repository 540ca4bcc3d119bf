"""What `orthrus synth` and `orthrus train` refuse: one sentence, exit status 2, and nothing lost."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.run_states import state, state_bytes

from orthrus.cli.synth_sources import parse_sources
from orthrus.errors import OrthrusWarning, UserInputError

from .conftest import Cli, Run, assert_refused
from .training_files import SYNTH, stopped_after, write_prompts


def test_wrong_recipes_corpora_and_bases(
    cli: Cli, recipe: str, tmp_path: Path, other_model_folder: str, model_folder: str
) -> None:
    assert_refused(cli("train", str(tmp_path / "absent.yaml")), "cannot be read")
    assert_refused(
        cli("train", recipe, "lerning_rate=1"), "the setting 'lerning_rate=1'", "did you mean learning_rate"
    )
    assert_refused(cli("train", recipe, "steps"), "key=value")
    assert_refused(cli("train", recipe, "layers=2"), "layers must list")
    assert_refused(cli("train", recipe, "layers=[7]"), "layer 7")
    assert_refused(cli("train", recipe, "sequence_length=20"), "longer than a sequence of 20")
    for value in (".nan", ".inf", "many"):
        assert_refused(cli("train", recipe, f"learning_rate={value}"), "learning_rate must be a number")
    for value in ("3", "[]", "[a, a]", "[[a]]", "{a: b}"):
        assert_refused(cli("train", recipe, f"corpus={value}"), "corpus must name a folder")
    assert_refused(cli("train", recipe, "attention=sparse"), "attention must be one of auto, dense, flex")
    assert_refused(cli("train", recipe, f"corpus={tmp_path}"), "orthrus synth")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "prompts.jsonl").write_text('{"prompt_ids":[1],"domain":"x"}\n')
    assert_refused(cli("train", recipe, f"corpus={empty}"), "is empty")
    (empty / "answers-00000.jsonl").write_text('{"prompt":0,"answer_ids":[9999,3],"finished":true}\n')
    assert_refused(cli("train", recipe, f"corpus={empty}"), "token id 9999")
    for text in ('{"prompt":7,"answer_ids":[3]}', '{"answer_ids":[3]}', "[3]", "\xff"):
        (empty / "answers-00000.jsonl").write_text(text, encoding="latin-1")
        assert_refused(cli("train", recipe, f"corpus={empty}"), "answers-00000.jsonl", "delete the file")
    assert not (tmp_path / "run").exists()

    assert cli("train", recipe, "steps=2").code == 0
    before = state_bytes(tmp_path / "run")
    assert_refused(cli("train", recipe, "steps=2", "loss=tv"), "other settings (loss)")
    assert_refused(
        cli("train", recipe, "steps=2", f"base={other_model_folder}"), "other settings (base, base weights)"
    )
    assert state_bytes(tmp_path / "run") == before
    view = tmp_path / "run" / "view"
    assert_refused(
        cli("train", recipe, f"base={view}", f"output={tmp_path / 'on'}"), "is a view of", "init_view"
    )
    assert not (tmp_path / "on" / "state").exists()


def test_a_loss_that_is_not_a_number_keeps_the_last_state(cli: Cli, recipe: str, tmp_path: Path) -> None:
    run = cli("train", recipe, "learning_rate=1e30", "warmup=0", "evaluate_prompts=0", "save_every=1")
    assert_refused(run, "not a number", "learning_rate")
    kept = state(tmp_path / "run")
    assert kept["step"] >= 1


def test_a_full_disk_is_one_sentence_and_keeps_the_last_state(
    cli: Cli, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert stopped_after(cli, recipe).code == 130
    before = state_bytes(tmp_path / "run")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert_refused(cli("train", recipe), "disk ran full while writing", "state")
    assert state_bytes(tmp_path / "run") == before


def test_wrong_prompts(cli: Cli, tmp_path: Path, model_folder: str, other_model_folder: str) -> None:
    target, file = str(tmp_path / "corpus"), tmp_path / "prompts.jsonl"

    def synth(*options: str, model: str = model_folder) -> Run:
        return cli("synth", target, "--model", model, *SYNTH, *options)

    assert_refused(synth("--prompts", str(tmp_path / "absent.jsonl")), "no prompt file", "absent.jsonl")
    for text, words in (
        ("", "holds no prompts"),
        ('{"messages": [{"role": "assistant", "content": "hi"}]}\n', "no user turn"),
        ("not json\n", "line 1"),
        ('{"prompt": " "}\n', "must hold some text"),
        ('{"prompt": "..."}\n', "no prompt is left"),
        (json.dumps({"prompt": "long " * 80}) + "\n", "no prompt is left"),
    ):
        file.write_text(text)
        assert_refused(synth("--prompts", str(file)), words)
    assert_refused(synth("--prompts", f"{file}:math:none"), "positive number")
    assert_refused(synth("--self-prompts", "math"), "DOMAIN=COUNT")
    assert_refused(synth("--self-prompts", "math=-5"), "with a count from 1")
    assert_refused(synth("--suffix", "poetry=x"), "--suffix")
    write_prompts(file)
    assert_refused(synth("--prompts", str(file), "--greedy-share", "2"), "greedy_share")
    assert_refused(synth("--prompts", str(file), "-n", "300"), "no room for a prompt")
    assert_refused(synth("--self-prompts", "math=2", model=other_model_folder), "no chat template")


def test_own_prompts_of_a_kind_without_openings_are_told_of() -> None:
    with pytest.warns(OrthrusWarning, match="no openings for 'maths'.*math, code"):
        (source,) = parse_sources([], [], ["maths=2"], [])
    assert (source.domain, source.count) == ("maths", 2)


def test_a_corpus_begun_with_other_settings(cli: Cli, tmp_path: Path, model_folder: str) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl", 3)
    command = ("synth", str(tmp_path / "corpus"), "--model", model_folder, "--prompts", prompts, *SYNTH)
    first, again = cli(*command), cli(*command)
    assert first.code == again.code == 0
    assert first.out == again.out
    assert_refused(cli(*command, "--seed", "3"), "other settings (seed)")


def test_sources_are_read_as_written(tmp_path: Path) -> None:
    file = tmp_path / "a:b.jsonl"
    file.touch()
    plain, named, counted, own = parse_sources(
        [str(file), f"{file}:math", f"{file}:math:5"], [], ["chat=7"], ["math=\\nThink."]
    )
    assert (plain.file, plain.domain, plain.count, plain.suffix) == (str(file), None, None, "")
    assert (named.domain, named.count, named.suffix) == ("math", None, "\nThink.")
    assert (counted.count, counted.suffix) == (5, "\nThink.")
    assert (own.file, own.domain, own.count, own.suffix) == (None, "chat", 7, "")
    assert [s.domain for s in parse_sources([], [], [], [])] == ["math", "code", "chat", "writing", "summary"]
    with pytest.raises(UserInputError):
        parse_sources([f"{file}:x:0"], [], [], [])

    folder = tmp_path / "sets:of" / "mine"
    folder.mkdir(parents=True)
    specs = [
        f"{folder}",
        f"{folder}@test:math:5",
        "openai/gsm8k/main@test:math:50",
        "me/chats:chat",
        "me/c@a+b",
    ]
    found = parse_sources([], specs, [], ["math=!"])
    assert [(s.dataset, s.config, s.split) for s in found] == [
        (str(folder), None, "train"),
        (str(folder), None, "test"),
        ("openai/gsm8k", "main", "test"),
        ("me/chats", None, "train"),
        ("me/c", None, "a+b"),
    ]
    assert [(s.domain, s.count, s.suffix) for s in found] == [
        (None, None, ""), ("math", 5, "!"), ("math", 50, "!"), ("chat", None, ""), (None, None, "")
    ]  # fmt: skip
    for spec in ("me/chats:chat:0", "./absent", "gsm8k", "a/b/c/d", "a/b:c:1:2", ":x"):
        with pytest.raises(UserInputError, match=r"OWNER/NAME|positive number"):
            parse_sources([], [spec], [], [])


def test_a_corpus_from_a_data_set_is_fetched_once(
    cli: Cli, tmp_path: Path, model_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder, target = tmp_path / "set", tmp_path / "corpus"
    folder.mkdir()
    rows = [{"instruction": f"Count {i}", "input": "1 2"} for i in range(8)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ("synth", str(target), "--model", model_folder, "--dataset", f"{folder}:math:6", *SYNTH)
    assert_refused(cli(*command[:5], f"{folder}@test", *SYNTH), "no split 'test'", "train")
    assert_refused(cli(*command[:5], "nobody/nothing", *SYNTH), "out of reach")
    assert not target.exists()

    made = cli(*command, "--json")
    assert made.code == 0
    assert set(json.loads(made.out)["domains"]) == {"math"}
    prompts = [json.loads(line)["prompt"] for line in (target / "source-00.jsonl").read_text().splitlines()]
    assert len(prompts) == 6
    assert all(prompt.endswith("\n\n1 2") for prompt in prompts)
    source = json.loads((target / "manifest.json").read_text())["sources"]["source-00.jsonl"]
    assert (source["dataset"], source["split"], source["column"]) == (str(folder), "train", "instruction")
    assert source["revision"]

    (folder / "train.jsonl").unlink()
    (target / "answers-00000.jsonl").unlink()
    again = cli(*command, "--json")
    assert again.out == made.out


def test_a_corpus_goes_on_with_its_own_base_and_precision(
    cli: Cli, tmp_path: Path, model_folder: str
) -> None:
    model, target = tmp_path / "model", tmp_path / "corpus"
    shutil.copytree(model_folder, model)
    prompts = write_prompts(tmp_path / "prompts.jsonl", 6)
    command = ("synth", str(target), "--model", str(model), "--prompts", prompts, *SYNTH)
    assert cli(*command).code == 0
    before = {file.name: file.read_bytes() for file in target.iterdir()}
    assert_refused(cli(*command, "--dtype", "bfloat16"), "begun with other settings (dtype);", "a new folder")
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    assert_refused(cli(*command), "begun with other settings (base_fingerprint);")
    (target / "manifest.json").write_text("[]")
    assert_refused(cli(*command), "manifest.json is damaged")
    after = {file.name: file.read_bytes() for file in target.iterdir()}
    assert after == before | {"manifest.json": b"[]"}


def test_a_full_disk_keeps_whole_shards(
    cli: Cli, tmp_path: Path, model_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, target = write_prompts(tmp_path / "prompts.jsonl"), tmp_path / "corpus"
    command = ("synth", str(target), "--model", model_folder, "--prompts", prompts, *SYNTH)
    write_text = Path.write_text

    def full(self: Path, text: str, **options: Any) -> int:
        if self.name.startswith(".answers-00001"):
            raise OSError(28, "No space left on device")
        return write_text(self, text, **options)

    monkeypatch.setattr(Path, "write_text", full)
    assert_refused(cli(*command), "disk ran full", "answers-00001.jsonl")
    monkeypatch.undo()
    kept = (target / "answers-00000.jsonl").read_bytes()
    assert [file.name for file in target.glob("*answers*")] == ["answers-00000.jsonl"]
    assert cli(*command).code == 0
    assert (target / "answers-00000.jsonl").read_bytes() == kept
    assert len(list(target.glob("answers-*"))) == 3


def test_a_mix_of_corpora(cli: Cli, recipe: str, corpus: str, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(corpus, other)
    (other / "answers-00002.jsonl").unlink()
    both = f"corpus=[{corpus}, {other}]"
    assert cli("train", recipe, "steps=2", both, "evaluate_prompts=0").code == 0
    made = json.loads((tmp_path / "run" / "view" / "view_config.json").read_text())["provenance"]
    first, second = made["corpus"]["parts"]
    assert [first["folder"], second["folder"]] == made["recipe"]["corpus"] == [corpus, str(other)]
    assert first["dialogues"] > second["dialogues"] > 0
    assert made["corpus"]["dialogues"] == first["dialogues"] + second["dialogues"]
    assert len({first["digest"], second["digest"], made["corpus"]["digest"]}) == 3
    assert_refused(cli("train", recipe, "steps=2", "evaluate_prompts=0"), "other settings (corpus content)")

    manifest = json.loads((other / "manifest.json").read_text())
    manifest["settings"]["base_fingerprint"] = "blake2b:0"
    (other / "manifest.json").write_text(json.dumps(manifest))
    assert_refused(cli("train", recipe, both), "answers of different bases", "blake2b:0")
    (other / "manifest.json").unlink()
    assert_refused(cli("train", recipe, both), "does not say which base answered")
    assert cli("train", recipe, "steps=1", f"corpus={other}", f"output={tmp_path / 'one'}").code == 0


def test_flex_attention_cannot_train_on_a_cpu(
    cli: Cli, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate import PartialState

    monkeypatch.setattr(PartialState(), "device", torch.device("cpu"))
    assert_refused(cli("train", recipe, "attention=flex"), "attention flex cannot train on cpu", "dense")
    assert not (tmp_path / "run").exists()
