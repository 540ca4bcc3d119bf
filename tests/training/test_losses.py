"""Chunked losses against the plain formulas, and weights against brute force."""

import pytest
import torch

from orthrus.training.loss_kinds import LOSSES
from orthrus.training.losses import pointwise_loss, position_weights, row_losses


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("chunk_size", [1, 3, 64])
def test_chunked_equals_direct(kind, chunk_size):
    generator = torch.Generator().manual_seed(0)
    hidden_RC = torch.randn(17, 8, generator=generator, requires_grad=True)
    teacher_TC = torch.randn(6, 8, generator=generator)
    head_VC = torch.randn(23, 8, generator=generator)
    rows_R = torch.randint(6, (17,), generator=generator)
    corpus_R = torch.randint(23, (17,), generator=generator)
    weights_R = torch.rand(17, generator=generator)

    def head(h):
        return h @ head_VC.T

    direct_R = pointwise_loss(
        kind, head(hidden_RC).log_softmax(-1), head(teacher_TC)[rows_R].log_softmax(-1), corpus_R
    )
    (direct_grad,) = torch.autograd.grad((weights_R * direct_R).sum(), hidden_RC)
    ours = row_losses(kind, hidden_RC, teacher_TC, rows_R, corpus_R, head, chunk_size=chunk_size)
    (grad,) = torch.autograd.grad((weights_R * ours.loss_R).sum(), hidden_RC)
    torch.testing.assert_close(ours.loss_R, direct_R)
    torch.testing.assert_close(grad, direct_grad)
    p, q = head(teacher_TC)[rows_R].softmax(-1), head(hidden_RC).softmax(-1)
    torch.testing.assert_close(ours.overlap_R, torch.minimum(p, q).sum(-1).detach())
    assert torch.equal(ours.hit_R.bool(), p.argmax(-1) == q.argmax(-1))


def test_teacher_rows_are_projected_about_once():
    projected = []

    def head(h):
        projected.append((h.requires_grad, len(h)))
        return h @ torch.eye(8)

    rows_R = torch.arange(4).repeat(10)
    row_losses("kl", torch.randn(40, 8), torch.randn(4, 8), rows_R, rows_R, head, chunk_size=10)
    assert sum(n for grad, n in projected if not grad) == 4
    assert max(n for _, n in projected) == 10


def test_weights_are_what_their_names_say():
    overlap = torch.tensor([[[0.9, 0.5, 0.2]]])
    valid = torch.tensor([[[True, True, False]]])
    assert position_weights("uniform", overlap, valid).tolist() == [[[1.0, 1.0, 0.0]]]
    decay = position_weights("decay", overlap, valid, gamma=2.0)
    torch.testing.assert_close(decay, torch.tensor([[[1.0, 0.6065307, 0.0]]]))
    chance = [0.5 * 0.9 + 0.5, 0.5 * 0.5 + 0.5]
    expected = [chance[0] + chance[0] * chance[1], chance[0] * chance[1], 0.0]
    torch.testing.assert_close(position_weights("dpace", overlap, valid), torch.tensor([[expected]]))


def test_no_rows_are_no_loss():
    empty = torch.empty(0, dtype=torch.long)
    losses = row_losses("kl", torch.empty(0, 8), torch.randn(4, 8), empty, empty, torch.nn.Linear(8, 5))
    assert all(len(values_R) == 0 for values_R in losses)
