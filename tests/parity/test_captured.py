"""Captured passes against the stock forward: with a stand-in for the graph, on a GPU with the real one."""

from collections.abc import Callable
from itertools import cycle

import pytest
import torch
from tests.parity.test_compiled import random_passes
from tests.tiny import tiny_dual
from tests.tiny_orthrus import tiny_orthrus
from tests.unit.test_policy import FLAT, MIDDLE, STEEP
from tests.ways import EVERY_WAY
from torch import Tensor

from orthrus.api import decode_config
from orthrus.config import Strategy
from orthrus.decoding.cost_table import CostTable
from orthrus.decoding.policy import Policy
from orthrus.engine.captured import AR_ROWS, CapturedRunner, cuda_graph, filled_up
from orthrus.engine.runners import use_runner
from orthrus.errors import UserInputError
from orthrus.model import slot_cache
from orthrus.model.dual_view import DualView
from orthrus.model.passes import Pass, prefill, verify_tree

FAMILIES = ["llama", "gemma3", "phi3"]
recorded: list[int] = []


def stand_in(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Runs the function again at each replay, into the memory of the first run; counts what is recorded."""
    out = run().clone()
    recorded.append(out.shape[1])

    def replay() -> None:
        out.copy_(run())

    return replay, out


@pytest.fixture(autouse=True)
def nothing_recorded() -> None:
    recorded.clear()


def captured(dual: DualView) -> DualView:
    dual.accelerate("captured", passes=CapturedRunner(dual, stand_in))
    return dual


@torch.inference_mode()
def after(dual: DualView, history_1T: Tensor, p: Pass) -> list[Tensor]:
    """A pass's hidden states, and the keys and values that its rows wrote."""
    cache = dual.new_cache(0)
    cache.max_slots = 512
    dual.run(prefill(history_1T, [0]), cache)
    cache.commit(history_1T.shape[1])
    hidden_BTC = dual.hidden(p, cache)
    written = [store[:, :, p.slots_BT[0]] for store in (*cache.keys, *cache.values)]
    dual.hand_on(cache)
    return [hidden_BTC, *written]


@pytest.mark.parametrize("name", FAMILIES)
def test_captured_passes_are_the_stock_ones(name: str) -> None:
    plain, fast = tiny_dual(name, disturb=0.3), captured(tiny_dual(name, disturb=0.3))
    shapes = set()
    for history_1T, p in random_passes(5, 40):
        for ours, theirs in zip(after(fast, history_1T, p), after(plain, history_1T, p), strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)
        shapes.add((p.num_ar_rows, p.num_rows))
    # Fewer recordings than shapes, although the prompts are recorded too: the cache was handed on.
    assert 3 < len(recorded) < len(shapes)


@pytest.mark.parametrize("dear", [False, True], ids=["reads", "dear reads"])
@EVERY_WAY
def test_text_is_that_of_the_eager_runner(
    strategy: Strategy, floor: bool, dear: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a GPU the device chooses what comes next before the host knows.
    monkeypatch.setattr("orthrus.engine.stream.reads_are_dear", lambda _: dear)
    config = decode_config(strategy=strategy, floor=floor, max_new_tokens=40, ignore_eos=True)
    eager, fast = tiny_orthrus(), tiny_orthrus()
    captured(fast.dual)
    results = [orthrus.stream_ids([5, 6, 7, 8], config).drain() for orthrus in (eager, fast)]
    assert results[0].token_ids == results[1].token_ids
    assert results[0].stats.num_passes == results[1].stats.num_passes
    num_recorded = len(recorded)
    assert num_recorded > 0
    again = fast.stream_ids([5, 6, 7, 8], config).drain()
    assert again.token_ids == results[0].token_ids
    assert len(recorded) == num_recorded, "the second request recorded anew"


@pytest.mark.parametrize("table", [FLAT, MIDDLE, STEEP], ids=["flat", "middle", "steep"])
def test_blocks_of_several_lengths_are_recorded_each(
    monkeypatch: pytest.MonkeyPatch, table: CostTable
) -> None:
    # As `auto` may decide from draft to draft.
    sizes = cycle((2, 3, 5))
    monkeypatch.setattr(Policy, "block_size", property(lambda _: next(sizes)))
    monkeypatch.setattr("orthrus.engine.stream.pass_costs", lambda *_, **__: table)
    config = decode_config(strategy="auto", max_new_tokens=60, ignore_eos=True)
    fast = tiny_orthrus()
    captured(fast.dual)
    plain = decode_config(strategy="ar", max_new_tokens=60, ignore_eos=True)
    expected = tiny_orthrus().stream_ids([5, 6, 7, 8], plain).drain()
    result = fast.stream_ids([5, 6, 7, 8], config).drain()
    assert result.token_ids == expected.token_ids
    assert (result.stats.num_accepted > 0) == (table is not STEEP)


def test_a_cache_that_grows_is_recorded_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tensors are others then; the text does not show it."""
    monkeypatch.setattr(slot_cache, "GROWTH_STEP", 4)
    monkeypatch.setattr("orthrus.engine.captured.SLOT_STEP", 4)
    config = decode_config(strategy="ar", max_new_tokens=30, ignore_eos=True)
    expected = tiny_orthrus().stream_ids([5, 6, 7], config).drain()
    fast = tiny_orthrus()
    captured(fast.dual)
    assert fast.stream_ids([5, 6, 7], config).drain().token_ids == expected.token_ids
    assert 4 < len(recorded) < 30


def test_filled_passes_keep_the_invariants() -> None:
    for history_1T, p in random_passes(6, 24):
        if not p.num_ar_rows:
            continue
        num_ar = next(n for n in AR_ROWS if n > p.num_ar_rows)
        filled = filled_up(p, num_ar, p.num_slots + num_ar)
        length, extra = history_1T.shape[1], num_ar - p.num_ar_rows
        assert filled.num_rows == p.num_rows + extra
        rows = [*range(p.num_ar_rows), *range(num_ar, filled.num_rows)]
        assert torch.equal(filled.visible_BTS[:, rows, : p.num_slots], p.visible_BTS)
        assert not filled.visible_BTS[:, rows, p.num_slots :].any(), "a row sees a filler"
        assert len(set(filled.slots_BT[0].tolist())) == filled.num_rows, "two rows write one slot"
        assert (filled.slots_BT >= length).all()


def test_passes_that_are_none_of_ours_run_as_ever() -> None:
    fast, plain = captured(tiny_dual()), tiny_dual()
    ids_BT = torch.randint(3, 50, (2, 6), generator=torch.Generator().manual_seed(0))
    tight = verify_tree(ids_BT[:1, :3], [0, 0], [6])
    with torch.inference_mode():
        batches = [
            dual.run(prefill(ids_BT, [0, 0]), dual.new_cache(32, batch_size=2)) for dual in (fast, plain)
        ]
        torch.testing.assert_close(*batches)
        # A pass that fills the cache to its last slot leaves no room for fillers.
        outs = []
        for dual in (fast, plain):
            cache = dual.new_cache(9)
            dual.run(prefill(ids_BT[:1], [0]), cache)
            cache.commit(6)
            outs.append(dual.hidden(tight, cache))
        torch.testing.assert_close(*outs)
    assert recorded == [8], "only the prompt, filled up, is one of ours"


def test_without_a_gpu_it_is_one_sentence() -> None:
    with pytest.raises(
        UserInputError, match="captured runner is made for CUDA devices, and the model is on cpu"
    ):
        use_runner(tiny_dual(), "captured")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", FAMILIES)
def test_graphs_give_what_the_stock_forward_gives(name: str) -> None:
    plain, fast = (tiny_dual(name, disturb=0.3).to("cuda") for _ in range(2))
    fast.accelerate("captured", passes=CapturedRunner(fast, cuda_graph))
    for history_1T, p in random_passes(5, 40):
        moved = Pass(*(x.to("cuda") if isinstance(x, Tensor) else x for x in _fields(p)))
        for ours, theirs in zip(
            after(fast, history_1T.to("cuda"), moved), after(plain, history_1T.to("cuda"), moved), strict=True
        ):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def _fields(p: Pass) -> list[object]:
    return [getattr(p, name) for name in Pass.__dataclass_fields__]
