"""Every way of decoding: all strategies, and with the paper's cycle those that it changes."""

import pytest

from orthrus.config import FIXED_STRATEGIES, Strategy

WAYS: list[tuple[Strategy, bool]] = [
    *((strategy, True) for strategy in FIXED_STRATEGIES),
    ("chain", False),
    ("fused_tree", False),
]
DRAFTING = [way for way in WAYS if way[0] != "ar"]
_IDS = {way: way[0] if way[1] else f"{way[0]}, no floor" for way in WAYS}
EVERY_WAY = pytest.mark.parametrize(("strategy", "floor"), WAYS, ids=_IDS.values())
EVERY_DRAFTING_WAY = pytest.mark.parametrize(
    ("strategy", "floor"), DRAFTING, ids=[_IDS[way] for way in DRAFTING]
)
