"""Counted operations against the formula, gradients and losses with gradients of their own included."""

import torch

from orthrus.training.losses import row_losses
from orthrus.training.speed import FlopCounter, dtype_advice, matmul_peak


def test_products_are_counted_forward_and_backward() -> None:
    a, b = torch.randn(3, 5, requires_grad=True), torch.randn(5, 7, requires_grad=True)
    with FlopCounter() as counter:
        (a @ b).sum().backward()
    # Forward, and one product for the gradient of each factor.
    assert counter.total == 3 * 2 * 3 * 5 * 7


def test_a_loss_with_gradients_of_its_own_is_counted() -> None:
    num_rows, size, vocab_size = 4, 6, 11
    head = torch.nn.Linear(size, vocab_size, bias=False).requires_grad_(False)
    hidden_RC = torch.randn(num_rows, size, requires_grad=True)
    rows_R = torch.tensor([0, 1, 1, 2])
    with FlopCounter() as counter:
        losses = row_losses("kl", hidden_RC, torch.randn(3, size), rows_R, rows_R, head)
        losses.loss_R.sum().backward()
    # Each draft row there and back, each of the three teacher rows once.
    assert counter.total == 2 * size * vocab_size * (2 * num_rows + 3)


def test_the_peak_is_a_rate() -> None:
    assert matmul_peak(torch.float32) > 1e6


def test_bfloat16_that_is_slower_than_float32_is_told() -> None:
    cpu = torch.device("cpu")
    advice = dtype_advice(torch.bfloat16, cpu, peak=1.0)
    assert advice is not None
    assert "dtype=float32" in advice
    assert dtype_advice(torch.bfloat16, cpu, peak=1e18) is None
    assert dtype_advice(torch.float32, cpu, peak=1.0) is None
    assert dtype_advice(torch.bfloat16, torch.device("cuda"), peak=1.0) is None
