"""The distance of two samples of text: maximum mean discrepancy with a Hamming kernel, prompt by prompt.

The method is that of Model Equality Testing (arXiv 2410.20247). The kernel of two texts is the share of their first
characters that agree. Permuting the labels within each prompt gives the distribution under the null hypothesis.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NUM_CHARACTERS = 100
_TOGETHER = 2_000
"""Permutations in one batch."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two samples of one prompt, and the greedy text that a biased sampler repeats.

    kernel_NN: the kernel between all texts, in the order first sample, second sample, greedy text. num: texts of each
    sample.
    """

    kernel_NN: Tensor
    num: int

    @classmethod
    def of(cls, first: Sequence[str], second: Sequence[str], biased: str) -> "Pair":
        assert len(first) == len(second), "both samples are of one size"
        codes_NL = torch.tensor([_codes(text) for text in (*first, *second, biased)])
        kernel_NN = torch.stack([(codes_NL == codes_L).double().mean(-1) for codes_L in codes_NL])
        return cls(kernel_NN, len(first))

    def distance(self) -> float:
        """The distance of the two samples."""
        first_M, second_M = self._counts()
        return float(self._distances(first_M[None], second_M[None]))

    def permuted(self, num_permutations: int, generator: torch.Generator) -> Tensor:
        """The distance under permuted labels, distances_P."""
        num, both_M = self.num, sum(self._counts())
        found = []
        for start in range(0, num_permutations, _TOGETHER):
            size = min(_TOGETHER, num_permutations - start)
            order_PN = torch.rand(size, 2 * num, generator=generator).argsort(-1)
            first_PM = torch.zeros(size, 2 * num + 1, dtype=torch.float64).scatter(1, order_PN[:, :num], 1.0)
            found.append(self._distances(first_PM, both_M - first_PM))
        return torch.cat(found)

    def biased(self, hits_BN: Tensor) -> Tensor:
        """The distance after the texts in hits_BN (bool) of the second sample became the greedy text, distances_B."""
        hit_BN = hits_BN.double()
        second_BM = torch.cat([torch.zeros_like(hit_BN), 1.0 - hit_BN, hit_BN.sum(-1, keepdim=True)], -1)
        return self._distances(self._counts()[0][None], second_BM)

    def _counts(self) -> tuple[Tensor, Tensor]:
        """How often each text occurs in the first sample, and in the second one: (first_M, second_M)."""
        place_M = torch.arange(2 * self.num + 1)
        is_first_M = place_M < self.num
        return is_first_M.double(), (~is_first_M & (place_M < 2 * self.num)).double()

    def _distances(self, first_PM: Tensor, second_PM: Tensor) -> Tensor:
        """The distance of samples that hold each text so often, distances_P."""
        across_P = ((second_PM @ self.kernel_NN) * first_PM).sum(-1)
        within_P = self._means_of_others(first_PM) + self._means_of_others(second_PM)
        return within_P - 2 * across_P / self.num**2

    def _means_of_others(self, counts_PM: Tensor) -> Tensor:
        """The mean kernel of two different draws, which may be the same text."""
        sums_P = ((counts_PM @ self.kernel_NN) * counts_PM).sum(-1)
        alone_P = (counts_PM * self.kernel_NN.diagonal()).sum(-1)
        return (sums_P - alone_P) / (self.num * (self.num - 1))


def p_value(distance: float, permuted_P: Tensor) -> float:
    """The share of permutations that give at least this distance; the real labels count as one of them."""
    # The tolerance keeps permutations that equal the real labels up to rounding.
    num_as_far = int((permuted_P >= distance - 1e-6).sum())
    return (1 + num_as_far) / (1 + len(permuted_P))


def _codes(text: str) -> list[int]:
    """The first characters' code points, and -1 after the end."""
    codes = [ord(character) for character in text[:NUM_CHARACTERS]]
    return codes + [-1] * (NUM_CHARACTERS - len(codes))
