"""Structured output: the tokens that a grammar allows, after the text and after every path of a draft tree.

llguidance (the extra `grammar`) does the work. A mask is a function of the committed tokens only, so drafts under masks
give the text that plain decoding under masks gives.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from orthrus.config import Grammar
from orthrus.errors import MissingExtraError, UnsupportedModelError, UserInputError

if TYPE_CHECKING:
    from llguidance import LLMatcher

T = TypeVar("T")
COMPILE_SECONDS = 20.0
"""Longest wait for a grammar to compile. Usual ones take milliseconds."""
STACK_BYTES = 2**28
"""Stack of the compiling thread, because the compiler follows long chains of rules by recursion."""
NUM_KEPT = 32
"""Number of compiled grammars that are kept: the most recently used ones."""
WHITESPACE = r"(\x20|\x0A[\x20\x09]{0,16})"
"""Whitespace between the parts of JSON: a space, or a new line and its indent. Without this limit, weak models may
write whitespace for ever."""
MOST_COMPILING = 4
"""Limit on grammars that compile at the same time, timed-out ones included, because they cannot be stopped."""


class GrammarCompiler:
    """Compiles grammars for one model. Many threads may use it.

    tokenizer: a fast tokenizer of transformers. eos_token_ids: the model's own. vocab_size: of its logits.
    Raises MissingExtraError without llguidance, UnsupportedModelError for a tokenizer that it cannot read.
    """

    def __init__(self, tokenizer: Any, eos_token_ids: Collection[int], vocab_size: int) -> None:
        try:
            from llguidance import LLTokenizer
        except ImportError:
            raise MissingExtraError(
                'a grammar needs the package llguidance; run `pip install "orthrus-lm[grammar]"`.'
            ) from None
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UnsupportedModelError(
                "a grammar needs the model's tokenizer.json, but its tokenizer has none; "
                "convert it to a fast tokenizer."
            )
        ends = sorted(token_id for token_id in eos_token_ids if token_id < vocab_size)
        if not ends:
            raise UnsupportedModelError(
                "a grammar needs a token that ends the text, but the model names none; "
                "set eos_token_id in its generation_config.json."
            )
        settings = {**json.loads(backend.to_str()), "padding": None, "truncation": None}
        num_ids = max(vocab_size, backend.get_vocab_size(with_added_tokens=True))
        try:
            self._tokenizer = LLTokenizer(json.dumps(settings), n_vocab=num_ids, eos_token=ends)
        except (ValueError, RuntimeError) as error:
            raise UnsupportedModelError(
                f"llguidance cannot read the model's tokenizer ({_gist(str(error))}); drop the grammar."
            ) from None
        self._vocab_size = vocab_size
        self._end_ids = tuple(ends)
        self._kept: OrderedDict[Grammar, LLMatcher] = OrderedDict()
        # Grammars that took too long, which are not tried again.
        self._too_slow: OrderedDict[Grammar, None] = OrderedDict()
        self._lock, self._starting = threading.Lock(), threading.Lock()
        self._compiling = threading.BoundedSemaphore(MOST_COMPILING)

    def state(self, grammar: Grammar) -> "GrammarState":
        """The state before the first token of a text.

        Raises UserInputError for a grammar that is wrong, not supported, or takes too long to compile.
        """
        with self._lock:
            if grammar in self._kept:
                self._kept.move_to_end(grammar)
                return self._new_state(grammar)
            if grammar in self._too_slow:
                raise _gave_up(grammar)
        matcher = self._compiled(grammar)
        with self._lock:
            _remember(self._kept, grammar, matcher)
            return self._new_state(grammar)

    def _new_state(self, grammar: Grammar) -> "GrammarState":
        state = GrammarState(self._kept[grammar].deep_copy(), self._vocab_size, self._end_ids)
        # Raises UserInputError if no token may begin a text, such as behind an end of text.
        state.mask()
        return state

    def _compiled(self, grammar: Grammar) -> "LLMatcher":
        made: list[LLMatcher | Exception] = []

        def make() -> None:
            try:
                made.append(self._matcher(grammar))
            except Exception as error:
                made.append(error)
            finally:
                self._compiling.release()

        if not self._compiling.acquire(timeout=COMPILE_SECONDS):
            raise UserInputError("grammars that take too long keep the compiler busy; try again in a minute.")
        # A separate thread has a larger stack, and lets us give up waiting.
        with self._starting:
            size = threading.stack_size(STACK_BYTES)
            try:
                thread = threading.Thread(target=make, name="orthrus-grammar", daemon=True)
                thread.start()
            except RuntimeError:
                self._compiling.release()
                raise
            finally:
                threading.stack_size(size)
        thread.join(COMPILE_SECONDS)
        if not made:
            with self._lock:
                _remember(self._too_slow, grammar, None)
            raise _gave_up(grammar)
        if isinstance(made[0], Exception):
            raise made[0]
        return made[0]

    def _matcher(self, grammar: Grammar) -> "LLMatcher":
        from llguidance import LLMatcher

        try:
            matcher = LLMatcher(self._tokenizer, _serialised(grammar), log_level=0)
            if not matcher.is_error():
                # The first mask builds the state that all copies share, and detects a grammar that is too complex.
                matcher.compute_bitmask()
            error = matcher.get_error()
        except ValueError as wrong:
            error = str(wrong)
        if error:
            raise UserInputError(
                f"the {grammar.kind} grammar cannot be used: {_gist(error)}; correct or simplify it."
            )
        return matcher


def _remember(known: OrderedDict[Grammar, T], grammar: Grammar, value: T) -> None:
    known[grammar] = value
    while len(known) > NUM_KEPT:
        known.popitem(last=False)


def _gave_up(grammar: Grammar) -> UserInputError:
    return UserInputError(
        f"the {grammar.kind} grammar did not compile within {COMPILE_SECONDS:g} s; simplify it."
    )


class GrammarState:
    """The state of one text in its grammar, from `GrammarCompiler.state`. Not for use by two threads at once.

    Masks are bool over the vocabulary of the model's logits, on the CPU: True where a token may come next. They are
    shared, so do not write to them. Tokens that end the text are allowed exactly where the grammar is satisfied.
    """

    def __init__(self, matcher: "LLMatcher", vocab_size: int, end_ids: tuple[int, ...]) -> None:
        self._fresh, self._matcher = matcher, matcher.deep_copy()
        self._vocab_size, self._end_ids = vocab_size, list(end_ids)
        self._text: list[int] = []
        self._ended = False
        # The path after the text that the matcher has read, and the masks of paths that were asked for since.
        self._at: tuple[int, ...] = ()
        self._known: dict[tuple[int, ...], Tensor | None] = {}

    @property
    def done(self) -> bool:
        """Whether the text is complete, so that nothing but its end is allowed."""
        if self._ended:
            return True
        others_V = self.mask().clone()
        others_V[self._end_ids] = False
        return not bool(others_V.any())

    def mask(self) -> Tensor:
        """The mask after the committed text. After the text's end, it allows the tokens that end a text.

        Raises UserInputError if the grammar became too complex, or allows no token.
        """
        mask_V = self._mask_after(())
        if mask_V is None:
            raise UserInputError(
                f"the grammar allows no token after {len(self._text)} "
                f"({_gist(self._matcher.get_error()) or 'a dead end'}); correct or simplify it."
            )
        return mask_V

    def advance(self, token_id: int) -> None:
        """Commit a token that the mask allows.

        Raises UserInputError if the grammar does not allow it.
        """
        if not 0 <= token_id < self._vocab_size or not self.mask()[token_id]:
            raise UserInputError(f"token {token_id} breaks the grammar; choose tokens that the mask allows.")
        if token_id in self._end_ids:
            self._ended = True
            self._known.clear()
            return
        if not self._go_to((token_id,)):
            raise UserInputError(
                f"the grammar became too complex after {len(self._text)} tokens "
                f"({_gist(self._matcher.get_error())}); simplify it."
            )
        self._text.append(token_id)
        self._at = ()
        # Keep the masks of paths that begin with this token.
        self._known = {path[1:]: mask_V for path, mask_V in self._known.items() if path[:1] == (token_id,)}

    def masks_for_paths(self, parents: Sequence[int], token_ids: Sequence[int]) -> tuple[Tensor, list[bool]]:
        """(masks_RV after each row of a draft tree, the root's first; for each node, whether it is allowed).

        parents, token_ids: as in `DraftTree`. A node is allowed if its parent is, and the mask after the parent allows
        its token. Nothing may follow an end of text. Rows of other nodes have masks without meaning. Nothing is
        committed. Raises UserInputError as `mask` does, for the text only. A path with no allowed next token is itself
        not allowed.
        """
        num_rows = len(token_ids) + 1
        masks_RV = torch.zeros(num_rows, self._vocab_size, dtype=torch.bool)
        masks_RV[:, self._end_ids] = True
        masks_RV[0] = self.mask()
        allowed = [True] + [False] * len(token_ids)
        if self._ended:
            return masks_RV, allowed[1:]
        children: list[list[int]] = [[] for _ in range(num_rows)]
        for row, parent in enumerate(parents, start=1):
            children[parent].append(row)
        paths: list[tuple[int, ...]] = [()] * num_rows
        # Depth first, so that the matcher rolls back as seldom as possible.
        stack = children[0][::-1]
        while stack:
            row = stack.pop()
            parent, token_id = parents[row - 1], token_ids[row - 1]
            if not 0 <= token_id < self._vocab_size or not masks_RV[parent, token_id]:
                continue
            if token_id in self._end_ids:
                allowed[row] = True
                continue
            paths[row] = (*paths[parent], token_id)
            mask_V = self._mask_after(paths[row])
            if mask_V is not None:
                allowed[row], masks_RV[row] = True, mask_V
                stack += children[row][::-1]
        return masks_RV, allowed[1:]

    def forced(self, max_tokens: int) -> list[int]:
        """The next tokens, at most so many, as long as the mask allows exactly one token.

        Any logits choose these tokens. The last one may end the text. Nothing is committed.
        """
        found: list[int] = []
        mask_V: Tensor | None = self.mask()
        while mask_V is not None and len(found) < max_tokens and int(mask_V.count_nonzero()) == 1:
            token_id = int(mask_V.to(torch.uint8).argmax())
            found.append(token_id)
            if self._ended or token_id in self._end_ids:
                break
            mask_V = self._mask_after(tuple(found))
        return found

    def _mask_after(self, path: tuple[int, ...]) -> Tensor | None:
        """The mask after text and path; None if no token may follow. Shorter prefixes of the path must be allowed."""
        if path not in self._known:
            self._known[path] = self._mask_here() if self._go_to(path) else None
        return self._known[path]

    def _go_to(self, path: tuple[int, ...]) -> bool:
        """Move the matcher to the end of text and path; False if it fails on the way."""
        num_common = next(
            (i for i, (a, b) in enumerate(zip(self._at, path, strict=False)) if a != b),
            min(len(self._at), len(path)),
        )
        num_back = len(self._at) - num_common
        if self._matcher.is_error() or (num_back and not self._matcher.rollback(num_back)):
            # A matcher in an error state never leaves it.
            self._matcher, num_common = self._fresh.deep_copy(), 0
            for token_id in self._text:
                self._matcher.compute_bitmask()
                self._matcher.consume_token(token_id)
        self._at = path[:num_common]
        for token_id in path[num_common:]:
            if not self._matcher.consume_token(token_id):
                return False
            self._at = (*self._at, token_id)
        return True

    def _mask_here(self) -> Tensor | None:
        """The mask at the matcher's current place; None if it failed, or allows no token."""
        if self._ended or self._matcher.is_stopped():
            if self._matcher.is_error():
                return None
            mask_V = torch.zeros(self._vocab_size, dtype=torch.bool)
            mask_V[self._end_ids] = True
            return mask_V
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            return None
        mask_V = torch.from_numpy(np.unpackbits(bits, bitorder="little")[: self._vocab_size].view(np.bool_))
        mask_V[self._end_ids] = self._matcher.is_accepting()
        return mask_V if bool(mask_V.any()) else None


def _serialised(grammar: Grammar) -> str:
    """The grammar in llguidance's own form. Raises ValueError for a syntax error."""
    from llguidance import LLMatcher

    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(grammar.text)
    if grammar.kind == "lark":
        return LLMatcher.grammar_from_lark(grammar.text)
    schema = grammar.text if grammar.kind == "json_schema" else '{"type": "object"}'
    return LLMatcher.grammar_from_json_schema(schema, whitespace_setting(compact=grammar.compact))  # type: ignore[arg-type]


def whitespace_setting(*, compact: bool) -> dict[str, bool | str]:
    """The whitespace that is allowed between the parts of JSON, as a setting for llguidance's `x-guidance`."""
    return {"whitespace_flexible": False} if compact else {"whitespace_pattern": WHITESPACE}


def _gist(message: str) -> str:
    """The main part of a message from llguidance, in one printable line."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    said = next((line.removeprefix("error:") for line in lines if line.startswith("error:")), "")
    line = (said or (lines[0] if lines else "")).strip().rstrip(".")
    line = "".join(char if char.isprintable() else "?" for char in line)
    return line if len(line) <= 200 else line[:200] + "..."
