"""Compiled passes against the stock forward, over all kinds of passes, without compiling anew."""

import random
import resource
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from tests.rows import Rows
from tests.tiny import VOCAB, tiny_dual, tiny_prompt
from tests.tiny_orthrus import tiny_orthrus
from tests.ways import EVERY_WAY
from torch import Tensor, nn

from orthrus.api import Orthrus, decode_config
from orthrus.base.devices import QUANTISED
from orthrus.base.families import decoder_layers
from orthrus.config import Strategy
from orthrus.engine import compiled as compiled_module
from orthrus.engine.compiled import CompiledRunner
from orthrus.engine.layer_code import kind
from orthrus.engine.runners import chosen_runner, make_runner
from orthrus.engine.stock import stock_generate
from orthrus.errors import OrthrusWarning, UnsupportedModelError, UserInputError
from orthrus.model.dual_view import DualView
from orthrus.model.passes import Part, block, causal, tree
from orthrus.model.quantise import quantise, quantise_drafts
from orthrus.model.runner import EagerRunner, Runner

MASK = VOCAB - 1
MAKE = compiled_module.layer_code
# Shared keys; windows in every other layer; fused projections.
FAMILIES = ["llama", "gemma3", "phi3"]


@pytest.fixture(autouse=True)
def never_compile_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """All code is there once a runner is made: whoever asks for more later fails."""
    monkeypatch.setattr(compiled_module, "layer_code", _refuse)


def _refuse(*_: object, **__: object) -> None:
    raise AssertionError("compiled anew")


def compiled(dual: DualView) -> CompiledRunner:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled_module, "layer_code", MAKE)
        runner = make_runner(dual, "compiled")
    assert isinstance(runner, CompiledRunner)
    return runner


def random_parts(seed: int, num: int) -> Iterator[tuple[list[int], Part]]:
    """A history, and a part that follows it."""
    generator = random.Random(seed)

    def ids(num: int) -> list[int]:
        return [generator.randrange(3, MASK) for _ in range(num)]

    for i in range(num):
        history, num_ar = ids(generator.randint(1, 80)), generator.randint(1, 12)
        parents = [generator.randint(max(0, row - 2), row) for row in range(num_ar - 1)]
        size = generator.choice([2, 4, 8])
        rows = [generator.randrange(num_ar) for _ in range(generator.randint(1, 3))]
        token_ids = ids(num_ar)
        yield (
            history,
            (
                tree(token_ids, parents),
                tree(token_ids, parents, rows, size, MASK),
                block(token_ids[0], size, MASK),
                causal(token_ids),
            )[i % 4],
        )


def states(runner: Runner, history: list[int], part: Part) -> list[Tensor]:
    """What a part computes: hidden states, logits, and the keys and values of the history and of its rows."""
    rows = Rows(runner)
    rows.feed(history)
    hidden_IC = rows.hidden(part)
    with torch.inference_mode():
        logits_IV = runner.head(hidden_IC)
    return [hidden_IC, logits_IV, *rows.stored(len(history) + part.num_rows)]


@pytest.mark.parametrize("name", FAMILIES)
def test_compiled_passes_are_the_stock_ones(name: str) -> None:
    dual = tiny_dual(name, disturb=0.3)
    slow, fast = EagerRunner(dual), compiled(dual)
    for history, part in random_parts(seed=1, num=24):
        for stock, ours in zip(states(slow, history, part), states(fast, history, part), strict=True):
            torch.testing.assert_close(ours, stock, atol=5e-5, rtol=5e-5)


def with_compiled(orthrus: Orthrus) -> Orthrus:
    return Orthrus(orthrus.base, orthrus.dual, compiled(orthrus.dual))


@pytest.fixture(scope="module")
def fast_orthrus() -> Orthrus:
    return with_compiled(tiny_orthrus(disturb=0.3))


@EVERY_WAY
def test_text_is_the_stock_models(fast_orthrus: Orthrus, strategy: Strategy, floor: bool) -> None:
    prompt = [5, 9, 14, 23, 7, 31]
    config = decode_config(strategy=strategy, floor=floor, max_new_tokens=60, ignore_eos=True)
    result = fast_orthrus.stream_ids(prompt, config).drain()
    model = fast_orthrus.stock()
    stock = stock_generate(model, prompt, max_new_tokens=60, eos_token_ids=frozenset())
    assert result.token_ids == stock.token_ids
    if strategy != "ar":
        assert result.stats.num_accepted > 5


