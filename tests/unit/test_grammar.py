"""Masks of grammars: on paths as after the same tokens committed, forced tokens, and what is refused."""

import json
import random
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from orthrus.config import Grammar
from orthrus.decoding import grammar as module
from orthrus.decoding.grammar import GrammarCompiler, GrammarState
from orthrus.errors import MissingExtraError, UnsupportedModelError, UserInputError

EOS, OTHER_EOS = 0, 1
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["alpha", "beta", "gamma"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "age", "kind", "tags"],
    "additionalProperties": False,
}
GRAMMARS = {
    "json_schema": Grammar("json_schema", json.dumps(SCHEMA)),
    "json_object": Grammar("json_object"),
    "regex": Grammar("regex", r"(yes|no)( (yes|no)){2,4}!?"),
    "lark": Grammar("lark", 'start: sum\nsum: /[0-9]{1,3}/ | "(" sum " + " sum ")"'),
}


def tokenizer() -> Any:
    """Byte-level BPE with merges across quotes and blanks, and two tokens that end a text."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    made.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<end>", "<stop>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [
        json.dumps({"name": "a" * i, "age": i, "kind": "alpha", "tags": [True, False]}) for i in range(40)
    ]
    made.train_from_iterator([*texts, "yes no yes! (12 + 7)", "alphabet beta gamma gammas"], trainer)
    return SimpleNamespace(backend_tokenizer=made)


TOKENIZER = tokenizer()
NUM_IDS = TOKENIZER.backend_tokenizer.get_vocab_size()
# Logits of real models often have more places than the tokenizer has ids.
VOCAB = NUM_IDS + 37
COMPILER = GrammarCompiler(TOKENIZER, {EOS, OTHER_EOS}, VOCAB)


def text_of(token_ids: list[int]) -> str:
    return str(TOKENIZER.backend_tokenizer.decode(token_ids))


def draw(mask_V: torch.Tensor, rng: random.Random) -> int:
    """Any allowed token; ends are taken at once, so that texts stay short."""
    allowed = mask_V.nonzero()[:, 0].tolist()
    ends = [token_id for token_id in allowed if token_id in (EOS, OTHER_EOS)]
    return rng.choice(ends or allowed)


def after(grammar: Grammar, token_ids: list[int], *, asking: bool = True) -> GrammarState:
    """A state of its own, taken there token by token, with or without a look at the masks between."""
    state = COMPILER.state(grammar)
    for token_id in token_ids:
        if asking:
            state.mask()
            state.forced(3)
        state.advance(token_id)
    return state


def finished(grammar: Grammar, seed: int, most: int = 400) -> list[int]:
    rng, state, token_ids = random.Random(seed), COMPILER.state(grammar), list[int]()
    while len(token_ids) < most:
        token_ids.append(draw(state.mask(), rng))
        state.advance(token_ids[-1])
        if token_ids[-1] in (EOS, OTHER_EOS):
            assert state.done
            return token_ids
    return token_ids


@pytest.mark.parametrize("seed", range(12))
def test_texts_at_random_are_what_the_grammar_says(seed: int) -> None:
    found = json.loads(text_of(finished(GRAMMARS["json_schema"], seed)[:-1]))
    assert list(found) == ["name", "age", "kind", "tags"]
    assert isinstance(found["name"], str)
    assert len(found["name"]) <= 8
    assert type(found["age"]) is int
    assert 0 <= found["age"] <= 150
    assert found["kind"] in ("alpha", "beta", "gamma")
    assert len(found["tags"]) <= 3
    assert all(type(tag) is bool for tag in found["tags"])
    assert re.fullmatch(GRAMMARS["regex"].text, text_of(finished(GRAMMARS["regex"], seed)[:-1]))
    total = text_of(finished(GRAMMARS["lark"], seed, 60))
    assert re.match(r"[0-9(]", total)


@pytest.mark.parametrize("name", GRAMMARS)
@pytest.mark.parametrize("seed", range(4))
def test_masks_on_paths_are_those_after_the_same_tokens(name: str, seed: int) -> None:
    """Trees of allowed, forbidden and impossible tokens, at every place of a text."""
    rng, committed = random.Random(seed), list[int]()
    state = COMPILER.state(GRAMMARS[name])
    num_allowed = num_forbidden = 0
    for _ in range(7):
        parents, token_ids, states = [], [], [after(GRAMMARS[name], committed)]
        for _ in range(14):
            parent = rng.randrange(len(states))
            known = states[parent]
            token_id = rng.randrange(-1, VOCAB + 1)
            if known is not None and rng.random() < 0.8:
                token_id = draw(known.mask(), rng)
            ids = [token_id]
            row = parent
            while row:
                ids.append(token_ids[row - 1])
                row = parents[row - 1]
            child = None
            # Nothing follows an end.
            over = parent > 0 and token_ids[parent - 1] in (EOS, OTHER_EOS)
            if known is not None and not over and 0 <= token_id < VOCAB and known.mask()[token_id]:
                child = after(GRAMMARS[name], [*committed, *ids[::-1]], asking=rng.random() < 0.5)
            parents.append(parent)
            token_ids.append(token_id)
            states.append(child)
        masks_RV, allowed = state.masks_for_paths(parents, token_ids)
        assert allowed == [child is not None for child in states[1:]]
        num_allowed, num_forbidden = num_allowed + sum(allowed), num_forbidden + allowed.count(False)
        for mask_V, known in zip(masks_RV, states, strict=True):
            if known is not None:
                assert torch.equal(mask_V, known.mask())
            assert mask_V.any()
        assert torch.equal(state.mask(), states[0].mask())
        committed.append(draw(state.mask(), rng))
        state.advance(committed[-1])
        if committed[-1] in (EOS, OTHER_EOS):
            break
    assert num_allowed
    assert num_forbidden


@pytest.mark.parametrize("name", GRAMMARS)
def test_forced_tokens_are_the_argmax_of_any_logits(name: str) -> None:
    generator, num_forced = torch.Generator().manual_seed(0), 0
    for seed in range(4):
        token_ids = finished(GRAMMARS[name], seed, 60)
        state = COMPILER.state(GRAMMARS[name])
        for token_id in token_ids:
            forced = state.forced(5)
            assert len(forced) <= 5
            assert state.forced(2) == forced[:2]
            _walk(state, forced, generator)
            num_forced += len(forced)
            state.advance(token_id)
        if token_ids[-1] in (EOS, OTHER_EOS):
            assert state.forced(4) == []
    assert num_forced or name in ("json_object", "lark")


def _walk(state: GrammarState, forced: list[int], generator: torch.Generator) -> None:
    """Along the forced tokens every row of logits chooses them; after the last one there is a choice."""
    parents = list(range(len(forced)))
    masks_RV, allowed = state.masks_for_paths(parents, forced)
    assert all(allowed)
    for mask_V, token_id in zip(masks_RV, forced, strict=False):
        logits_V = torch.randn(VOCAB, generator=generator) * 50
        assert int(logits_V.masked_fill(~mask_V, -torch.inf).argmax()) == token_id
    if len(forced) < 5:
        assert int(masks_RV[-1].count_nonzero()) > 1


def test_an_end_is_allowed_exactly_where_the_text_is_complete() -> None:
    state = COMPILER.state(Grammar("regex", "(ab)+"))
    ids = TOKENIZER.backend_tokenizer.get_vocab()
    for letter, ends in (("a", False), ("b", True), ("a", False), ("b", True)):
        state.advance(ids[letter])
        assert state.mask()[[EOS, OTHER_EOS]].tolist() == [ends, ends]
        assert not state.done
        with pytest.raises(UserInputError, match="breaks the grammar"):
            state.advance(ids["!"])
    assert not state.mask()[NUM_IDS:].any()
    masks_RV, allowed = state.masks_for_paths([0, 1], [EOS, ids["a"]])
    assert allowed == [True, False]
    assert masks_RV[1].nonzero()[:, 0].tolist() == [EOS, OTHER_EOS]
    state.advance(OTHER_EOS)
    assert state.done
    assert state.mask().nonzero()[:, 0].tolist() == [EOS, OTHER_EOS]
    assert state.masks_for_paths([0], [ids["a"]])[1] == [False]
    # One way to end only: then the end is forced as well.
    single = GrammarCompiler(TOKENIZER, {EOS}, VOCAB).state(Grammar("regex", "!"))
    assert single.forced(9) == [ids["!"], EOS]
    assert not single.done


def test_a_path_that_is_too_complex_is_pruned_and_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The matcher fails for good somewhere below the root: everything else is as ever."""
    grammar, ids = Grammar("regex", "[ab]{1,9}"), TOKENIZER.backend_tokenizer.get_vocab()
    a, b = ids["a"], ids["b"]
    state, sound = COMPILER.state(grammar), COMPILER.state(grammar)
    state.advance(a)
    sound.advance(a)

    class Failing:
        """Like the real one, but `b` after two tokens of a path ends in an error state."""

        def __init__(self, real: Any) -> None:
            self.real, self.depth, self.broken = real, 0, False

        def __getattr__(self, name: str) -> Any:
            return getattr(self.real, name)

        def is_error(self) -> bool:
            return self.broken

        def consume_token(self, token_id: int) -> bool:
            self.depth += 1
            self.broken = self.broken or (token_id == b and self.depth == 3)
            return not self.broken and self.real.consume_token(token_id)

        def rollback(self, num: int) -> bool:
            self.depth -= num
            return not self.broken and self.real.rollback(num)

    state._matcher = Failing(state._matcher)  # type: ignore[assignment]
    parents, tokens = [0, 1, 2, 2, 1, 0], [a, a, b, a, b, b]
    masks_RV, allowed = state.masks_for_paths(parents, tokens)
    assert allowed == [True, True, False, True, True, True]
    expected_RV, _ = sound.masks_for_paths(parents, tokens)
    kept = [0, 1, 2, 4, 5, 6]
    assert torch.equal(masks_RV[kept], expected_RV[kept])
    assert torch.equal(state.mask(), sound.mask())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["json_schema", "json_object"])
