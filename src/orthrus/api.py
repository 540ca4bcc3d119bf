"""The Python interface: load a model with its view, then generate, stream or chat."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypedDict, Unpack, overload

from orthrus.base.loading import Base
from orthrus.base.storage import Progress
from orthrus.config import DecodeConfig, Grammar, SamplingParams, Strategy
from orthrus.decoding.grammar import GrammarCompiler, GrammarState
from orthrus.engine.costs import Costs, OnMeasure
from orthrus.engine.engine import Engine, EngineConfig
from orthrus.engine.request import Request
from orthrus.engine.runners import chosen_runner, make_runner
from orthrus.engine.stream import TokenStream
from orthrus.errors import UserInputError
from orthrus.model.dual_view import DualView
from orthrus.model.loading import load_dual
from orthrus.model.runner import EagerRunner, Runner
from orthrus.types import Cycle, GenerationResult

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Message = dict[str, str]
Prompt = str | Sequence[Message]


class DecodeOptions(TypedDict, total=False):
    """The keywords of `generate`, `stream` and `chat`: see `decode_config`."""

    max_new_tokens: int
    strategy: Strategy
    block_size: int | None
    node_budget: int
    block_budget: int
    floor: bool
    copies: bool
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    logit_bias: Mapping[int, float] | None
    seed: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int]
    min_tokens: int
    ignore_eos: bool
    logprobs: int | None
    grammar: Grammar | None
    priority: int


class Orthrus:
    """A frozen language model with its diffusion view, ready to decode.

        orthrus = Orthrus.load()
        print(orthrus.generate("Why is the sky blue?").text)

    `base` is the frozen model with its tokenizer, `dual` holds the two views over it, and `engine` answers
    requests. Thread-safe: requests of several threads share the engine's passes, and each gets the text that it
    would get alone. A process that was forked after loading refuses requests, because the threads stay in its parent:
    load the model in each process. runner: runs the passes; the default is the eager runner.
    """

    def __init__(
        self, base: Base, dual: DualView, runner: Runner | None = None, config: EngineConfig | None = None
    ) -> None:
        self.base = base
        self.dual = dual
        self.engine = Engine(runner or EagerRunner(dual), config)

    @classmethod
    def load(
        cls,
        model: str = "default",
        view: str = "default",
        dtype: str | None = None,
        device: str | None = None,
        *,
        runner: str | None = None,
        draft_dtype: str | None = None,
        draft_vocab: int | None = None,
        revision: str | None = None,
        attn_implementation: str | None = None,
        engine: EngineConfig | None = None,
        on_progress: Progress | None = None,
    ) -> "Orthrus":
        """Load `model` (hub id, folder, GGUF file, or "default") and a view for it.

        view: "default" (the checkpoint's own or the shipped one; an untrained one where there is none), "untrained" (a
        copy of the base's own projections), a view folder, or a hub id. dtype: "float32", "bfloat16", "float16",
        "auto", or "int8" or "int4" on a CPU. draft_dtype: "int8" or "int4" for the drafts alone; the text stays the
        same. draft_vocab: drafts may propose only so many of the most frequent ids; None for all. runner: "eager",
        "compiled", or "auto" (compiled where that works). None takes the environment variable ORTHRUS_RUNNER, and
        "auto" without it. attn_implementation: attention of the stock model, which is the baseline; our passes use
        their own attention. Raises the subclasses of OrthrusError, each a sentence with the cause and the next step.
        """
        runner = chosen_runner(runner)
        base, dual = load_dual(
            model,
            view,
            revision=revision,
            dtype=dtype,
            device=device,
            draft_dtype=draft_dtype,
            draft_vocab=draft_vocab,
            attn_implementation=attn_implementation,
            on_progress=on_progress,
        )
        return cls(base, dual, make_runner(dual, runner, on_progress), engine)

    @overload
    def generate(
        self, prompt: Prompt, *, raw: bool = False, **decode: Unpack[DecodeOptions]
    ) -> GenerationResult: ...

    @overload
    def generate(
        self, prompt: list[Prompt], *, raw: bool = False, **decode: Unpack[DecodeOptions]
    ) -> list[GenerationResult]: ...

    def generate(
        self, prompt: Prompt | list[Prompt], *, raw: bool = False, **decode: Unpack[DecodeOptions]
    ) -> GenerationResult | list[GenerationResult]:
        """Answer `prompt` (text, or chat messages) and return the whole result.

        A list of prompts is answered together. The results have the order of the list, and each text is the same
        as if its prompt were alone. Keywords: see `decode_config`. With `raw` the model continues the text as it
        is, without chat template.
        """
        if not _is_list_of_prompts(prompt):
            return self.stream(prompt, raw=raw, **decode).drain()  # type: ignore[arg-type]
        streams = [self.stream(each, raw=raw, **decode) for each in prompt]  # type: ignore[arg-type]
        return [stream.drain() for stream in streams]

    def stream(self, prompt: Prompt, *, raw: bool = False, **decode: Unpack[DecodeOptions]) -> TokenStream:
        """Like `generate`, but yields a `Cycle` for each cycle. `.cancel()` stops it, and `.result` is the whole
        result.
        """
        _check_keywords(decode)
        prompt_ids = self.base.encode_prompt(prompt, raw=raw)
        return self.stream_ids(prompt_ids, decode_config(**decode))

    def stream_ids(self, prompt_ids: list[int], config: DecodeConfig) -> TokenStream:
        """Decode token ids as they are."""
        return TokenStream(self.engine, self.submit(prompt_ids, config))

    def submit(
        self,
        prompt_ids: list[int],
        config: DecodeConfig,
        *,
        on_cycle: Callable[[Cycle], None] | None = None,
        on_end: Callable[[Request], None] | None = None,
        deadline: float | None = None,
        engine: Engine | None = None,
    ) -> Request:
        """Submit token ids to the engine; the caller steps it. Keywords: see `Engine.submit`.

        engine: another engine over the same model, to use instead of `self.engine`.
        """
        return (engine or self.engine).submit(
            prompt_ids,
            config,
            grammar=self.grammar_state(config.grammar),
            eos_token_ids=self.base.eos_token_ids,
            tokenizer=self.base.tokenizer,  # type: ignore[arg-type]
            on_cycle=on_cycle,
            on_end=on_end,
            deadline=deadline,
        )

    def grammar_state(self, grammar: Grammar | None) -> GrammarState | None:
        """The grammar, compiled for this model, in its state before the first token; None without a grammar."""
        return None if grammar is None else self._grammars.state(grammar)

    @cached_property
    def _grammars(self) -> GrammarCompiler:
        return GrammarCompiler(self.base.tokenizer, self.base.eos_token_ids, self.dual.vocab_size)

    def chat(self, system: str | None = None, **decode: Unpack[DecodeOptions]) -> "Conversation":
        """A conversation that remembers its turns; keywords are the defaults of each turn."""
        return Conversation(self, system, decode)

    def time_passes(self, on_measure: OnMeasure | None = None) -> Costs:
        """Time the passes on this machine (some seconds, once) and keep the times; `auto` decides by them.

        The first `auto` request calls this if nobody did before.
        """
        return self.engine.costs(on_measure)

    def warm_up(self) -> None:
        """Run a few tokens, so that the first request does not pay for lazy initialisation."""
        config = decode_config(max_new_tokens=8, ignore_eos=True)
        self.stream_ids([next(iter(self.base.eos_token_ids), 0)] * 8, config).drain()

    def stock(self) -> "PreTrainedModel":
        """The untouched stock model, over the same weights: the baseline of every comparison."""
        return self.dual.stock()

    def describe(self) -> dict[str, Any]:
        """Facts about model and view that every report must contain."""
        config = self.dual.config
        return {
            "model": self.base.name,
            "source": self.base.source.origin,
            "family": self.base.family.name,
            "dtype": self.dual.precision or str(self.dual.dtype).removeprefix("torch."),
            "draft_dtype": self.dual.draft_precision,
            "draft_vocab": None if self.dual.draft_ids_N is None else len(self.dual.draft_ids_N),
            "runner": self.engine.runner.name,
            "device": str(self.dual.device),
            "attention": self.dual.base.config._attn_implementation,
            "chat_template": bool(getattr(self.base.tokenizer, "chat_template", None)),
            "context_length": self.base.context_length,
            "view": "trained" if config.trained else "untrained",
            "block_size": config.block_size,
            "mask": "trained embedding"
            if config.mask_token_id is None
            else f"token id {config.mask_token_id}",
            "view_parameters": self.dual.num_view_parameters(),
            "base_fingerprint": config.base_fingerprint,
        } | ({"quantised": self.base.quantised} if self.base.quantised else {})


class Conversation:
    """A chat that remembers its turns. A turn is added to `messages` only when its answer has been read to the end."""

    def __init__(self, orthrus: Orthrus, system: str | None, decode: DecodeOptions) -> None:
        self._orthrus = orthrus
        self._decode = decode
        self._system = system
        self.messages: list[Message] = []
        self.reset()

    def reset(self) -> None:
        """Forget all turns; the system prompt stays."""
        self.messages = [] if self._system is None else [{"role": "system", "content": self._system}]

    def send(self, text: str, **overrides: Unpack[DecodeOptions]) -> GenerationResult:
        """Say something and return the answer."""
        turn = self.stream(text, **overrides)
        for _ in turn:
            pass
        return turn.result

    def stream(self, text: str, **overrides: Unpack[DecodeOptions]) -> "Turn":
        """Say something and stream the answer. A cancelled answer is kept as far as it was written."""
        asked = [*self.messages, {"role": "user", "content": text}]
        return Turn(self, asked, self._orthrus.stream(asked, **(self._decode | overrides)))


def _is_list_of_prompts(prompt: object) -> bool:
    """Whether this is several prompts; chat messages are one prompt, a list of mappings."""
    return isinstance(prompt, list) and not any(isinstance(each, Mapping) for each in prompt)


class Turn(Iterator[Cycle]):
    """One answer of a conversation, as it is decoded."""

    def __init__(self, conversation: Conversation, asked: list[Message], tokens: TokenStream) -> None:
        self._conversation = conversation
        self._asked = asked
        self._tokens = tokens

    def __next__(self) -> Cycle:
        cycle = next(self._tokens)
        if cycle.finish_reason is not None:
            answer = {"role": "assistant", "content": self._tokens.result.text}
            self._conversation.messages = [*self._asked, answer]
        return cycle

    def cancel(self) -> None:
        self._tokens.cancel()

    @property
    def result(self) -> GenerationResult:
        return self._tokens.result


def _listed(name: str, values: Any) -> tuple[Any, ...]:
    """Values as a tuple, None as none of them; UserInputError for what is no list."""
    if values is None:
        return ()
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise UserInputError(f"{name} must be a list, not {values!r}.")
    return tuple(values)


def _check_keywords(decode: Mapping[str, Any]) -> None:
    """UserInputError, with a suggestion, for a keyword that `decode_config` does not have."""
    for name in decode:
        if name not in DecodeOptions.__annotations__:
            close = get_close_matches(name, DecodeOptions.__annotations__, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]}?" if close else "see help(orthrus.api.decode_config)."
            raise UserInputError(f"there is no setting '{name}'; {hint}")


def decode_config(
    *,
    max_new_tokens: int = 256,
    strategy: Strategy = "auto",
    block_size: int | None = None,
    node_budget: int = 24,
    block_budget: int = 3,
    floor: bool = True,
    copies: bool = True,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    frequency_penalty: float = 0.0,
    presence_penalty: float = 0.0,
    logit_bias: Mapping[int, float] | None = None,
    seed: int | None = None,
    stop: str | Sequence[str] | None = None,
    stop_token_ids: Sequence[int] = (),
    min_tokens: int = 0,
    ignore_eos: bool = False,
    logprobs: int | None = None,
    grammar: Grammar | None = None,
    priority: int = 0,
) -> DecodeConfig:
    """Make a checked DecodeConfig from the flat keywords of `generate`.

    strategy: ar, chain, tree, fused, fused_tree, or auto, which decides by the cost of passes on this machine and
    by the acceptance of drafts. The same seed gives the same text under each of them. Raises UserInputError for a
    value out of range; temperature 0 is greedy decoding.
    """
    return DecodeConfig(
        max_new_tokens=max_new_tokens,
        strategy=strategy,
        block_size=block_size,
        node_budget=node_budget,
        block_budget=block_budget,
        floor=floor,
        copies=copies,
        stop=(stop,) if isinstance(stop, str) else _listed("stop", stop),
        stop_token_ids=_listed("stop_token_ids", stop_token_ids),
        min_tokens=min_tokens,
        ignore_eos=ignore_eos,
        logprobs=logprobs,
        grammar=grammar,
        priority=priority,
        sampling=SamplingParams(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            frequency_penalty=frequency_penalty,
            presence_penalty=presence_penalty,
            logit_bias=logit_bias,
            seed=seed,
        ),
    )
