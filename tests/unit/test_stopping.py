"""Ends of a text inside a block: end-of-sequence ids, stop strings, and the exact token limit."""

import pytest
from tests.tiny import tiny_dual, tiny_prompt

from orthrus.config import DecodeConfig, Strategy
from orthrus.decoding.stopping import StopRules, StopStrings
from orthrus.engine.stream import TokenStream
from orthrus.errors import UserInputError
from orthrus.types import GenerationResult

PROMPT = tiny_prompt(9)
# Twins that equal the base: blocks are accepted in part, so ends fall on drafts, heads and corrections.
DUAL = tiny_dual("llama", disturb=0.1)
BLOCK_SIZE = DUAL.config.block_size
CHAINS = [("chain", True), ("chain", False)]
EVERY = pytest.mark.parametrize(("strategy", "floor"), [("ar", True), *CHAINS])


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
    return TokenStream(
        DUAL, PROMPT, config, eos_token_ids=eos, context_length=256, tokenizer=tokenizer
    ).drain()


FREE = decode("ar").token_ids
TEXT = Letters().decode(list(FREE))


def first_at(token_id: int) -> int:
    return FREE.index(token_id)


def test_the_text_of_this_file_has_drafts_that_hit() -> None:
    result = decode()
    assert result.token_ids == FREE
    assert len(set(FREE)) >= 5
    assert 0 < result.stats.num_accepted < result.stats.num_drafted


@EVERY
@pytest.mark.parametrize("token_id", sorted(set(FREE)))
def test_eos_ends_the_text_wherever_in_a_block_it_falls(
    token_id: int, strategy: Strategy, floor: bool
) -> None:
    result = decode(strategy, floor, eos=frozenset({token_id}))
    assert result.token_ids == FREE[: first_at(token_id) + 1]
    assert result.finish_reason == result.cycles[-1].finish_reason == "stop"


@EVERY
def test_several_eos_ids_end_at_whichever_comes_first(strategy: Strategy, floor: bool) -> None:
    late, *others = sorted(set(FREE), key=first_at, reverse=True)
    eos = frozenset({late, others[len(others) // 2]})
    assert decode(strategy, floor, eos=eos).token_ids == FREE[: min(map(first_at, eos)) + 1]


def test_an_accepted_draft_can_be_the_eos() -> None:
    drafts = {t for c in decode().cycles for t, d in zip(c.token_ids, c.is_draft, strict=True) if d}
    assert drafts
    ends = [decode(eos=frozenset({t})).cycles[-1] for t in drafts]
    assert any(cycle.is_draft[-1] for cycle in ends)


@EVERY
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
@EVERY
def test_the_token_limit_is_exact(num_tokens: int, strategy: Strategy, floor: bool) -> None:
    result = decode(strategy, floor, max_new_tokens=num_tokens)
    assert result.token_ids == FREE[:num_tokens]
    assert result.finish_reason == "length"
    assert result.stats.num_tokens == num_tokens
    # Nothing is drafted beyond the limit: such a draft could only be thrown away.
    room = num_tokens
    for cycle in result.cycles:
        assert cycle.num_drafted <= max(0, room - 1 - int(floor))
        room -= len(cycle.token_ids)


@EVERY
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


@pytest.mark.parametrize(("strategy", "floor"), CHAINS)
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


@EVERY
def test_text_held_back_at_the_end_is_shown_after_all(strategy: Strategy, floor: bool) -> None:
    stop = TEXT[-3:] + "!"
    assert decode(strategy, floor, stop=(stop,), tokenizer=Letters()).text == TEXT
    last = FREE[first_at(FREE[-1])]
    ended = decode(strategy, floor, stop=(stop,), tokenizer=Letters(), eos=frozenset({last}))
    assert ended.text == Letters().decode(list(ended.token_ids))


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


def test_stop_strings_without_a_tokenizer_are_refused() -> None:
    with pytest.raises(UserInputError, match="stop strings need a tokenizer"):
        decode(stop=("x",))


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(UserInputError, match="must not be empty"):
        DecodeConfig(stop=("",))


def test_should_stop_sees_every_token_and_may_end_the_text_inside_a_block() -> None:
    seen: list[int] = []

    def after_seven(token_ids: list[int]) -> bool:
        seen.append(len(token_ids))
        return len(token_ids) == 7

    config = DecodeConfig(max_new_tokens=40)
    stream = TokenStream(
        DUAL, PROMPT, config, eos_token_ids=frozenset(), context_length=256, should_stop=after_seven
    )
    result = stream.drain()
    assert result.token_ids == FREE[:7]
    assert seen == list(range(1, 8))
    assert result.finish_reason == "stop"
