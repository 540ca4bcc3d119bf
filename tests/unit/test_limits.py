"""Limits of requests that no other test reaches."""

import os

import pytest
import torch

from orthrus.engine.limits import check_process
from orthrus.errors import UserInputError


def test_a_forked_process_is_told_to_load_the_model_itself() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        check_process(os.getpid())
        with pytest.raises(UserInputError, match="before the process forked"):
            check_process(os.getppid())
        # One thread waits for nobody.
        torch.set_num_threads(1)
        check_process(os.getppid())
    finally:
        torch.set_num_threads(before)
