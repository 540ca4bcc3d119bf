"""Compiled passes against the stock forward, over all kinds of passes, without compiling anew."""

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import VOCAB, tiny_dual
from tests.tiny_orthrus import tiny_orthrus
from tests.ways import EVERY_WAY
from torch import Tensor, nn

from orthrus.api import Orthrus, decode_config
from orthrus.base.devices import QUANTISED
from orthrus.base.families import decoder_layers
from orthrus.config import Strategy
from orthrus.engine import compiled as engine
from orthrus.engine.compiled import CompiledRunner
from orthrus.engine.layer_code import kind
from orthrus.engine.probe import stock_generate
from orthrus.engine.runners import use_runner
from orthrus.errors import OrthrusWarning, StorageError, UserInputError
from orthrus.model.attention import folded_heads
from orthrus.model.dual_view import DualView
from orthrus.model.passes import Pass, draft_block, fused, prefill, verify_tree
from orthrus.model.quantise import quantise, quantise_drafts

MASK = VOCAB - 1
MAKE = CompiledRunner._make
# Shared keys; windows in every other layer; fused projections.
FAMILIES = ["llama", "gemma3", "phi3"]


@pytest.fixture(autouse=True)
def never_compile_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """All code is there once `use_runner` is done: whoever asks for more later fails."""
    monkeypatch.setattr("orthrus.engine.compiled.CompiledRunner._make", _refuse)


def _refuse(*_: object) -> None:
    raise AssertionError("compiled anew")


def compiled(dual: DualView) -> DualView:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("orthrus.engine.compiled.CompiledRunner._make", MAKE)
        use_runner(dual, "compiled")
    assert dual.runner == "compiled"
    return dual


def random_passes(seed: int, num: int) -> Iterator[tuple[Tensor, Pass]]:
    """A history, and a pass that follows it."""
    generator = random.Random(seed)
    torch.manual_seed(seed)
    for i in range(num):
        length, num_ar = generator.randint(1, 60), generator.randint(1, 12)
        history_1T, ids_1T = torch.randint(3, MASK, (1, length)), torch.randint(3, MASK, (1, num_ar))
        parents = [generator.randint(max(0, row - 2), row) for row in range(num_ar - 1)]
        size = generator.choice([2, 4, 8])
        rows = [generator.randrange(num_ar) for _ in range(generator.randint(1, 3))]
        yield (
            history_1T,
            (
                verify_tree(ids_1T, parents, [length]),
                fused(ids_1T, parents, [length], rows, size, MASK),
                draft_block(ids_1T[:, :1], [length], size, MASK, floor=False),
                prefill(ids_1T, [length]),
            )[i % 4],
        )


@torch.inference_mode()
def states(dual: DualView, history_1T: Tensor, p: Pass) -> list[Tensor]:
    """What a pass computes: hidden states, logits, and the cache it leaves."""
    cache = dual.new_cache(256)
    dual.run(prefill(history_1T, [0]), cache)
    cache.commit(history_1T.shape[1])
    hidden_BTC = dual.hidden(p, cache)
    return [hidden_BTC, dual.head(hidden_BTC), *cache.keys, *cache.values]


@pytest.mark.parametrize("name", FAMILIES)
def test_compiled_passes_are_the_stock_ones(name: str) -> None:
    slow, fast = tiny_dual(name, disturb=0.3), compiled(tiny_dual(name, disturb=0.3))
    for history_1T, p in random_passes(seed=1, num=24):
        for stock, ours in zip(states(slow, history_1T, p), states(fast, history_1T, p), strict=True):
            torch.testing.assert_close(ours, stock, atol=5e-5, rtol=5e-5)


@pytest.fixture(scope="module")
def fast_orthrus() -> Orthrus:
    orthrus = tiny_orthrus(disturb=0.3)
    compiled(orthrus.dual)
    return orthrus


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
    orthrus = tiny_orthrus(disturb=0.3)
    compiled(orthrus.dual.to(torch.bfloat16))
    return orthrus


