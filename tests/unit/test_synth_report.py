"""What synth says of a corpus: nothing is missing without a word."""

import json
from pathlib import Path

from orthrus.cli.synth_report import as_text, synth_report
from orthrus.training.corpus import PROMPTS, shard_path, source_path
from orthrus.training.prompt_sources import PromptSource
from orthrus.training.synth import SynthConfig


def write(file: Path, *records: dict[str, object]) -> None:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_what_was_asked_for_and_is_not_there_is_said(tmp_path: Path) -> None:
    write(source_path(tmp_path, 0), {"prompt": "a b", "domain": "math"}, {"prompt": "a b", "domain": "math"})
    prompts = [{"prompt_ids": [1], "domain": "math", "prompt": str(i)} for i in range(3)]
    write(tmp_path / PROMPTS, *prompts)
    two = {"answer_ids": [5, 6, 7, 8], "finished": True, "spans": [[0, 1], [3, 4]]}
    one = {"answer_ids": [5, 6], "finished": False}
    write(shard_path(tmp_path, 0), {"prompt": 0, **two}, {"prompt": 1, **one})
    config = SynthConfig(sources=(PromptSource(domain="math", count=5),), turns=2)
    report = synth_report(tmp_path, config)
    assert (report["begun"], report["made"], report["prompts"], report["dropped"]) == (5, 2, 3, 1)
    assert (report["answers"], report["answers_wanted"], report["answer_tokens"]) == (3, 6, 4)
    text = as_text(report)
    assert "the model made 2 of 5 prompts" in text
    assert "1 answers repeated themselves" in text
    assert (
        "3 of 6 answers were given: a dialogue ends at an answer that was cut off (--max-new-tokens)" in text
    )
    whole = as_text(report | {"made": 5, "dropped": 0, "answers": 6})
    assert whole.count("\n") == 2


def test_dialogues_of_one_turn_say_nothing_of_further_answers(tmp_path: Path) -> None:
    write(tmp_path / PROMPTS, {"prompt_ids": [1], "domain": "math"}, {"prompt_ids": [2], "domain": "math"})
    write(shard_path(tmp_path, 0), {"prompt": 0, "answer_ids": [5], "finished": True})
    config = SynthConfig(sources=(PromptSource(file="prompts.jsonl"),))
    assert "answers were given" not in as_text(synth_report(tmp_path, config))
