"""`orthrus train --plan`: from a config alone, on a machine without a GPU."""

import json
from pathlib import Path
from typing import Any

import pytest

from .conftest import Cli, assert_refused
from .training_files import write_recipe

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
PAPER = {
    "block_size": 32,
    "num_anchors": 256,
    "sequence_length": 2048,
    "batch_size": 128,
    "steps": 0,
    "epochs": 2,
    "weights": "uniform",
    "dtype": "bfloat16",
}


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    """The paper's setting for a folder that holds nothing but a config."""
    folder = tmp_path / "llama-8b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return write_recipe(
        tmp_path / "recipe.yaml",
        **PAPER,
        base=str(folder),
        corpus=str(tmp_path / "none"),
        output=str(tmp_path / "run"),
    )


def test_a_plan_from_a_config_alone(cli: Cli, recipe: str, tmp_path: Path) -> None:
    done = cli("train", recipe, "--plan", "--gpus", "8", "--gpu", "h200", "--corpus-tokens", "1e9")
    assert done.code == 0, done.err
    for words in (
        "plan for llama-8b: computed, not run",
        "8,030,261,248 parameters, bfloat16",
        "1,342,177,280 parameters (16.7%)",
        "8 x h200, ddp: 141.0 GB, 989 TFLOP/s at 40% each",
        "base weights      16.1 GB",
        "optimizer         10.7 GB",
        "128 sequences, 262,144 tokens, at most 1,015,808 targets",
        "7,629 steps",
    ):
        assert words in done.out
    assert not (tmp_path / "run").exists()


def test_a_run_that_does_not_fit_names_the_key(cli: Cli, recipe: str) -> None:
    tight = cli("train", recipe, "--plan", "--gpus", "8", "--gpu-memory", "80")
    assert_refused(tight, "the run needs", "on each GPU, which has 80.0 GB; set activations: layer")
    # The plan is there all the same.
    assert "activations" in tight.err
    assert_refused(cli("train", recipe, "--plan", "--gpu-memory", "3"), "take GPUs with more memory")
    changed = cli("train", recipe, "sharding=fsdp2", "--plan", "--gpus", "8", "--gpu-memory", "80")
    assert changed.code == 0, changed.err
    assert "gathered" in changed.out


def test_a_plan_as_json(cli: Cli, recipe: str) -> None:
    done = cli("train", recipe, "--plan", "--gpus", "8", "--gpu", "H200", "--utilisation", "0.5", "--json")
    report: dict[str, Any] = json.loads(done.out)
    assert report["fits"] is True
    assert report["hours"] is report["steps"] is None
    assert report["bytes"]["total"] == sum(v for k, v in report["bytes"].items() if k != "total")
    assert (report["peak_flops"], report["utilisation"]) == (989e12, 0.5)
    other = json.loads(
        cli(
            "train", recipe, "steps=10", "--plan", "--peak-tflops", "100", "--gpu-memory", "999", "--json"
        ).out
    )
    assert other["steps"] == 10
    assert other["hours"] == pytest.approx(10 * other["flops_per_step"] / (100e12 * 0.4) / 3600)


def test_a_plan_counts_the_sequences_of_a_corpus(cli: Cli, tmp_path: Path, model_folder: str) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "prompts.jsonl").write_text('{"prompt_ids": [5, 6], "domain": "chat"}\n' * 3)
    answers = [{"prompt": i, "answer_ids": [7] * 90, "finished": True} for i in range(3)]
    (corpus / "answers-00000.jsonl").write_text("".join(json.dumps(a) + "\n" for a in answers))
    recipe = write_recipe(tmp_path / "r.yaml", base=model_folder, corpus=str(corpus), steps=0, epochs=4.0)
    done = cli("train", recipe, "--plan")
    assert done.code == 0, done.err
    assert "run           6 steps" in done.out
    assert "plan for" in cli("train", recipe, "--plan", "-m", model_folder).out


def test_options_that_do_nothing_are_refused(cli: Cli, recipe: str) -> None:
    assert_refused(cli("train", recipe, "--gpus", "8"), "--gpus belongs to --plan")
    assert_refused(cli("train", recipe, "--plan", "--gpu", "tpu"), "--gpu knows a100")
    assert_refused(cli("train", recipe, "--plan", "--gpus", "0"), "--gpus must be at least 1")
    assert_refused(cli("train", recipe, "--plan", "--corpus-tokens", "-1"), "--corpus-tokens must be")
    assert_refused(cli("train", recipe, "--plan", "batch_size=4", "--gpus", "8"), "batch_size 4 is less")
