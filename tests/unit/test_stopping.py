"""Ends of a text inside a block: end-of-sequence ids, stop strings, and the exact token limit."""

from typing import ClassVar

import pytest
from tests import engines
from tests.tiny import tiny_dual, tiny_prompt
from tests.ways import EVERY_DRAFTING_WAY, EVERY_WAY, WAYS
from tokenizers import AddedToken

from orthrus.config import DecodeConfig, Strategy
from orthrus.decoding.stopping import StopRules, StopStrings, end_ids
from orthrus.errors import UserInputError
from orthrus.types import GenerationResult

PROMPT = tiny_prompt(9)
# Twins that equal the base: blocks are accepted in part, so ends fall on drafts, heads and corrections.
DUAL = tiny_dual("llama", disturb=0.1)
BLOCK_SIZE = DUAL.config.block_size


class Letters:
    """One letter per token, A for 0; two-letter text for ids that are multiples of 5."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:
        return "".join(chr(ord("A") + i) + ("~" if i % 5 == 0 else "") for i in token_ids)


def decode(
    strategy: Strategy = "chain",
    floor: bool = True,
    *,
    eos: frozenset[int] = frozenset(),
    tokenizer: Letters | None = None,
    **options: object,
) -> GenerationResult:
    config = DecodeConfig(**{"max_new_tokens": 40, "strategy": strategy, "floor": floor, **options})  # type: ignore[arg-type]
    return engines.decode(DUAL, PROMPT, config, eos=eos, tokenizer=tokenizer)


FREE = decode("ar").token_ids
TEXT = Letters().decode(list(FREE))


def first_at(token_id: int) -> int:
    return FREE.index(token_id)


def test_the_text_of_this_file_has_drafts_that_hit() -> None:
    result = decode()
    assert result.token_ids == FREE
    assert len(set(FREE)) >= 5
    assert 0 < result.stats.num_accepted < result.stats.num_drafted


@EVERY_WAY
@pytest.mark.parametrize("token_id", sorted(set(FREE)))
def test_eos_ends_the_text_wherever_in_a_block_it_falls(
    token_id: int, strategy: Strategy, floor: bool
) -> None:
    result = decode(strategy, floor, eos=frozenset({token_id}))
    assert result.token_ids == FREE[: first_at(token_id) + 1]
    assert result.finish_reason == result.cycles[-1].finish_reason == "stop"


@EVERY_WAY
def test_several_eos_ids_end_at_whichever_comes_first(strategy: Strategy, floor: bool) -> None:
    late, *others = sorted(set(FREE), key=first_at, reverse=True)
    eos = frozenset({late, others[len(others) // 2]})
    assert decode(strategy, floor, eos=eos).token_ids == FREE[: min(map(first_at, eos)) + 1]


@EVERY_DRAFTING_WAY
def test_an_accepted_draft_can_be_the_eos(strategy: Strategy, floor: bool) -> None:
    cycles = decode(strategy, floor).cycles
    drafts = {t for c in cycles for t, d in zip(c.token_ids, c.is_draft, strict=True) if d}
    assert drafts
    ends = [decode(strategy, floor, eos=frozenset({t})).cycles[-1] for t in drafts]
    assert any(cycle.is_draft[-1] for cycle in ends)


@pytest.mark.parametrize("strategy", [s for s, floor in WAYS if floor and s != "ar"])
def test_an_end_that_the_draft_pass_decides_costs_no_verify_pass(strategy: Strategy) -> None:
    """A prompt whose second new token comes up there for the first time: the head of the first cycle."""
    prompt = next(p for n in range(50) if len({*plain(p := tiny_prompt(9, seed=n))[:2]}) == 2)
    head = plain(prompt)[1]
    config = DecodeConfig(max_new_tokens=40, strategy=strategy)
    result = engines.decode(DUAL, prompt, config, eos=frozenset({head}))
    assert result.token_ids == plain(prompt)[:2]
    last = result.cycles[-1]
    assert (last.token_ids, last.num_passes, last.num_drafted) == ((head,), 1, 0)
    # The limit ends a text there without a draft pass at all; what is no end goes on to be verified.
    free = engines.decode(DUAL, prompt, config)
    assert (free.cycles[1].num_passes, free.cycles[1].token_ids[0]) == (2, head)


def plain(prompt: list[int]) -> tuple[int, ...]:
    config = DecodeConfig(max_new_tokens=40, strategy="ar")
    return engines.decode(DUAL, prompt, config).token_ids


@EVERY_WAY
def test_eos_is_ignored_on_request(strategy: Strategy, floor: bool) -> None:
    result = decode(strategy, floor, eos=frozenset(FREE), ignore_eos=True)
    assert result.token_ids == FREE
    assert result.finish_reason == "length"


def test_id_0_is_an_end_of_sequence_like_any_other() -> None:
    rules = StopRules(frozenset({0}), max_new_tokens=5)
    assert rules.finish_reason(0, 1) == "stop"
    assert rules.finish_reason(1, 4) is None
    assert rules.finish_reason(1, 5) == "length"
    # The last token that may come is still an end of sequence where it is one.
    assert rules.finish_reason(0, 5) == "stop"


@pytest.mark.parametrize("num_tokens", range(1, 2 * BLOCK_SIZE + 2))
@EVERY_WAY
def test_the_token_limit_is_exact(num_tokens: int, strategy: Strategy, floor: bool) -> None:
    result = decode(strategy, floor, max_new_tokens=num_tokens)
    assert result.token_ids == FREE[:num_tokens]
    assert result.finish_reason == "length"
    assert result.stats.num_tokens == num_tokens
    # Nothing is drafted beyond the limit: such a draft could only be thrown away.
    room = num_tokens
    for cycle in result.cycles:
        if strategy in ("chain", "fused"):
            head = int(floor and cycle.num_passes == 2)
            assert cycle.num_drafted <= max(0, room - 1 - head)
        room -= len(cycle.token_ids)


@EVERY_WAY
@pytest.mark.parametrize("length", [1, 2, 3, 7])
@pytest.mark.parametrize("start", [0, 3, 11, 20])
def test_stop_strings_end_across_tokens_and_blocks(
    start: int, length: int, strategy: Strategy, floor: bool
) -> None:
    stop = TEXT[start : start + length]
    result = decode(strategy, floor, stop=(stop,), tokenizer=Letters())
    cut = TEXT.find(stop)
    assert result.text == TEXT[:cut]
    assert result.finish_reason == "stop"
    # The ids end with the token that completed the stop string.
    kept = len(result.token_ids)
    assert stop in Letters().decode(list(FREE[:kept]))
    assert stop not in Letters().decode(list(FREE[: kept - 1]))


@EVERY_DRAFTING_WAY
def test_text_that_may_become_a_stop_string_is_held_back(strategy: Strategy, floor: bool) -> None:
    stop = TEXT[10:17] + "!"
    result = decode(strategy, floor, stop=(stop,), tokenizer=Letters())
    assert result.text == TEXT
    shown = seen_ids = ""
    held = 0
    for cycle in result.cycles[:-1]:
        shown += cycle.text
        seen_ids += Letters().decode(list(cycle.token_ids))
        ends = [n for n in range(1, len(stop)) if seen_ids.endswith(stop[:n])]
        assert shown == seen_ids[: len(seen_ids) - max(ends, default=0)]
        held += bool(ends)
    assert held > 0


@EVERY_WAY
def test_text_held_back_at_the_end_is_shown_after_all(strategy: Strategy, floor: bool) -> None:
    stop = TEXT[-3:] + "!"
    assert decode(strategy, floor, stop=(stop,), tokenizer=Letters()).text == TEXT
    last = FREE[first_at(FREE[-1])]
    ended = decode(strategy, floor, stop=(stop,), tokenizer=Letters(), eos=frozenset({last}))
    assert ended.text == Letters().decode(list(ended.token_ids))


@EVERY_WAY
@pytest.mark.parametrize("least", [1, 4, 9])
def test_a_stop_string_does_not_end_a_text_that_is_too_short(
    least: int, strategy: Strategy, floor: bool
) -> None:
    letters = [Letters().decode([token_id]) for token_id in FREE]
    stop = letters[1]
    last = next(i for i in range(least - 1, len(FREE)) if letters[i] == stop)
    answer = decode(strategy, floor, stop=(stop,), min_tokens=least, tokenizer=Letters())
    assert answer.token_ids == FREE[: last + 1]
    assert answer.text == "".join(letters[:last])


def test_the_earliest_of_two_stop_strings_that_one_piece_completes_wins() -> None:
    watch = StopStrings(("world", "lo w"))
    assert watch.push("hello world") == ("hel", True)


def test_nothing_is_held_back_without_stop_strings() -> None:
    assert StopStrings(()).push("abc") == ("abc", False)


def test_what_was_held_back_comes_at_the_end() -> None:
    watch = StopStrings(("abc",))
    assert watch.push("xxab") == ("xx", False)
    assert watch.flush() == "ab"
    assert watch.flush() == ""


def test_a_special_token_is_found_by_its_name_and_never_shown() -> None:
    watch = StopStrings(("x<|end|>\n",))
    assert watch.push("ax") == ("a", False)
    assert watch.push("<|end|>", hidden=True) == ("", False)
    assert watch.push("b") == ("xb", False)
    watch.push("x")
    watch.push("<|end|>", hidden=True)
    assert watch.push("\nrest") == ("", True)


class WithEnd(Letters):
    """The commonest id of the text is a special token, which decoding leaves out."""

    END = max(set(FREE), key=FREE.count)
    added_tokens_decoder: ClassVar = {END: AddedToken("<|end|>", special=True)}

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:
        return super().decode([i for i in token_ids if i != self.END])


@EVERY_WAY
def test_a_stop_string_may_be_a_special_token(strategy: Strategy, floor: bool) -> None:
    end = first_at(WithEnd.END)
    result = decode(strategy, floor, tokenizer=WithEnd(), stop=("<|end|>",))
    assert result.token_ids == FREE[: end + 1]
    assert result.finish_reason == "stop"
    assert result.text == Letters().decode(list(FREE[:end]))
    free = decode(strategy, floor, tokenizer=WithEnd(), stop=("<|end|>never",))
    assert free.text == decode(strategy, floor, tokenizer=WithEnd()).text


def test_stop_strings_without_a_tokenizer_are_refused() -> None:
    with pytest.raises(UserInputError, match="stop strings need a tokenizer"):
        decode(stop=("x",))


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(UserInputError, match="must not be empty"):
        DecodeConfig(stop=("",))


@EVERY_WAY
def test_should_stop_sees_every_token_and_may_end_the_text_inside_a_block(
    strategy: Strategy, floor: bool
) -> None:
    seen: list[int] = []

    def after_seven(token_ids: list[int]) -> bool:
        seen.append(len(token_ids))
        return len(token_ids) == 7

    config = DecodeConfig(max_new_tokens=40, strategy=strategy, floor=floor)
    engine = engines.engine_for(DUAL)
    request = engine.submit(PROMPT, config, eos_token_ids=frozenset(), should_stop=after_seven)
    engines.run_all(engine, [request])
    assert request.token_ids == list(FREE[:7])
    assert seen == list(range(1, 8))
    assert request.finish == "stop"


def test_what_ends_a_text_is_the_models_own_tokens_and_those_asked_for() -> None:
    eos = frozenset({2})
    assert end_ids(DecodeConfig(), eos, 10) == {2}
    assert end_ids(DecodeConfig(stop_token_ids=(5, 2)), eos, 10) == {2, 5}
    assert end_ids(DecodeConfig(stop_token_ids=(5,), ignore_eos=True), eos, 10) == {5}
    with pytest.raises(UserInputError, match=r"names token 10, but the model's ids end at 9"):
        end_ids(DecodeConfig(stop_token_ids=(9, 10)), eos, 10)
