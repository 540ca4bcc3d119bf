"""Laws of decoding that hold for any input; each against the plainest code that could say the same."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engines import decode
from tests.tiny import FAMILY_CONFIGS, tiny_dual, tiny_prompt
from tests.ways import DRAFTING
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from orthrus.config import DecodeConfig, SamplingParams, Strategy
from orthrus.decoding.stopping import StopStrings
from orthrus.engine.detokenize import Detokenizer
from orthrus.model.passes import block, causal, join, tree
from orthrus.model.pool import SlotPool, Slots

few = settings(max_examples=60, deadline=None, derandomize=True)

TEXTS = [
    "Hello there, naïve world! ",
    "日本語の文章です。",
    "👩‍👩‍👧 family 🎉🎉",
    "Ünïcödé – “quotes” … ",
    "def f(x):\n    return x\n",
]


@cache
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE: ids 0 to 255 are single bytes, a few hundred merges, three special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<s>", "</s>", "<pad>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@few
@given(
    lengths=st.lists(st.integers(0, 140), min_size=1, max_size=4),
    block_size=st.integers(2, 12),
    data=st.data(),
)
def test_ar_rows_never_read_diffusion_rows_nor_other_requests(
    lengths: list[int], block_size: int, data: Any
) -> None:
    """Whatever parts are joined: what the plan says, slot by slot."""
    pool = SlotPool(FAMILY_CONFIGS["llama"], 16)
    parts = []
    for length in lengths:
        num_rows = data.draw(st.integers(1, 6))
        ids, parents = [1] * num_rows, [data.draw(st.integers(0, i)) for i in range(num_rows - 1)]
        block_rows = data.draw(st.lists(st.integers(0, num_rows - 1), max_size=2))
        part = data.draw(
            st.sampled_from(
                [
                    causal(ids),
                    tree(ids, parents),
                    tree(ids, parents, block_rows, block_size),
                    block(1, block_size),
                ]
            )
        )
        slots = Slots(pool)
        assert slots.reserve(length + part.num_rows)
        slots.commit(length)
        parts.append((part, slots))
    p = join(parts)
    written = p.slots_R.tolist()
    assert len(set(written)) == p.num_rows
    diffusion = set(written[p.num_ar_rows :])
    for span, (part, _) in zip(p.spans, parts, strict=True):
        places = span.places.tolist()
        history, own = set(places[: span.length]), places[span.length :]
        assert history.isdisjoint(written)
        others = {place for other in p.spans if other is not span for place in other.places.tolist()}
        assert others.isdisjoint(places)
        for row in range(part.num_rows):
            tail = range(row + 1) if part.tail_II is None else part.tail_II[row].nonzero()[0]
            seen = history | {own[other] for other in tail}
            if row < part.num_ar:
                assert seen.isdisjoint(diffusion)
            assert len(seen) >= part.offsets[row] + 1 + span.length
            assert own[row] in seen


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    pieces=st.lists(st.text("ab", max_size=4), max_size=10),
    stop=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3).map(tuple),
    num_passed=st.integers(0, 4),
)
def test_stop_strings_cut_as_if_all_text_were_joined(
    pieces: list[str], stop: tuple[str, ...], num_passed: int
) -> None:
    """The first `num_passed` pieces may not end the text: a stop string that ends in them is text."""
    watch, shown = StopStrings(stop), ""
    passed = len("".join(pieces[:num_passed]))
    joined = ""
    for i, piece in enumerate(pieces):
        joined += piece
        found = [
            at
            for s in stop
            for at in range(len(joined) - len(s) + 1)
            if joined.startswith(s, at) and at + len(s) > passed
        ]
        text, complete = watch.push(piece, may_end=i >= num_passed)
        shown += text
        assert complete == bool(found)
        if found:
            assert shown == joined[: min(found)]
            return
        # What is shown can never be taken back by a stop string that ends later.
        held = joined[len(shown) :]
        assert joined.startswith(shown)
        assert not held or any(s.startswith(held) for s in stop)
        assert not any(joined.endswith(s[:n]) and n > len(held) for s in stop for n in range(1, len(s)))
    assert shown + watch.flush() == joined


def pieces_of(ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(byte_tokenizer())
    return [*(detokenizer.push(i) for i in ids), detokenizer.flush()]


@few
@given(ids=st.lists(st.integers(0, 329), max_size=30))
def test_pieces_of_random_ids_add_up_to_the_whole_text(ids: list[int]) -> None:
    """Random bytes too: most of them are no valid UTF-8."""
    pieces = pieces_of(ids)
    assert "".join(pieces) == byte_tokenizer().decode(ids, skip_special_tokens=True)


@few
@given(text=st.text(st.sampled_from("añ日本語🎉👩\u200d é\n"), max_size=20))
def test_no_piece_of_valid_text_holds_half_a_character(text: str) -> None:
    ids = byte_tokenizer()(text)["input_ids"]
    pieces = pieces_of(ids)
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces[:-1])


def test_each_piece_costs_a_short_decoding_however_long_the_text() -> None:
    lengths: list[int] = []

    class Counting:
        all_special_ids = byte_tokenizer().all_special_ids

        def decode(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:
            lengths.append(len(token_ids))
            return byte_tokenizer().decode(token_ids, skip_special_tokens=skip_special_tokens)

    detokenizer = Detokenizer(Counting())
    ids = byte_tokenizer()("".join(TEXTS) * 5)["input_ids"]
    # A model that is not to end may repeat its end for long.
    for token_id in [*ids, *[byte_tokenizer().all_special_ids[0]] * 50, *ids]:
        detokenizer.push(token_id)
    assert max(lengths) <= 10


def test_characters_of_several_tokens_come_with_their_last_one() -> None:
    tokenizer = byte_tokenizer()
    ids = [tokenizer.convert_tokens_to_ids(c) for c in "ðŁĺĢ"]
    assert None not in ids
    assert pieces_of([*ids, ids[0]]) == ["", "", "", "😀", "", "\ufffd"]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 5),
    twin_seed=st.integers(0, 100),
    max_new_tokens=st.integers(1, 20),
    block_size=st.integers(2, 8),
    temperature=st.sampled_from([0.0, 1.0]),
    strategy=st.sampled_from([strategy for strategy, floor in DRAFTING if floor]),
)
def test_with_floor_every_pass_commits_at_least_one_token(
    seed: int, twin_seed: int, max_new_tokens: int, block_size: int, temperature: float, strategy: Strategy
) -> None:
    """Even with twins that are noise, and then with far more passes that failed than drafts that held."""
    dual = noise_view(twin_seed)
    config = DecodeConfig(max_new_tokens=max_new_tokens, block_size=block_size, strategy=strategy)
    if temperature:
        config = sampled(config, temperature, seed)
    result = decode(dual, tiny_prompt(7, seed), config)
    assert len(result.token_ids) == max_new_tokens
    assert all(len(c.token_ids) >= c.num_passes for c in result.cycles)
    assert result.stats.tokens_per_forward >= 1.0


def noise_view(seed: int) -> Any:
    dual = _shared_dual()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in dual.view_parameters().values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return dual


@cache
def _shared_dual() -> Any:
    return tiny_dual("llama")


def sampled(config: DecodeConfig, temperature: float, seed: int) -> DecodeConfig:
    return replace(config, sampling=SamplingParams(temperature=temperature, seed=seed))


def test_without_floor_noise_costs_passes() -> None:
    """The other side of the law above: it is the floor that upholds it, and the test can fail."""
    config = DecodeConfig(max_new_tokens=20, strategy="chain", floor=False)
    result = decode(noise_view(0), tiny_prompt(7), config)
    assert result.stats.tokens_per_forward < 1.0


@pytest.mark.parametrize("ids", [[], [0], [1, 2]])
def test_nothing_but_special_tokens_is_no_text(ids: list[int]) -> None:
    assert "".join(pieces_of(ids)) == ""
