"""The arms of a benchmark: a strategy by name, with settings of its own where it has some."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from orthrus.config import STRATEGIES, DecodeConfig, SamplingParams
from orthrus.errors import UserInputError

STOCK, PLAIN = "stock", "ar"
_NUMBERS = ("block_size", "node_budget", "block_budget")
_SWITCHES = ("floor", "copies")
_WORDS = {"true": True, "false": False}


@dataclass(frozen=True, slots=True)
class Arm:
    """One way of decoding. `name`: as reports call it. `settings`: fields of DecodeConfig beside the strategy."""

    name: str
    strategy: str
    settings: dict[str, Any] = field(default_factory=dict, hash=False)

    @classmethod
    def parse(cls, text: str) -> "Arm":
        """An arm from STRATEGY, or STRATEGY:SETTING=VALUE,... such as `chain:floor=false` or `chain:block-size=4`.

        Raises UserInputError for an unknown strategy or setting, and for a value that it cannot have.
        """
        strategy, _, rest = text.partition(":")
        if strategy not in STRATEGIES:
            raise UserInputError(
                f"the strategy must be one of {', '.join(STRATEGIES)}, not '{strategy}'; there is no other."
            )
        settings: dict[str, Any] = {}
        for pair in filter(None, rest.split(",")):
            name, _, value = pair.partition("=")
            name = name.strip().replace("-", "_")
            value = value.strip().lower()
            if name in _SWITCHES and value in _WORDS:
                settings[name] = _WORDS[value]
            elif name in _NUMBERS and value.isdecimal():
                settings[name] = int(value)
            else:
                raise UserInputError(
                    f"'{pair}' is no setting of an arm: {', '.join(_NUMBERS)} take a whole number, "
                    f"{' and '.join(_SWITCHES)} true or false, as in chain:floor=false."
                )
        return cls(text, strategy, settings)

    def config(
        self, common: dict[str, Any], temperature: float, seed: int | None, max_new_tokens: int
    ) -> DecodeConfig:
        """One request of this arm; `common`: settings of all arms, which the arm's own go before."""
        keywords = common | self.settings
        sampling = SamplingParams(temperature=temperature, seed=seed)
        return DecodeConfig(
            strategy=self.strategy,  # type: ignore[arg-type]
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            **keywords,
        )


def check_rounds(repeats: int, warmup: int, **arms: Sequence[Any]) -> None:
    """Raises UserInputError where something is measured twice, no round is counted, or a number is negative.

    arms: what the rounds go through, by name.
    """
    for name, values in arms.items():
        if len(set(values)) < len(values):
            raise UserInputError(f"the {name} hold one twice; give each once.")
    if repeats < 1:
        raise UserInputError(f"repeats must be at least 1, not {repeats}.")
    if warmup < 0:
        raise UserInputError(f"warmup must be 0 or more, not {warmup}.")
