"""How far apart two samples of text are: maximum mean discrepancy with a Hamming kernel, prompt by prompt.

As in Model Equality Testing (arXiv 2410.20247): two texts are as alike as the share of their first characters
that agree, and what chance does is found by permuting the labels within each prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NUM_CHARACTERS = 100
_TOGETHER = 2_000
"""Permutations that are tried at once."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two samples of one prompt and the text that a biased sampler would fall for, as kernels_NN between all
    of them: the first sample, the second one, the biased text last. num: texts of each sample."""

    kernel_NN: Tensor
    num: int

    @classmethod
    def of(cls, first: Sequence[str], second: Sequence[str], biased: str) -> "Pair":
        assert len(first) == len(second), "both samples are of one size"
        codes_NL = torch.tensor([_codes(text) for text in (*first, *second, biased)])
        kernel_NN = torch.stack([(codes_NL == codes_L).float().mean(-1) for codes_L in codes_NL])
        return cls(kernel_NN, len(first))

    def distance(self, members: Tensor | None = None) -> float:
        """Of the first sample and the second one. members_N: which texts stand in the second one's place."""
        num = self.num
        first_N = torch.arange(num)
        second_N = torch.arange(num, 2 * num) if members is None else members
        within = self._mean_of_others(first_N) + self._mean_of_others(second_N)
        return within - 2 * float(self.kernel_NN[first_N][:, second_N].mean())

    def _mean_of_others(self, members_N: Tensor) -> float:
        """The mean likeness of two different draws, which may be the same text."""
        block_NN = self.kernel_NN[members_N][:, members_N]
        return float(block_NN.sum() - block_NN.diagonal().sum()) / (self.num * (self.num - 1))

    def permuted(self, num_permutations: int, generator: torch.Generator) -> Tensor:
        """The distance under random labels, distances_P."""
        num = self.num
        kernel_NN = self.kernel_NN[:-1, :-1].clone()
        kernel_NN.fill_diagonal_(0.0)
        found = []
        for start in range(0, num_permutations, _TOGETHER):
            size = min(_TOGETHER, num_permutations - start)
            order_PN = torch.rand(size, 2 * num, generator=generator).argsort(-1)
            first_PN = torch.zeros(size, 2 * num).scatter(1, order_PN[:, :num], 1.0)
            sums_PN = first_PN @ kernel_NN
            inside_P = (sums_PN * first_PN).sum(-1)
            across_P = (sums_PN * (1 - first_PN)).sum(-1)
            other_P = kernel_NN.sum() - inside_P - 2 * across_P
            found.append((inside_P + other_P) / (num * (num - 1)) - 2 * across_P / num**2)
        return torch.cat(found)

    def biased(self, share: float, generator: torch.Generator) -> float:
        """The distance once each text of the second sample is the biased one with this probability."""
        members_N = torch.arange(self.num, 2 * self.num)
        is_hit_N = torch.rand(self.num, generator=generator) < share
        return self.distance(torch.where(is_hit_N, torch.tensor(2 * self.num), members_N))


def p_value(distance: float, permuted_P: Tensor) -> float:
    """How often random labels give at least this distance, the labels at hand counted among them."""
    # Rounding must not turn labels that are as good as the real ones into worse ones.
    num_as_far = int((permuted_P >= distance - 1e-6).sum())
    return (1 + num_as_far) / (1 + len(permuted_P))


def _codes(text: str) -> list[int]:
    """The first characters' code points, and -1 after the end."""
    codes = [ord(character) for character in text[:NUM_CHARACTERS]]
    return codes + [-1] * (NUM_CHARACTERS - len(codes))