@EVERY_WAY
def test_text_in_bfloat16_is_that_of_plain_decoding(strategy: Strategy, floor: bool) -> None:
    """By the same runner, token for token: there are no near-ties, since a row is alike in every pass."""
    config = decode_config(strategy=strategy, floor=floor, max_new_tokens=60, ignore_eos=True)
    orthrus = bfloat16_orthrus()
    plain = orthrus.stream_ids([5, 9, 14, 23, 7, 31], replace(config, strategy="ar")).drain()
    result = orthrus.stream_ids([5, 9, 14, 23, 7, 31], config).drain()
    assert result.token_ids == plain.token_ids
    if strategy != "ar":
        assert result.stats.num_accepted > 5


@cache
def bfloat16_orthrus() -> Orthrus:
    return with_compiled(tiny_orthrus(disturb=0.3, dtype=torch.bfloat16))


def test_layers_that_compute_otherwise_are_of_another_kind() -> None:
    # By windows, by whether positions are rotated, by what has a twin.
    for name, variant in (("gemma3", {}), ("smollm3", {}), ("llama", {"layers": (1,)})):
        first, second = decoder_layers(tiny_dual(name, **variant).base)
        assert kind(first) != kind(second)
    first, second = decoder_layers(tiny_dual("llama").base)
    assert kind(first) == kind(second)


def test_two_models_do_not_share_weights() -> None:
    duals = [tiny_dual("llama", seed=seed, disturb=0.3) for seed in (3, 4)]
    first, second = (compiled(dual) for dual in duals)
    slow = EagerRunner(duals[0])
    for history, part in random_parts(seed=2, num=4):
        other, ours, stock = (states(runner, history, part)[1] for runner in (second, first, slow))
        torch.testing.assert_close(ours, stock, atol=5e-5, rtol=5e-5)
        assert (other - ours).abs().max() > 0.1


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("part", [quantise, quantise_drafts])
def test_compiled_quantised(part: object, precision: str) -> None:
    dual = tiny_dual("llama", disturb=0.3)
    part(dual, precision)  # type: ignore[operator]
    fast = compiled(dual)
    slow = EagerRunner(dual, fast.kv_dtype)
    # With weights of few bits, keys and values take half the memory.
    assert fast.kv_dtype == (torch.bfloat16 if part is quantise else torch.float32)
    for history, rows in random_parts(seed=5, num=12):
        for stock, ours in zip(states(slow, history, rows), states(fast, history, rows), strict=True):
            # A value on the edge may be rounded to the next whole number.
            assert (ours - stock).abs().max() < 0.1 * stock.abs().max()
            assert (ours - stock).abs().mean() < 0.01 * stock.abs().mean()


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("float32", name) for name in FAMILIES),
        ("bfloat16", "llama"),
        ("bfloat16", "gemma3"),
        ("int8", "llama"),
        ("int4", "llama"),
    ],
)
def test_compiled_rows_are_alike_to_the_last_bit(kind: str, name: str) -> None:
    """In a tree, beside blocks, with its past scattered over the slots: a row is what it is one by one."""
    runner = compiled_of(kind, name)
    generator, num_compared = random.Random(3), 0
    for _ in range(12):
        length, num_ar = generator.randint(1, 90), generator.randint(2, 12)
        ids = [generator.randrange(3, MASK) for _ in range(length + num_ar)]
        parents = [generator.randint(max(0, row - 2), row) for row in range(num_ar - 1)]
        part = tree(ids[length:], parents, [generator.randrange(num_ar)], 4, MASK)
        together_IV = states(runner, ids[:length], part)[1]
        path = [num_ar - 1]
        while path[0]:
            path.insert(0, parents[path[0] - 1])
        alone = Rows(runner)
        alone.feed(ids[:length])
        for row in path:
            assert torch.equal(alone.feed([ids[length + row]])[0], together_IV[row])
            num_compared += 1
    assert num_compared > 30


def compiled_of(kind: str, name: str = "llama") -> CompiledRunner:
    dual = tiny_dual(name, disturb=0.3)
    if kind in QUANTISED:
        quantise(dual, kind)  # type: ignore[arg-type]
    return compiled(dual.to(torch.bfloat16) if kind == "bfloat16" else dual)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
def test_a_row_of_a_long_chunk_is_what_it_is_one_by_one(kind: str) -> None:
    """Prompts run by the same code as steps, however long: reuse and preemption change no bit."""
    runner, ids = compiled_of(kind), tiny_prompt(150)
    chunked, alone = Rows(runner), Rows(runner)
    together_TV = torch.cat([chunked.feed(ids[:140]), chunked.feed(ids[140:])])
    for row, token_id in enumerate(ids):
        assert torch.equal(alone.feed([token_id])[0], together_TV[row]), row
    assert all(torch.equal(a, b) for a, b in zip(chunked.stored(), alone.stored(), strict=True))


