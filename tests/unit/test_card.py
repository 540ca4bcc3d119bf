"""Cards: what a reader needs, from settings and provenance, and nothing broken whatever stands in there."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from tests.tiny import tiny_dual

from orthrus.errors import UserInputError
from orthrus.model.card import view_card
from orthrus.model.figures import figures_table, read_figures
from orthrus.training.recipe import TrainConfig, to_plain

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "acceptance-gsm8k-cpu.json"
PROVENANCE: dict[str, Any] = {
    "recipe": to_plain(TrainConfig(num_clean=2, first_target=1, license="apache-2.0")),
    "corpus": {
        "digest": "blake2b:00",
        "dialogues": 1234,
        "answer_tokens": 567890,
        "domains": {"code": 34, "math": 1200},
        "sources": ["the model itself (math)", "prompts.jsonl"],
    },
    "run": {"command": "orthrus train x.yaml", "git_commit": "abc", "versions": {"orthrus": "0.1.0"}},
    "step": 2400,
    "tokens_per_cycle": 2.758,
    "figures": [
        {"set": "gsm8k", "strategy": "chain", "num_prompts": 24, "tokens_per_cycle": 3.649, "note": "a|b"},
        {"set": "humaneval", "strategy": "chain", "num_prompts": 24, "acceptance_rate": 0.1549},
    ],
}


def card(
    base_name: str = "owner/base", *, folder: Any = "view", encoding: Any = "full", **changes: Any
) -> str:
    settings = {"trained": True, "provenance": PROVENANCE} | changes
    dual = tiny_dual(
        "qwen3", mask_token_id=None, **{k: settings.pop(k) for k in ("rank", "twins") if k in settings}
    )
    dual.config = replace(dual.config, base_name=base_name, **settings)
    return view_card(dual, encoding, folder)


def test_a_repair_head_trained_later_leaves_the_twins_their_own_story() -> None:
    recipe = to_plain(TrainConfig(train="repair", init_view="elsewhere", seed=77))
    text = card(provenance={"recipe": recipe, "twins": PROVENANCE, "step": 160})
    first, _, second = text.partition("## Training of the twins")
    assert "| what was trained | repair |" in first
    assert "| seed | 77 |" in first
    assert "| dialogues | 1,234 |" in second
    assert "| steps done | 2,400 |" in second
    assert "what was trained" not in second
    assert "## Training of the twins" not in card()


def test_a_recipe_with_older_names_tells_the_same() -> None:
    older = {"sequence_length": "row_length", "batch_size": "batch_rows", "micro_batch_size": "micro_rows"}
    recipe = {older.get(key, key): value for key, value in PROVENANCE["recipe"].items()}
    text = card(provenance=PROVENANCE | {"recipe": recipe})
    assert text == card()
    assert "| tokens of a sequence | 512 |" in text
    assert "| sequences of a step | 4 |" in text
    assert "texts of up to 512 tokens" in text


def test_the_header_is_what_the_hub_reads() -> None:
    data = ModelCard(card()).data.to_dict()
    assert data["license"] == "apache-2.0"
    assert data["base_model"] == "owner/base"
    assert data["base_model_relation"] == "adapter"
    assert data["library_name"] == "orthrus"
    assert data["pipeline_tag"] == "text-generation"
    assert "block-diffusion" in data["tags"]


@pytest.mark.parametrize(
    ("base_name", "named"),
    [("default", "HuggingFaceTB/SmolLM2-135M-Instruct"), ("/somewhere/base", None), ("", None)],
)
def test_the_header_names_the_base_as_the_hub_knows_it(base_name: str, named: str | None) -> None:
    assert ModelCard(card(base_name)).data.to_dict().get("base_model") == named


def test_the_figures_settings_and_data_are_tables() -> None:
    text = card()
    for line in (
        "| prompt set | strategy | prompts | tokens per cycle | drafts accepted | note |",
        "| gsm8k | chain | 24 | 3.65 |  | a\\|b |",
        "| humaneval | chain | 24 |  | 15.5 % |  |",
        "| dialogues | 1,234 |",
        "| answer tokens | 567,890 |",
        "| by domain | math 1,200, code 34 |",
        "| prompts from | the model itself (math); prompts.jsonl |",
        "| steps done | 2,400 |",
        "| known tokens of a block | 2 |",
        "| smoothing of dpace | 0.5 |",
        "| twins | q_proj, k_proj, v_proj, o_proj, q_norm, k_norm, in full |",
    ):
        assert line in text.splitlines()
    assert "(step 2400), it made 2.76 tokens per cycle" in text
    assert "orthrus train x.yaml` (commit abc, orthrus 0.1.0)" in text
    assert "(new tokens - 1) / cycles" in text
    # What was not used is not worth a line.
    assert "gamma" not in text
    assert "show their token" not in text
    assert "texts of up to 512 tokens" in text


def test_tables_have_as_many_cells_in_every_row() -> None:
    for block in card(encoding="delta4").split("\n\n"):
        lines = block.splitlines()
        if lines[0].startswith("|"):
            assert len({line.replace("\\|", "").count("|") for line in lines}) == 1, block


@pytest.mark.parametrize(
    ("provenance", "said"),
    [
        ({}, "None was stated for the view"),
        ({"recipe": {"license": None}}, "None was stated"),
        ({"recipe": {"license": "mit"}}, "The view: mit."),
        ({"recipe": {"license": "mit"}, "license": "apache-2.0"}, "The view: apache-2.0."),
    ],
)
def test_the_licence_is_what_was_stated_last_or_none(provenance: dict[str, Any], said: str) -> None:
    text = card(provenance=provenance)
    assert said in text
    assert ("license" in ModelCard(text).data.to_dict()) == ("None" not in said)


def test_an_untrained_view_says_so_and_shows_no_training() -> None:
    text = card(trained=False, provenance={})
    assert "**Not trained**" in text
    assert not any(head in text for head in ("## Training", "## Measured"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rank": 4}, "q_proj, k_proj, v_proj, o_proj, of rank 4; q_norm, k_norm, in full"),
        ({"rank": 4, "twins": ("q_proj", "v_proj")}, "| twins | q_proj, v_proj, of rank 4 |"),
        ({"rank": 4, "encoding": "delta4"}, "| weights stored | in float32 |"),
        ({"encoding": "delta4"}, "4-bit differences"),
        ({"folder": "merged"}, 'Orthrus.load("path/to/this/folder")'),
        ({"folder": "merged"}, "AutoModelForCausalLM.from_pretrained"),
        ({"folder": "released"}, "orthrus.OrthrusForCausalLM.from_pretrained"),
        ({"folder": "view"}, 'Orthrus.load("owner/base", view="path/to/this/folder")'),
    ],
)
def test_every_kind_of_view_and_folder_is_told_apart(settings: dict[str, Any], said: str) -> None:
    assert said in card(**settings)


@pytest.mark.parametrize(
    "provenance",
    [
        {"recipe": "x", "corpus": [1], "run": 3, "figures": "good", "tokens_per_cycle": None, "step": {}},
        {"recipe": {"loss": None}, "corpus": {"domains": []}, "run": {"command": "c"}, "figures": [[]]},
    ],
)
def test_free_form_provenance_breaks_nothing(provenance: dict[str, Any]) -> None:
    assert "## Measured" not in card(provenance=provenance)


def test_figures_come_from_a_list_or_from_a_benchmark_result(tmp_path: Path) -> None:
    rows = read_figures(RESULTS)
    assert [(row["set"], row["strategy"]) for row in rows] == [("gsm8k", "chain"), ("gsm8k", "tree")]
    assert "| gsm8k | chain | 24 | 3,072 | 4.20 |" in figures_table(rows)
    file = tmp_path / "figures.json"
    file.write_text(json.dumps(PROVENANCE["figures"]))
    assert read_figures(file) == PROVENANCE["figures"]


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", "[1]", '[{"a": [1]}]', '{"results": {"a": 1}}', '{"results": {"a": {"b": 1}}}', "[{}]"],
)
def test_what_holds_no_figures_is_refused(content: str, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    file.write_text(content)
    with pytest.raises(UserInputError, match=r"figures\.json"):
        read_figures(file)
    with pytest.raises(UserInputError, match="cannot be read"):
        read_figures(tmp_path / "absent.json")
