"""What `orthrus bench --suite NAME` measures: data sets, arms and lengths, each of which an option may replace."""

from dataclasses import dataclass

from orthrus.bench.data_sets import BUILT_IN
from orthrus.config import DecodeConfig


@dataclass(frozen=True, slots=True)
class Suite:
    """Values that stand in for options that were left out. `limit`: prompts of each domain."""

    name: str
    sets: tuple[str, ...]
    strategies: tuple[str, ...]
    temperatures: tuple[float, ...]
    limit: int | None
    max_new_tokens: int
    repeats: int
    thinking: bool | None = None


PAPER_CYCLE = "chain:floor=false"
"""The cycle of arXiv 2605.12825: a draft pass that decides nothing, and a verify pass."""
PAPER_SETS = ("gsm8k", "math500", "aime24", "aime25", "humaneval", "mbpp", "pseudo2code", "lcb_v5")
_EVERYDAY_SETS = (BUILT_IN, "gsm8k", "math500", "humaneval", "mbpp", "mt_bench", "spec_bench")

WITHOUT = Suite(
    name="",
    sets=(BUILT_IN,),
    strategies=(DecodeConfig().strategy,),
    temperatures=(0.0,),
    limit=None,
    max_new_tokens=128,
    repeats=3,
)
"""What is measured without a suite."""

SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            name="quick",
            sets=(BUILT_IN,),
            strategies=(PAPER_CYCLE, "chain", "tree", "auto"),
            temperatures=(0.0, 1.0),
            limit=2,
            max_new_tokens=64,
            repeats=1,
        ),
        Suite(
            name="full",
            sets=_EVERYDAY_SETS,
            strategies=(PAPER_CYCLE, "chain", "chain:block_size=4", "tree", "fused", "fused_tree", "auto"),
            temperatures=(0.0, 1.0),
            limit=10,
            max_new_tokens=128,
            repeats=3,
        ),
        # As the paper counts: its own cycle, long answers, one run of each prompt. 128 prompts a set, since a
        # mean over 25 questions is off by 0.4.
        Suite(
            name="paper",
            sets=PAPER_SETS,
            strategies=(PAPER_CYCLE, "chain", "auto"),
            temperatures=(0.0, 1.0),
            limit=128,
            max_new_tokens=2048,
            repeats=1,
            thinking=False,
        ),
    )
}