def test_layers_that_compute_otherwise_are_of_another_kind() -> None:
    # By windows, by whether positions are rotated, by what has a twin.
    for name, variant in (("gemma3", {}), ("smollm3", {}), ("llama", {"layers": (1,)})):
        first, second = decoder_layers(tiny_dual(name, **variant).base)
        assert kind(first) != kind(second)
    first, second = decoder_layers(tiny_dual("llama").base)
    assert kind(first) == kind(second)


def test_two_models_do_not_share_code() -> None:
    first, second = (tiny_dual("llama", seed=seed, disturb=0.3) for seed in (3, 4))
    for dual in (first, second):
        compiled(dual)
    slow = tiny_dual("llama", seed=3, disturb=0.3)
    for history_1T, p in random_passes(seed=2, num=4):
        other = states(second, history_1T, p)[1]
        ours, stock = (states(dual, history_1T, p)[1] for dual in (first, slow))
        torch.testing.assert_close(ours, stock, atol=5e-5, rtol=5e-5)
        assert (other - ours).abs().max() > 0.1


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("part", [quantise, quantise_drafts])
def test_compiled_quantised(part: object, precision: str) -> None:
    slow, fast = (tiny_dual("llama", disturb=0.3) for _ in range(2))
    for dual in (slow, fast):
        part(dual, precision)  # type: ignore[operator]
    compiled(fast)
    for history_1T, p in random_passes(seed=5, num=12):
        for stock, ours in zip(states(slow, history_1T, p), states(fast, history_1T, p), strict=True):
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
    """In a tree, beside blocks, with its past scattered over the cache: a row is what it is one by one."""
    dual = tiny_dual(name, disturb=0.3)
    if kind in QUANTISED:
        quantise(dual, kind)  # type: ignore[arg-type]
    dual = compiled(dual.to(torch.bfloat16) if kind == "bfloat16" else dual)
    generator, num_compared = random.Random(3), 0
    for _ in range(12):
        length, num_ar = generator.randint(1, 50), generator.randint(2, 12)
        ids_1T = torch.randint(3, MASK, (1, length + num_ar))
        parents = [generator.randint(max(0, row - 2), row) for row in range(num_ar - 1)]
        rows_1T, blocks = ids_1T[:, length:], [generator.randrange(num_ar)]
        together = states(dual, ids_1T[:, :length], fused(rows_1T, parents, [length], blocks, 4, MASK))[1]
        path = [num_ar - 1]
        while path[0]:
            path.insert(0, parents[path[0] - 1])
        with torch.inference_mode():
            cache = dual.new_cache(128)
            dual.run(prefill(ids_1T[:, :length], [0]), cache)
            cache.commit(length)
            for row in path:
                alone = dual.run(prefill(rows_1T[:, row : row + 1], cache.lengths), cache)
                cache.commit(1)
                assert torch.equal(alone[0, 0], together[0, row])
                num_compared += 1
    assert num_compared > 30


def test_wide_passes_are_compiled_too() -> None:
    """A tree of more rows than a prompt's chunk may have is no prompt."""
    dual = compiled(tiny_dual("llama", disturb=0.3).to(torch.bfloat16))
    history_1T, ids_1T = torch.randint(3, MASK, (1, 9)), torch.randint(3, MASK, (1, 140))
    together = states(dual, history_1T, verify_tree(ids_1T, [0] * 139, [9]))[1]
    for row in (1, 70, 139):
        two_1T = ids_1T[:, [0, row]]
        assert torch.equal(states(dual, history_1T, verify_tree(two_1T, [0], [9]))[1][0, 1], together[0, row])


