"""Limits of a request, checked before it is accepted."""

import os

import torch

from orthrus.errors import UserInputError
from orthrus.model.dual_view import DualView


def check_prompt(prompt_ids: list[int], context_length: int) -> None:
    """Raises UserInputError unless there is a prompt and room for an answer after it."""
    if not prompt_ids:
        raise UserInputError("the prompt is empty; give at least one token.")
    if len(prompt_ids) >= context_length:
        raise UserInputError(
            f"the prompt has {len(prompt_ids)} tokens, but the context holds {context_length}; shorten it."
        )


def check_token_ids(dual: DualView, token_ids: list[int]) -> None:
    """Raises UserInputError for an id without an embedding."""
    num_ids = dual.vocab_size
    wrong = next((i for i in token_ids if type(i) is not int or not 0 <= i < num_ids), None)
    if wrong is not None:
        raise UserInputError(
            f"the prompt has token id {wrong!r}, but the model knows 0 to {num_ids - 1}; use ids of its tokenizer."
        )


def check_block_size(dual: DualView, block_size: int | None) -> int:
    """The requested block size, or else the view's own. Raises UserInputError if it is larger than the view's."""
    trained = dual.config.block_size
    if block_size is None:
        return trained
    if block_size > trained:
        raise UserInputError(
            f"block_size {block_size} is larger than the {trained} of this view; choose 2 to {trained}, "
            "or make a view with larger blocks."
        )
    return block_size


def check_process(pid: int) -> None:
    """Raises UserInputError in a process that was forked from `pid`, which made the engine.

    The threads of the parent do not exist here, so the first pass would wait for ever. With one thread it would not.
    """
    if os.getpid() != pid and torch.get_num_threads() > 1:
        raise UserInputError(
            "this model was loaded before the process forked: load it in each process, or start processes with "
            'multiprocessing.get_context("spawn").'
        )
