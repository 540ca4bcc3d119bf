"""Prompt files: what is read, what is refused, and in which words."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from orthrus.base.bench_prompts import DOMAINS, BenchPrompt, load_prompts
from orthrus.errors import UserInputError


def write(folder: Path, *records: object) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in records) + "\n", encoding="utf-8")
    return path


def test_forty_prompts_are_built_in() -> None:
    prompts = load_prompts()

    assert len({str(p.prompt) for p in prompts}) == 40
    assert {d: sum(p.domain == d for p in prompts) for d in DOMAINS} == dict.fromkeys(DOMAINS, 8)


def test_the_limit_counts_per_domain() -> None:
    prompts = load_prompts(None, ("math", "code"), 3)

    assert [p.domain for p in prompts] == ["math"] * 3 + ["code"] * 3
    assert prompts == load_prompts(None, ("code", "math"))[:3] + load_prompts(None, ("code",), 3)


def test_three_forms_of_a_line(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    path = write(
        tmp_path, {"prompt": "one"}, {"messages": messages, "domain": "chat"}, {"turns": ["first", "second"]}
    )

    assert load_prompts(path) == [
        BenchPrompt("one", "other"),
        BenchPrompt(messages, "chat"),
        BenchPrompt("first", "other"),
    ]


def test_turns_are_asked_where_a_task_keeps_a_prompt_of_its_own_beside_them(tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": "def f():", "turns": ["Complete f."], "domain": "code"})

    assert load_prompts(path) == [BenchPrompt("Complete f.", "code")]


def test_line_separators_inside_a_prompt_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "one\u2028two"}\r\n\r\n{"prompt": "three"}', encoding="utf-8")

    assert [p.prompt for p in load_prompts(path)] == ["one\u2028two", "three"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{nonsense", "line 2: no valid JSON"),
        ("[1]", "line 2: each line must be a JSON object"),
        ('{"text": "x"}', "line 2: give exactly one of"),
        ('{"prompt": "x", "messages": []}', "line 2: give exactly one of"),
        ('{"turns": ["x"], "messages": []}', "line 2: give exactly one of"),
        ('{"prompt": "  "}', "line 2: 'prompt' must hold some text"),
        ('{"turns": []}', "line 2: 'turns' must hold some text"),
        ('{"messages": [{"role": "user"}]}', "line 2: 'messages' must be a list"),
        ('{"messages": []}', "line 2: 'messages' must be a list"),
        ('{"prompt": "x", "domain": 3}', "line 2: 'domain' must be a printable text"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line + "\n", encoding="utf-8")

    with pytest.raises(UserInputError) as caught:
        load_prompts(path)
    assert str(path) in str(caught.value)
    assert said in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe4"}')
    for name, said in (
        ("none.jsonl", "No such file"),
        ("empty.jsonl", "no prompts"),
        ("latin.jsonl", "UTF-8"),
    ):
        with pytest.raises(UserInputError, match=said):
            load_prompts(tmp_path / name)


def test_wrong_choices() -> None:
    with pytest.raises(UserInputError, match="no prompt belongs to domain 'maths'; there are chat, code"):
        load_prompts(None, ("maths",))
    with pytest.raises(UserInputError, match="at least 1"):
        load_prompts(None, (), 0)


def test_prompts_need_no_torch() -> None:
    code = (
        "import sys; from orthrus.base.bench_prompts import load_prompts; load_prompts(); "
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
