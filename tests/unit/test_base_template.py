"""Chat templates run within bounds, and what goes wrong inside them is one sentence."""

import time

import pytest
from tests.cli.conftest import byte_tokenizer

from orthrus.base import template
from orthrus.base.template import render
from orthrus.errors import UserInputError

VALUES = {"messages": [{"role": "user", "content": "hi"}] * 3, "add_generation_prompt": True}
GROWS = "{% set ns = namespace(s='ab', l=[1]) %}{% for a in range(60) %}BODY{% endfor %}"


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10**10 }}",
        "{{ [[1] * 1000] * 1000000 }}",
        "{{ 2 ** (10 ** 9) }}",
        "{{ 'a'.center(10**10) }}",
        "{{ 'a'|center(10**10) }}",
        "{{ 'a'|indent(10**10) }}",
        "{{ '%999999999d' % 1 }}",
        "{{ '%999999999d'|format(1) }}",
        "{{ '{:999999999}'.format(1) }}",
        "{{ '{:{w}}'.format(1, w=999999999) }}",
        "{{ 'a'.replace('', 'b' * 100000).replace('', 'b' * 100000) }}",
        "{{ (['a' * 1000000] * 1000)|join }}",
        "{{ range(99999)|map('string')|join('a' * 100000) }}",
        "{{ 'a\tb'.expandtabs(10**9) }}",
        "{{ messages|tojson(indent=999999) }}",
        "{{ lipsum(100000) }}",
        "{% for a in range(99999) %}{{ 'a' * 100000 }}{% endfor %}",
        "{% set x %}{% for a in range(99999) %}{{ 'a' * 100000 }}{% endfor %}{% endset %}",
        GROWS.replace("BODY", "{% set ns.s = ns.s + ns.s %}"),
        GROWS.replace("BODY", "{% set ns.s = ns.s ~ ns.s %}"),
        GROWS.replace("BODY", "{% set ns.l = [ns.l, ns.l] %}") + "{{ ns.l }}",
        GROWS.replace("BODY", "{% set ns.l = [ns.l, ns.l] %}") + "{{ ns.l|tojson }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ messages[99].x.y }}",
        "{{ 1 + 'a' }}",
        "{{ 1 / 0 }}",
        "{{ raise_exception('roles must alternate') }}",
        "{% if %}",
        "{{ ''.__class__.__mro__ }}",
    ],
)
def test_what_a_template_may_not_do_is_one_sentence(source: str) -> None:
    with pytest.raises(
        UserInputError, match=r"^The model's chat template (refuses|fails on) these messages \("
    ):
        render(source, VALUES)


def test_a_template_has_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template, "SECONDS", 0.3)
    start = time.monotonic()
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(UserInputError, match="longer than"):
        render(loops, VALUES)
    assert time.monotonic() - start < 60


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{{ m.role ~ ':' ~ m['content'] + '\n' }}{% endfor %}",
        "{%- for m in messages -%}\n {{ loop.index0 % 2 }}{{ m.content|trim|upper }}{{ '%s!' % m.role }}\n{% endfor %}",
        "{% macro f(m) %}{{ m|tojson }}{% endmacro %}{% for m in messages %}{{ f(m) }}{% break %}{% endfor %}",
        "{{ bos_token }}{{ [1, none, 'x'] ~ 5 ~ none ~ 'é' }}{{ 'a,b'.split(',')[-1] }}{{ 'ab' * 3 }}{{ [1] + [2] }}",
        "{% generation %}{{ messages[0].content.replace('h', 'H') }}{% endgeneration %}{{ '{}-{:>4}'.format(1, 2) }}",
        "{% set x %}a{{ messages|length }}{% endset %}{{ x }}{% if tools %}no{% endif %}",
        "{{ messages|map(attribute='role')|join(', ') }}",
    ],
)
def test_the_text_is_transformers_own(source: str) -> None:
    tokenizer = byte_tokenizer(source)
    expected = tokenizer.apply_chat_template(VALUES["messages"], tokenize=False, add_generation_prompt=True)
    more = {"tools": None, "documents": None, **tokenizer.special_tokens_map}
    assert render(source, {**VALUES, **more}) == expected
