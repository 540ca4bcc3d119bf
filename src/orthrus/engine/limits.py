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
            f"the prompt has {len(prompt_ids)} tokens, but the model's context holds {context_length}; "
            "shorten it."
        )


def check_token_ids(dual: DualView, token_ids: list[int]) -> None:
    """UserInputError for an id that the model has no embedding for."""
    num_ids = dual.vocab_size
    wrong = next((i for i in token_ids if type(i) is not int or not 0 <= i < num_ids), None)
    if wrong is not None:
        raise UserInputError(f"the prompt has token id {wrong!r}, but the model knows 0 to {num_ids - 1}.")


def check_block_size(dual: DualView, block_size: int | None) -> int:
    """The block size asked for, or the view's own; UserInputError when larger than the view's."""
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
    """UserInputError in a process that was forked from `pid`, which made the engine: its threads are not here, and the
    first pass would wait for them for ever. One thread has none to wait for."""
    if os.getpid() != pid and torch.get_num_threads() > 1:
        raise UserInputError(
            "this model was loaded before the process forked: load it in each process, or start processes with "
            'multiprocessing.get_context("spawn").'
        )