def test_wide_passes_are_compiled_too() -> None:
    """A tree of more rows than a prompt's chunk may have is no prompt."""
    runner = compiled_of("bfloat16")
    history, ids = tiny_prompt(9), tiny_prompt(140, seed=1)
    together_IV = states(runner, history, tree(ids, [0] * 139))[1]
    for row in (1, 70, 139):
        two_IV = states(runner, history, tree([ids[0], ids[row]], [0]))[1]
        assert torch.equal(two_IV[1], together_IV[row])


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_a_pass_writes_its_own_slots_alone() -> None:
    """A store that a layer copied on its way would be written as a whole, whatever little was asked for."""
    runner = compiled(tiny_dual())
    pool = runner.new_pool(1 << 14)
    rows = Rows(runner, pool=pool)
    before = resident_bytes()
    rows.feed(tiny_prompt(40))
    rows.hidden(tree([5, 6, 7], [0, 1], [0, 2], 4, MASK))
    assert resident_bytes() - before < pool.keys[0].nbytes // 4


def test_a_forward_that_leaves_out_layers_is_refused() -> None:
    """Seen when the runner is made, whichever way its layers are asked for; `auto` goes on eagerly."""
    dual = tiny_dual("llama", disturb=0.3)
    dual.base.config.num_hidden_layers -= 1
    with pytest.raises(UnsupportedModelError, match="leaves out layers: run it eagerly"):
        CompiledRunner(dual)
    with pytest.warns(OrthrusWarning, match="leaves out layers"):
        assert make_runner(dual, "auto").name == "eager"


def test_a_forward_that_changes_something_between_layers_is_refused() -> None:
    dual = tiny_dual("llama", disturb=0.3)
    decoder = dual.base.get_decoder()

    class Louder(type(decoder)):  # type: ignore[misc]
        def forward(self, *args: object, **kwargs: object) -> object:
            first = self.layers[0]
            self.layers[0] = _Doubled(first)
            try:
                return super().forward(*args, **kwargs)
            finally:
                self.layers[0] = first

    class _Doubled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *args: object, **kwargs: object) -> Tensor:
            return 2 * self.inner(*args, **kwargs)  # type: ignore[no-any-return]

    decoder.__class__ = Louder
    with pytest.raises(UnsupportedModelError, match="does more than to call its layers in turn"):
        CompiledRunner(dual)


def test_weights_are_packed_when_the_runner_is_made() -> None:
    """What the class says: later changes of the live model are not seen, so nothing half-changed runs."""
    dual = tiny_dual("llama", disturb=0.3)
    runner = compiled(dual)
    history, part = next(random_parts(seed=4, num=1))
    before = states(runner, history, part)
    with torch.no_grad():
        for parameter in dual.base.get_decoder().layers.parameters():
            parameter.zero_()
    assert all(torch.equal(a, b) for a, b in zip(states(runner, history, part), before, strict=True))


def test_wrong_runner_is_one_sentence() -> None:
    with pytest.raises(UserInputError, match="runner must be one of auto, eager, compiled, not 'fast'"):
        make_runner(tiny_dual(), "fast")
    with pytest.raises(UserInputError, match="not 'captured'"):
        chosen_runner("captured")


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.warns(OrthrusWarning, match=r"running eagerly.* needs a C\+\+ compiler"):
        assert make_runner(tiny_dual(), "auto").name == "eager"
    with pytest.raises(UserInputError, match=r"needs a C\+\+ compiler"):
        make_runner(tiny_dual(), "compiled")


def test_auto_goes_on_when_compiling_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no such thing\nand more")

    monkeypatch.setattr(compiled_module, "layer_code", broken)
    with pytest.warns(OrthrusWarning, match="no such thing") as caught:
        runner = make_runner(tiny_dual(), "auto")
    assert runner.name == "eager"
    assert "and more" not in str(caught[0].message)
    assert Rows(runner).feed([3, 4]).isfinite().all()
    with pytest.raises(UserInputError, match=r"compiling failed \(no such thing\)"):
        make_runner(tiny_dual(), "compiled")


def test_eager_is_eager_whatever_was_there_before() -> None:
    """One model, several runners: none leaves a trace on it."""
    dual = tiny_dual("llama", disturb=0.3)
    history, part = next(random_parts(seed=4, num=1))
    before = states(EagerRunner(dual), history, part)
    compiled(dual)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runner = make_runner(dual, "eager")
    assert isinstance(runner, EagerRunner)
    assert all(torch.equal(a, b) for a, b in zip(states(runner, history, part), before, strict=True))