@torch.inference_mode()
@pytest.mark.parametrize("slow", [False, True], ids=["stock", "compiled"])
def test_long_chunks_of_a_prompt_run_where_they_are_fast(monkeypatch: pytest.MonkeyPatch, slow: bool) -> None:
    num_stock = 0

    def counted(*args: Any) -> Any:
        nonlocal num_stock
        num_stock += 1
        return folded_heads(*args)

    monkeypatch.setattr(engine, "stock_is_slow", lambda _: slow)
    monkeypatch.setattr(engine, "folded_heads", counted)
    dual = compiled(tiny_dual("llama", disturb=0.3).to(torch.bfloat16))
    ids_1T = torch.randint(3, MASK, (1, engine.MOST_PROMPT_ROWS + 9))
    together = dual.hidden(prefill(ids_1T, [0]), dual.new_cache(200))[0]
    assert num_stock == int(not slow)
    cache = dual.new_cache(200)
    dual.hidden(prefill(ids_1T[:, :2], [0]), cache)
    cache.commit(2)
    for row in range(2, ids_1T.shape[1]):
        alone = dual.hidden(prefill(ids_1T[:, row : row + 1], cache.lengths), cache)[0, 0]
        cache.commit(1)
        torch.testing.assert_close(together[row], alone, atol=0.1, rtol=0.1)
        assert not slow or torch.equal(together[row], alone)
    assert num_stock == int(not slow)


def test_which_products_of_many_rows_have_instructions_here(monkeypatch: pytest.MonkeyPatch) -> None:
    duals = {kind: tiny_dual("llama") for kind in ("float32", "bfloat16", "int8", "int4")}
    duals["bfloat16"].to(torch.bfloat16)
    quantise(duals["int8"], "int8")
    quantise(duals["int4"], "int4")
    for exact in (False, True):
        monkeypatch.setattr(engine, "onednn_is_exact", lambda exact=exact: exact)
        slow = {kind: engine.stock_is_slow(dual) for kind, dual in duals.items()}
        has_bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        assert slow == {"float32": False, "bfloat16": not has_bfloat16, "int8": not exact, "int4": True}


@torch.inference_mode()
def test_one_call_stands_for_all_layers_only_where_they_are_called_alike() -> None:
    ways = {}
    for family in FAMILIES:
        dual = compiled(tiny_dual(family, disturb=0.3))
        runner = dual._accelerated
        assert isinstance(runner, CompiledRunner)
        ways[family] = runner._way
        (history_1T, p), *_ = random_passes(seed=4, num=2)
        at_once = states(dual, history_1T, p)
        for way in ("each", "waiting"):
            runner._way = way  # type: ignore[assignment]
            for one, other in zip(states(dual, history_1T, p), at_once, strict=True):
                assert torch.equal(one, other)
    # Every other layer of Gemma 3 is given another mask.
    assert ways == {"llama": "alike", "gemma3": "waiting", "phi3": "alike"}


def changes_input(layer: nn.Module) -> None:
    layer.register_forward_pre_hook(lambda _, args: (args[0] * 0.5, *args[1:]))


def changes_output_in_place(layer: nn.Module) -> None:
    layer.register_forward_hook(lambda _, args, out: out.mul_(0.5))


@pytest.mark.parametrize("hook", [changes_input, changes_output_in_place])
@pytest.mark.parametrize("early", [True, False], ids=["early", "late"])
@torch.inference_mode()
def test_hooks_between_layers(hook: Callable[[nn.Module], None], early: bool) -> None:
    """From the start, or once the runner has seen that nothing lies between."""
    slow, fast = (tiny_dual("llama", disturb=0.3) for _ in range(2))
    hook(slow.base.get_decoder().layers[1])
    if not early:
        compiled(fast)
    hook(fast.base.get_decoder().layers[1])
    if early:
        compiled(fast)
    for history_1T, p in random_passes(seed=4, num=4):
        expected = states(slow, history_1T, p)
        for stock, ours in zip(expected, states(fast, history_1T, p), strict=True):
            torch.testing.assert_close(ours, stock, atol=5e-5, rtol=5e-5)


