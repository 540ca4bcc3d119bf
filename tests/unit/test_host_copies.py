"""What makes a device wait for the host: a pass reads back what was chosen and proposed, and nothing else."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.tiny import tiny_dual, tiny_prompt
from tests.ways import EVERY_WAY
from torch.utils._python_dispatch import TorchDispatchMode

from orthrus.config import DecodeConfig, SamplingParams, Strategy
from orthrus.engine.state import DecodeState
from orthrus.engine.stream import TokenStream
from orthrus.model.passes import Pass
from orthrus.types import GenerationResult


class HostCopies(TorchDispatchMode):
    """Counts what makes a device wait for the host: reading a number, or an index, out of a tensor."""

    # In inference mode `item` arrives whole, elsewhere as what it is made of.
    SYNCS = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal", "multinomial")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += any(func.overloadpacket.__name__.startswith(name) for name in self.SYNCS)
        return func(*args, **(kwargs or {}))


@contextmanager
def host_copies(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """All reads by Python (on a CPU `tolist` needs no torch operation), and those hidden in operations."""
    copies: list[str] = []
    with monkeypatch.context() as patch:
        # The check of every pass is for CPUs only.
        patch.setattr(Pass, "check", lambda *_: None)
        for name in ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__"):
            original = getattr(torch.Tensor, name)

            def counted(
                self: Any, *args: Any, _name: str = name, _original: Any = original, **kwargs: Any
            ) -> Any:
                copies.append(_name)
                return _original(self, *args, **kwargs)

            patch.setattr(torch.Tensor, name, counted)
        with HostCopies() as mode:
            yield copies
        copies += ["hidden"] * mode.count


@pytest.mark.parametrize("repair_rank", [None, 4], ids=["no head", "repair head"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@EVERY_WAY
def test_a_pass_copies_to_the_host_what_was_chosen_and_what_was_proposed(
    strategy: Strategy,
    floor: bool,
    temperature: float,
    repair_rank: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []
    for name in ("choose", "propose"):
        method = getattr(DecodeState, name)

        def noted(self: DecodeState, *args: Any, _name: str = name, _method: Any = method) -> Any:
            asked.append(_name)
            return _method(self, *args)

        monkeypatch.setattr(DecodeState, name, noted)
    sampling = SamplingParams(temperature=temperature, top_p=0.9, top_k=40, min_p=0.01, seed=0)
    config = DecodeConfig(max_new_tokens=24, strategy=strategy, floor=floor, sampling=sampling)
    running = TokenStream(
        tiny_dual("llama", disturb=0.1, repair_rank=repair_rank),
        tiny_prompt(9),
        config,
        eos_token_ids=frozenset(),
        context_length=256,
    )
    with host_copies(monkeypatch) as copies:
        records = list(running)
        made = copies.copy()
    assert made == ["tolist"] * len(asked)
    assert copies == made, "an operation reads a value of a tensor behind our back"
    # Each pass with AR rows asks once for a choice, and at most one of its blocks is ever looked at.
    num_passes = sum(c.num_passes for c in records)
    assert asked.count("choose") <= num_passes
    assert asked.count("propose") <= num_passes
    assert (asked.count("propose") > 0) == (strategy != "ar")


@pytest.mark.parametrize("repair_rank", [None, 4], ids=["no head", "repair head"])
@pytest.mark.parametrize("block_size", [4, 8])
@EVERY_WAY
def test_where_reads_are_dear_a_pass_copies_once_and_a_chain_once_a_cycle(
    strategy: Strategy,
    floor: bool,
    block_size: int,
    repair_rank: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And makes the same passes, drafts and text: the host that knows everything is the oracle."""
    made = []
    for dear in (False, True):
        monkeypatch.setattr("orthrus.engine.stream.reads_are_dear", lambda _, dear=dear: dear)
        config = DecodeConfig(
            max_new_tokens=40, strategy=strategy, floor=floor, block_size=block_size, block_budget=2
        )
        dual = tiny_dual("llama", disturb=0.1, repair_rank=repair_rank)
        running = TokenStream(dual, tiny_prompt(9), config, eos_token_ids=frozenset(), context_length=256)
        with host_copies(monkeypatch) as copies:
            records = [replace(record, elapsed_ms=0.0) for record in running]
        made.append((records, copies))
    (known, _), (asked, copies) = made
    assert asked == known
    # The paper's draft pass has no AR row, and is looked at all the same.
    reads = [1 if strategy == "chain" and floor else c.num_passes for c in asked]
    assert copies == ["tolist"] * sum(reads)
    if strategy != "ar":
        assert sum(c.num_accepted for c in asked) > 0


@pytest.mark.parametrize("limit", ["context_length", "max_new_tokens", "eos"])
def test_a_chain_that_is_read_once_ends_where_it_should(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever text and context end: the same tokens, whichever of the two passes decides the last one."""
    plain = decoded(monkeypatch, dear=False, strategy="ar").token_ids
    ends: dict[str, list[Any]] = {
        "context_length": [*range(12, 40)],
        "max_new_tokens": [*range(2, 24)],
        "eos": [frozenset({token_id}) for token_id in dict.fromkeys(plain) if token_id != plain[0]],
    }
    more_passes = set()
    for end in ends[limit]:
        known, asked = (decoded(monkeypatch, dear=dear, **{limit: end}) for dear in (False, True))
        assert asked.token_ids == known.token_ids == plain[: len(known.token_ids)]
        assert 1 < len(known.token_ids) < len(plain)
        assert (asked.stats.num_drafted, asked.stats.num_accepted) == (
            known.stats.num_drafted,
            known.stats.num_accepted,
        )
        more_passes.add(asked.stats.num_passes - known.stats.num_passes)
    # Only a first pass that ends the text makes the second one vain, and some do.
    assert more_passes == ({0, 1} if limit == "eos" else {0})


def decoded(
    monkeypatch: pytest.MonkeyPatch,
    *,
    dear: bool,
    eos: frozenset[int] = frozenset(),
    context_length: int = 256,
    max_new_tokens: int = 60,
    strategy: Strategy = "chain",
) -> GenerationResult:
    monkeypatch.setattr("orthrus.engine.stream.reads_are_dear", lambda _: dear)
    config = DecodeConfig(max_new_tokens=max_new_tokens, strategy=strategy)
    dual = tiny_dual("llama", disturb=0.1, repair_rank=4)
    return TokenStream(dual, tiny_prompt(9), config, eos_token_ids=eos, context_length=context_length).drain()


def test_the_counter_of_host_copies_sees_hidden_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Indexing with a tensor of one number reads it, which looks like pure device work."""
    for mode in (torch.inference_mode, torch.no_grad):
        with host_copies(monkeypatch) as copies, mode():
            torch.arange(4)[torch.tensor(2)]
        assert copies == ["hidden"]
