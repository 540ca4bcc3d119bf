"""What makes a device wait for the host: a pass reads back what was chosen and proposed, and nothing else."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tests.engines import engine_for
from tests.tiny import tiny_dual, tiny_prompt
from tests.ways import EVERY_WAY
from torch.utils._python_dispatch import TorchDispatchMode

from orthrus.config import DecodeConfig, SamplingParams, Strategy
from orthrus.engine import round as engine_round


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
@pytest.mark.parametrize("num_requests", [1, 3])
@EVERY_WAY
def test_a_pass_copies_to_the_host_what_was_chosen_and_what_was_proposed(
    strategy: Strategy,
    floor: bool,
    num_requests: int,
    temperature: float,
    repair_rank: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However many requests take part: they are chosen for, and drafted for, together."""
    asked: list[str] = []
    for name in ("choose", "rank"):
        function = getattr(engine_round, name)

        def noted(*args: Any, _name: str = name, _function: Any = function) -> Any:
            asked.append(_name)
            return _function(*args)

        monkeypatch.setattr(engine_round, name, noted)
    sampling = SamplingParams(temperature=temperature, top_p=0.9, top_k=40, min_p=0.01, seed=0)
    config = DecodeConfig(max_new_tokens=24, strategy=strategy, floor=floor, sampling=sampling)
    engine = engine_for(tiny_dual("llama", disturb=0.1, repair_rank=repair_rank))
    requests = [
        engine.submit(tiny_prompt(9, seed=i), config, eos_token_ids=frozenset()) for i in range(num_requests)
    ]
    num_passes = 0
    with host_copies(monkeypatch) as copies:
        while engine.has_work:
            engine.step()
            num_passes += 1
        made = copies.copy()
    # What was chosen, and whether its logits are finite; ids and log probs of drafts, and of their pairs.
    per_draft = 2 if repair_rank is None else 3
    num_tolist = asked.count("choose") + per_draft * asked.count("rank")
    assert made == ["tolist"] * num_tolist
    assert copies == made, "an operation reads a value of a tensor behind our back"
    assert asked.count("choose") <= num_passes
    assert asked.count("rank") <= num_passes
    assert (asked.count("rank") > 0) == (strategy != "ar")
    assert all(request.finish == "length" for request in requests)


def test_the_counter_of_host_copies_sees_hidden_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Indexing with a tensor of one number reads it, which looks like pure device work."""
    for mode in (torch.inference_mode, torch.no_grad):
        with host_copies(monkeypatch) as copies, mode():
            torch.arange(4)[torch.tensor(2)]
        assert copies == ["hidden"]