@torch.inference_mode()
def test_a_forward_that_leaves_out_layers_is_no_silent_mistake() -> None:
    dual = compiled(tiny_dual("llama", disturb=0.3))
    (history_1T, p), *_ = random_passes(seed=4, num=2)
    layers = dual.base.get_decoder().layers
    expected = states(dual, history_1T, p)
    for without, message in ((layers[:-1], "left out the last layer"), (layers[1:], "changed its way")):
        dual.base.get_decoder().layers = without
        with pytest.raises(RuntimeError, match=message):
            states(dual, history_1T, p)
    dual.base.get_decoder().layers = layers
    # Where one call stands for all, nobody may ask for some.
    dual.base.config.num_hidden_layers -= 1
    with pytest.raises(RuntimeError, match="left out a layer"):
        states(dual, history_1T, p)
    dual.base.config.num_hidden_layers += 1
    for one, other in zip(states(dual, history_1T, p), expected, strict=True):
        assert torch.equal(one, other)


def test_other_batches_run_through_the_stock_layers() -> None:
    slow, fast = tiny_dual("llama", disturb=0.3), compiled(tiny_dual("llama", disturb=0.3))
    ids_BT = torch.randint(3, MASK, (2, 7))
    outs = []
    with torch.inference_mode():
        for dual in (slow, fast):
            outs.append(dual.hidden(prefill(ids_BT, [0, 0]), dual.new_cache(32, batch_size=2)))
    assert torch.equal(*outs)


def test_wrong_runner_is_one_sentence() -> None:
    with pytest.raises(UserInputError, match="runner must be one of auto, eager, compiled, captured, not"):
        use_runner(tiny_dual(), "fast")


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    dual = tiny_dual()
    with pytest.warns(OrthrusWarning, match=r"running eagerly.*needs a C\+\+ compiler"):
        use_runner(dual, "auto")
    assert dual.runner == "eager"
    with pytest.raises(UserInputError, match=r"needs a C\+\+ compiler"):
        use_runner(dual, "compiled")


def test_without_memory_auto_says_that_it_runs_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orthrus.engine.compiled.available_bytes", lambda: 1000)
    dual = tiny_dual()
    with pytest.warns(OrthrusWarning, match=r"running eagerly.*needs .* GB more"):
        use_runner(dual, "auto")
    assert dual.runner == "eager"


@pytest.mark.parametrize(
    ("system", "machine"),
    [("darwin", "arm64"), ("darwin", "x86_64"), ("linux", "aarch64"), ("win32", "AMD64")],
)
def test_where_nobody_has_run_the_tests_auto_is_eager(
    system: str, machine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orthrus.engine.compiled.sys.platform", system)
    monkeypatch.setattr("orthrus.engine.compiled.platform.machine", lambda: machine)
    dual = tiny_dual()
    use_runner(dual, "auto")
    assert dual.runner == "eager"
    with pytest.raises(UserInputError, match="x86-64 Linux only"):
        use_runner(dual, "compiled")


def test_a_full_disk_while_compiling_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: object) -> None:
        raise RuntimeError("fatal error: error writing to x.s: No space left on device")

    monkeypatch.setenv("ORTHRUS_CACHE", str(tmp_path))
    monkeypatch.setattr("orthrus.engine.layer_code._exported", full)
    dual = tiny_dual()
    with pytest.raises(StorageError, match=r"too full to compile code: /.* free some space"):
        use_runner(dual, "compiled")
    with pytest.warns(OrthrusWarning, match=r"too full to compile code: /.* running eagerly"):
        use_runner(dual, "auto")
    assert dual.runner == "eager"


def test_eager_ends_the_runner_before() -> None:
    dual = compiled(tiny_dual("llama"))
    use_runner(dual, "eager")
    assert dual.runner == "eager"


def test_auto_goes_on_when_compiling_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no such thing\nand more")

    monkeypatch.setattr("orthrus.engine.compiled.CompiledRunner._make", broken)
    dual = tiny_dual()
    with pytest.warns(OrthrusWarning, match="no such thing"):
        use_runner(dual, "auto")
    assert dual.runner == "eager"
    with torch.inference_mode():
        dual.run(prefill(torch.tensor([[3, 4]]), [0]), dual.new_cache(8))
