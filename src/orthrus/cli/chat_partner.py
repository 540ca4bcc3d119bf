"""Who answers in `orthrus chat`: a model in this process, or a server. The loop sees no difference."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

from orthrus.cli.common import load_orthrus, time_passes
from orthrus.cli.render import DraftMarker
from orthrus.errors import UserInputError
from orthrus.types import Cycle, GenerationResult

if TYPE_CHECKING:
    from orthrus.api import Orthrus

Messages = list[dict[str, str]]


class Answering(Protocol):
    """One answer as it comes: iterate for its records, then ask for the result."""

    def __iter__(self) -> Iterator[Cycle]: ...

    def cancel(self) -> None:
        """Stop; the answer ends as it stands. May be called by a signal's handler."""
        ...

    @property
    def result(self) -> GenerationResult: ...


class Partner(Protocol):
    def answer(self, messages: Messages, decode: dict[str, Any]) -> Answering:
        """Begin to answer the last message. decode: keywords as `orthrus.api.decode_config` takes them."""
        ...

    def marker(self) -> DraftMarker:
        """The marker of drafted tokens. Raises UserInputError if the partner does not report them."""
        ...

    def check_compare(self) -> None:
        """Raises UserInputError where nobody can be asked for plain decoding."""
        ...

    def header(self) -> list[tuple[str, str]]:
        """What to say before the first turn: (name, value) each."""
        ...

    def describe(self) -> dict[str, Any]:
        """What a saved chat says of who answered; JSON-ready."""
        ...


class LocalPartner:
    """A model in this process. Raises UserInputError for one without a chat template."""

    def __init__(self, orthrus: "Orthrus") -> None:
        if not orthrus.base.tokenizer.chat_template:
            raise UserInputError(
                f"{orthrus.base.name} has no chat template; choose an instruction-tuned model, "
                "or use `orthrus generate`."
            )
        self._orthrus = orthrus

    @classmethod
    def load(cls, model: str, decode: dict[str, Any], *, quiet: bool, **options: Any) -> "LocalPartner":
        """options: as `Orthrus.load` takes them."""
        orthrus = load_orthrus(model, quiet=quiet, **options)
        partner = cls(orthrus)
        time_passes(orthrus, [decode["strategy"]], quiet=quiet)
        return partner

    def answer(self, messages: Messages, decode: dict[str, Any]) -> Answering:
        return self._orthrus.stream(messages, **decode)

    def marker(self) -> DraftMarker:
        return DraftMarker(self._orthrus.base.tokenizer)

    def check_compare(self) -> None:
        pass

    def header(self) -> list[tuple[str, str]]:
        about = self._orthrus.describe()
        quantised = f" ({about['quantised']})" if "quantised" in about else ""
        return [
            ("model", about["model"] + quantised),
            ("view", about["view"]),
            ("running", f"{about['dtype']} on {about['device']}, {about['attention']} attention"),
            ("block size", f"K = {about['block_size']}"),
            ("context", f"{about['context_length']} tokens"),
        ]

    def describe(self) -> dict[str, Any]:
        return self._orthrus.describe()
