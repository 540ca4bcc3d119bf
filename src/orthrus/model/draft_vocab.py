"""A draft vocabulary: drafts are projected only to the most frequent ids, which costs less than to all ids.

The text stays the same, because the AR view still writes the ids that drafts cannot propose.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from orthrus.errors import UserInputError
from orthrus.model.dual_view import DualView
from orthrus.model.int8_linear import Int8Linear

LEAST_IDS = 16


def limit_drafts(dual: DualView, num_ids: int, also: frozenset[int] = frozenset()) -> None:
    """Let drafts propose only the `num_ids` most frequent ids, and those of `also`.

    Tokenizers number their merges from the most frequent one on, so the lowest ids are taken. Raises UserInputError for
    a number that is too small, or not below the vocabulary, and for a head whose rows cannot be taken.
    """
    if not LEAST_IDS <= num_ids < dual.vocab_size:
        raise UserInputError(
            f"draft_vocab must lie between {LEAST_IDS} and {dual.vocab_size - 1} here, not {num_ids}."
        )
    # A tokenizer may have ids for which the model has no row.
    ids = sorted(i for i in {*range(num_ids), *also} if i < dual.vocab_size)
    ids_N = torch.tensor(ids, device=dual.device)
    head = dual.draft_head or dual.base.get_output_embeddings()
    dual.draft_head, dual.draft_ids_N = _rows(head, ids_N), ids_N


def single_characters(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids of single ASCII characters, with or without a leading space; in SentencePiece the highest ids."""
    pieces = ((piece.strip("\u2581\u0120"), i) for piece, i in tokenizer.get_vocab().items())
    return frozenset(i for piece, i in pieces if len(piece) <= 1 and piece.isascii())


def _rows(head: nn.Module | None, ids_N: Tensor) -> nn.Module:
    """The linear layer with some of a head's outputs."""
    if type(head) is Int8Linear:
        scales_V, bias_V = (getattr(head, name) for name in ("scales_N", "bias"))
        bias_N = None if bias_V is None else bias_V[ids_N]
        return Int8Linear(head.weight[ids_N], scales_V[ids_N], bias_N)
    if type(head) is not nn.Linear or type(head.weight) is not nn.Parameter:
        raise UserInputError("this model's head is quantised or of its own kind: leave out draft_vocab.")
    rows = nn.Linear(head.in_features, len(ids_N), bias=head.bias is not None, device="meta")
    rows.weight = nn.Parameter(head.weight.detach()[ids_N], requires_grad=False)
    if head.bias is not None:
        rows.bias = nn.Parameter(head.bias.detach()[ids_N], requires_grad=False)
    return rows
