"""Laws of decoding that hold for any input; each against the plainest code that could say the same."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny import tiny_dual, tiny_prompt
from tests.ways import DRAFTING
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from orthrus.config import DecodeConfig, SamplingParams, Strategy
from orthrus.decoding.stopping import StopStrings
from orthrus.engine.detokenize import Detokenizer
from orthrus.engine.stream import TokenStream
from orthrus.model.passes import Pass, ar_step, draft_block, prefill, verify_chain

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


def ar_rows_stay_clean(p: Pass, lengths: list[int]) -> None:
    for b, length in enumerate(lengths):
        slots = p.slots_BT[b].tolist()
        clean = set(range(length)) | set(slots[: p.num_ar_rows])
        for row in range(p.num_ar_rows):
            seen = set(p.visible_BTS[b, row].nonzero()[:, 0].tolist())
            assert seen <= clean
            # And nothing that comes after it: AR rows are causal.
            assert seen == set(range(slots[row] + 1))
        for row in range(p.num_ar_rows, p.num_rows):
            seen = set(p.visible_BTS[b, row].nonzero()[:, 0].tolist())
            assert not seen & set(slots[: p.num_ar_rows]), (
                "the block reads history strictly before the anchor"
            )


@few
@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=4),
    block_size=st.integers(2, 12),
    floor=st.booleans(),
    num_rows=st.integers(1, 6),
)
def test_ar_rows_never_see_diffusion_rows(
    lengths: list[int], block_size: int, floor: bool, num_rows: int
) -> None:
    ids_BT = torch.ones(len(lengths), num_rows, dtype=torch.long)
    passes = [
        prefill(ids_BT, lengths),
        ar_step(ids_BT[:, :1], lengths),
        verify_chain(ids_BT, lengths),
        draft_block(ids_BT[:, :1], lengths, block_size, 0, floor=floor),
    ]
    for p in passes:
        p.check(lengths)
        ar_rows_stay_clean(p, lengths)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    pieces=st.lists(st.text("ab", max_size=4), max_size=10),
    stop=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3).map(tuple),
)
def test_stop_strings_cut_as_if_all_text_were_joined(pieces: list[str], stop: tuple[str, ...]) -> None:
    watch, shown = StopStrings(stop), ""
    joined = ""
    for piece in pieces:
        joined += piece
        found = [at for s in stop if (at := joined.find(s)) >= 0]
        text, complete = watch.push(piece)
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
        def decode(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:
            lengths.append(len(token_ids))
            return byte_tokenizer().decode(token_ids, skip_special_tokens=skip_special_tokens)

    detokenizer = Detokenizer(Counting())
    for token_id in byte_tokenizer()("".join(TEXTS) * 5)["input_ids"]:
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
    result = TokenStream(
        dual, tiny_prompt(7, seed), config, eos_token_ids=frozenset(), context_length=256
    ).drain()
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
    result = TokenStream(
        noise_view(0), tiny_prompt(7), config, eos_token_ids=frozenset(), context_length=256
    ).drain()
    assert result.stats.tokens_per_forward < 1.0


@pytest.mark.parametrize("ids", [[], [0], [1, 2]])
def test_nothing_but_special_tokens_is_no_text(ids: list[int]) -> None:
    assert "".join(pieces_of(ids)) == ""
