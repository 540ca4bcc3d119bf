"""Structured output: under drafts, copies and forced tokens, in company, those of plain constrained decoding."""

import random
import re
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from tests.engines import engine_for, run_all
from tests.tiny import VOCAB, tiny_dual, tiny_prompt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from orthrus.config import STRATEGIES, DecodeConfig, Grammar, SamplingParams, Strategy
from orthrus.decoding import compete as module
from orthrus.decoding.grammar import GrammarCompiler
from orthrus.engine.engine import Engine
from orthrus.engine.request import Request
from orthrus.errors import UserInputError

pytestmark = pytest.mark.usefixtures("made_up_costs")
END = 2
FORMS = (r"(yes|no)( (yes|no)){3,9}", r"[a-f]{4,30}", r"ab(cab){2,12}", r"(a{3}b{3}){1,6}")


def letters() -> Any:
    """A letter a token, in bytes, as llguidance reads them."""
    alphabet = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,!?\u0120"
    names = ["<pad>", "<s>", "</s>", *alphabet][: VOCAB - 1]
    made = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    made.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    made.add_special_tokens(names[:3])
    return SimpleNamespace(backend_tokenizer=made)


TOKENIZER = letters()
COMPILER = GrammarCompiler(TOKENIZER, {END}, VOCAB)
DUAL = tiny_dual("llama", disturb=0.1)


def asked(seed: int, num: int) -> list[tuple[list[int], DecodeConfig]]:
    chance = random.Random(seed)
    asks = []
    for i in range(num):
        config = DecodeConfig(
            max_new_tokens=chance.randint(8, 40),
            strategy=chance.choice(["auto", "auto", "auto", *STRATEGIES]),
            logprobs=chance.choice([None, 2]),
            grammar=chance.choice([None, *(Grammar("regex", form) for form in FORMS)]),
            sampling=SamplingParams(
                temperature=chance.choice([0.0, 0.0, 1.0]),
                seed=chance.randrange(99),
                repetition_penalty=chance.choice([1.0, 1.2]),
            ),
        )
        asks.append(
            (tiny_prompt(chance.choice([3, 20]), seed=100 * seed + i) * chance.choice([1, 3]), config)
        )
    return asks


def submit(engine: Engine, prompt: list[int], config: DecodeConfig) -> Request:
    state = None if config.grammar is None else COMPILER.state(config.grammar)
    return engine.submit(prompt, config, eos_token_ids=frozenset({END}), grammar=state)


def logprobs_of(request: Request) -> list[float]:
    return [p.logprob for cycle in request.cycles for p in cycle.logprobs or ()]


def check(seed: int) -> list[Request]:
    asks = asked(seed, 8)
    engine = engine_for(DUAL)
    requests = [submit(engine, *ask) for ask in asks]
    run_all(engine, requests)
    for request, (prompt, config) in zip(requests, asks, strict=True):
        assert request.failure is None
        alone_engine = engine_for(DUAL)
        alone = submit(alone_engine, prompt, replace(config, strategy="ar"))
        run_all(alone_engine, [alone])
        assert request.token_ids == alone.token_ids
        assert request.finish == alone.finish
        assert logprobs_of(request) == pytest.approx(logprobs_of(alone), abs=1e-4)
        if config.grammar is not None and request.finish == "stop":
            text = TOKENIZER.backend_tokenizer.decode(request.token_ids[:-1])
            assert re.fullmatch(config.grammar.text, text), text
    return requests


def test_constrained_texts_in_company_are_those_of_plain_decoding_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    offered: list[int] = []
    taken: list[int] = []

    def noting(chances: Sequence[Sequence[float]], *prices: Any) -> list[int]:
        won = module.num_winners(chances, *prices)
        offered.append(sum(map(len, chances)))
        taken.append(sum(won))
        return won

    monkeypatch.setattr("orthrus.engine.adaptive.num_winners", noting)
    requests = [request for seed in range(8) for request in check(seed)]
    # The test is not empty: copies and forced tokens were verified and accepted, and some were cut.
    assert sum(taken) > 100
    assert sum(won < num for won, num in zip(taken, offered, strict=True)) > 3
    assert any(0 < won < num for won, num in zip(taken, offered, strict=True))
    assert sum(cycle.num_copied for request in requests for cycle in request.cycles) > 100
    assert sum(request.finish == "stop" and request.config.grammar is not None for request in requests) > 10


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_cycle_has_two_passes_at_most_also_where_a_grammar_takes_all_drafts(strategy: Strategy) -> None:
    config = DecodeConfig(max_new_tokens=40, strategy=strategy, grammar=Grammar("regex", r"[a-f]{40}"))
    engine = engine_for(DUAL)
    request = submit(engine, tiny_prompt(5), config)
    run_all(engine, [request])
    assert len(request.token_ids) == 40
    assert max(cycle.num_passes for cycle in request.cycles) <= 2


def test_no_more_forced_tokens_are_asked_for_than_a_pass_verifies() -> None:
    """Each takes time, and a grammar may force thousands."""
    config = DecodeConfig(max_new_tokens=100, node_budget=6, grammar=Grammar("regex", r"(abcad){30}"))
    state = COMPILER.state(config.grammar)
    engine = engine_for(DUAL)
    request = engine.submit(tiny_prompt(5), config, eos_token_ids=frozenset({END}), grammar=state)
    while not request.closed:
        engine.step()
        assert max(map(len, state._known), default=0) <= 6
    assert len(request.token_ids) == 100
    assert any(cycle.num_accepted == 6 for cycle in request.cycles)


def test_a_request_that_has_ended_keeps_only_its_answer() -> None:
    """A caller may keep thousands."""
    engine = engine_for(DUAL)
    config = DecodeConfig(max_new_tokens=20, sampling=SamplingParams(temperature=1.0, seed=1))
    requests = [
        submit(engine, tiny_prompt(5), replace(config, grammar=grammar))
        for grammar in (None, Grammar("regex", r"[a-f]{30}"))
    ]
    run_all(engine, requests)
    for request in requests:
        assert request.cycles
        assert not request.noise
        kept = (request.drafts, request.next_work, request.copies, request.grammar)
        assert kept == (None, None, None, None)


def test_a_grammar_that_allows_no_first_token_is_refused() -> None:
    with pytest.raises(UserInputError, match="allows no token after 0"):
        COMPILER.state(Grammar("lark", 'start: <[2-2]> "a"'))


def test_a_grammar_that_fails_with_the_prompt_ends_its_own_request_only() -> None:
    class Dead:
        def mask(self) -> Any:
            raise UserInputError("the grammar allows no token after 0 tokens")

    engine = engine_for(DUAL)
    config = DecodeConfig(max_new_tokens=5, grammar=Grammar("regex", "a+"))
    dead = engine.submit(tiny_prompt(5), config, eos_token_ids=frozenset({END}), grammar=Dead())  # type: ignore[arg-type]
    other = submit(engine, tiny_prompt(6), DecodeConfig(max_new_tokens=5))
    run_all(engine, [dead, other])
    assert str(dead.failure) == "the grammar allows no token after 0 tokens"
    assert (other.failure, len(other.token_ids)) == (None, 5)