def test_compact_json_has_no_blanks_between_its_parts(kind: str, seed: int) -> None:
    compact = Grammar(GRAMMARS[kind].kind, GRAMMARS[kind].text, compact=True)
    text = text_of(finished(compact, seed)[:-1])
    assert text == "".join(_without_blanks(text))
    json.loads(text)


def _without_blanks(text: str) -> Iterator[str]:
    """JSON without what stands between its parts, which json.dumps would write otherwise."""
    inside = False
    for at, char in enumerate(text):
        if char == '"' and (len(text[:at]) - len(text[:at].rstrip("\\"))) % 2 == 0:
            inside = not inside
        if inside or not char.isspace():
            yield char


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (Grammar("regex", "[0-9"), "the regex grammar cannot be used: unclosed character class; correct"),
        (Grammar("regex", "(?=a)b"), "look-around, including look-ahead"),
        (Grammar("lark", "start: foo"), 'the lark grammar cannot be used: .*unknown name: "foo"'),
        (Grammar("lark", "no rules"), "the lark grammar cannot be used"),
        (Grammar("lark", "start: " + "(" * 20_000), "the lark grammar cannot be used"),
        (Grammar("json_schema", '{"type": "strin"}'), "Invalid type: strin"),
        (Grammar("json_schema", '{"not": {}}'), "the json_schema grammar cannot be used"),
        (Grammar("json_schema", '{"enum": []}'), "Unsatisfiable schema"),
        (Grammar("json_schema", '{"$ref": "http://a/b"}'), "http://a/b"),
        (Grammar("json_schema", '{"type": "string", "pattern": "("}'), "unclosed group"),
    ],
)
def test_grammars_that_do_not_work_are_refused_in_a_sentence(grammar: Grammar, message: str) -> None:
    with pytest.raises(UserInputError, match=message) as caught:
        COMPILER.state(grammar)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_grammar_that_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "COMPILE_SECONDS", 0.05)
    wait, asked = threading.Event(), []
    compiler = GrammarCompiler(TOKENIZER, {EOS, OTHER_EOS}, VOCAB)

    def compile_for_ever(self: GrammarCompiler, grammar: Grammar) -> object:
        asked.append(grammar.text)
        return wait.wait(10)

    monkeypatch.setattr(GrammarCompiler, "_matcher", compile_for_ever)
    # The second time it is refused at once.
    for _ in range(2):
        with pytest.raises(UserInputError, match=r"did not compile within 0\.05 s; simplify it"):
            compiler.state(Grammar("regex", "never seen"))
    assert asked == ["never seen"]
    # What was given up goes on, and only so many may.
    for number in range(1, module.MOST_COMPILING):
        with pytest.raises(UserInputError, match="did not compile"):
            compiler.state(Grammar("regex", f"never seen {number}"))
    with pytest.raises(UserInputError, match="keep the compiler busy; try again"):
        compiler.state(Grammar("regex", "one more"))
    wait.set()
    assert len(asked) == module.MOST_COMPILING


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rules", "references"])
def test_long_rows_of_names_do_not_end_the_process(kind: str) -> None:
    """They are followed by recursion, which ends a process where the stack is too small."""
    code = f"""
import json
from tests.unit.test_grammar import COMPILER
from orthrus.config import LONGEST_GRAMMAR, Grammar
from orthrus.errors import UserInputError
n = LONGEST_GRAMMAR // 40
if {kind!r} == "rules":
    n = LONGEST_GRAMMAR // 20
    rows = [f'r{{i}}: "a" r{{i + 1}}' for i in range(n)]
    grammar = Grammar("lark", "\\n".join(["start: r0", *rows, f'r{{n}}: "c"']))
else:
    names = {{f"a{{i}}": {{"$ref": f"#/$defs/a{{i + 1}}"}} for i in range(n)}}
    schema = {{"$ref": "#/$defs/a0", "$defs": {{**names, f"a{{n}}": {{}}}}}}
    grammar = Grammar("json_schema", json.dumps(schema))
try:
    COMPILER.state(grammar).mask()
except UserInputError as error:
    print(error)
print("alive")
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.stdout.endswith("alive\n"), found.stderr[-2000:]


def test_many_threads_compile_at_once() -> None:
    compiler = GrammarCompiler(TOKENIZER, {EOS}, VOCAB)
    texts: list[list[int]] = []

    def work(i: int) -> None:
        state, ids = compiler.state(Grammar("regex", f"[a-c]{{4}}{i % 3}!")), list[int]()
        rng = random.Random(i)
        while not ids or ids[-1] != EOS:
            ids.append(draw(state.mask(), rng))
            state.advance(ids[-1])
        texts.append(ids)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(texts) == 12
    assert all(re.fullmatch(r"[a-c]{4}[0-2]!", text_of(ids[:-1])) for ids in texts)


def test_what_a_compiler_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedModelError, match=r"needs the model's tokenizer\.json"):
        GrammarCompiler(object(), {EOS}, VOCAB)
    with pytest.raises(UnsupportedModelError, match="needs a token that ends the text"):
        GrammarCompiler(TOKENIZER, set(), VOCAB)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingExtraError, match=r'run `pip install "orthrus-lm\[grammar\]"`'):
        GrammarCompiler(TOKENIZER, {EOS}, VOCAB)
