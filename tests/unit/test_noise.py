"""Noise by position: its bits against plain integers, its statistics, and what it does not depend on."""

import pytest
import torch
from scipy import stats

from orthrus.decoding.noise import choice_seed, exponential_noise, hashed, row_key

SIGNIFICANCE = 1e-3
MASK = 2**64 - 1
PINNED_KEYS = [5197578548964807871, 13309476754707697221, 3330812531424781132]
PINNED_SEEDS = [4549328106503812490, 5209372491950445310]
PINNED_NOISE = [
    [0.5212222, 0.6268557, 1.244834],
    [1.365663, 0.4095064, 0.2451258],
    [0.3804232, 1.087428, 1.340651],
]


def slow_mix(value: int) -> int:
    """SplitMix64's finaliser as it is published."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def slow_bits(key: int, token_id: int) -> int:
    """The high 31 bits, which the last shift leaves alone."""
    return slow_mix(slow_mix(token_id * 0x9E3779B97F4A7C15 & MASK) ^ key) >> 33


def rows(seed: int, positions: range | list[int], vocab_size: int = 1000) -> torch.Tensor:
    return exponential_noise(seed, positions, vocab_size, "cpu")


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**63 - 1])
@pytest.mark.parametrize("position", [0, 1, 2**20])
def test_the_bits_are_those_of_plain_integers(seed: int, position: int) -> None:
    key = row_key(seed, position)
    assert key == (
        slow_mix(slow_mix((seed + 0x9E3779B97F4A7C15) & MASK) + position * 0x9E3779B97F4A7C15 & MASK)
    )
    keys_R1 = torch.tensor([[key - 2**64 if key >= 2**63 else key]])
    bits = [(int(b) & MASK) >> 33 for b in hashed(keys_R1, 300)[0]]
    assert bits == [slow_bits(key, token_id) for token_id in range(300)]


def test_the_bits_never_change() -> None:
    """A text must be the same with the next version: these numbers are a promise."""
    keys = [row_key(seed, position) for seed, position in ((0, 0), (7, 1), (2**63 - 1, 2**20))]
    assert keys == PINNED_KEYS
    noise_RV = torch.stack(
        [exponential_noise(s, [p], 3, "cpu")[0] for s, p in ((0, 0), (7, 1), (2**63 - 1, 2**20))]
    )
    torch.testing.assert_close(noise_RV, torch.tensor(PINNED_NOISE), rtol=1e-5, atol=0.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares with a GPU")
def test_the_bits_are_the_same_on_a_gpu() -> None:
    keys_R1 = torch.tensor([[5], [-7], [2**62]])
    assert torch.equal(hashed(keys_R1, 5000), hashed(keys_R1.cuda(), 5000).cpu())
    here, there = (exponential_noise(3, range(9), 5000, device) for device in ("cpu", "cuda"))
    torch.testing.assert_close(here, there.cpu(), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize(
    ("seeds", "positions", "token_ids"),
    [
        pytest.param([5], [3], range(49152), id="one row"),
        pytest.param([2**63 - 1], [2**20], range(49152), id="largest"),
        pytest.param([9], range(20000), [17], id="one token over positions"),
        pytest.param(range(6000), [40], [17], id="one token over seeds"),
        pytest.param(range(2**63 - 100, 2**63), range(2**20 - 20, 2**20), range(10), id="a corner"),
    ],
)
def test_the_law_is_exponential(seeds: range, positions: range, token_ids: range) -> None:
    noise = torch.cat([rows(s, positions, max(token_ids) + 1)[:, list(token_ids)].flatten() for s in seeds])
    assert stats.kstest(noise.numpy(), "expon").pvalue > SIGNIFICANCE
    # Bins of equal mass, down to those that only the first bits of the integers decide.
    bins = (-torch.expm1(-noise.double()) * 64).long().clamp_max(63)
    assert stats.chisquare(bins.bincount(minlength=64)).pvalue > SIGNIFICANCE


def test_small_noise_is_exponential_too() -> None:
    """Rare tokens win by noise near 0: below 1e-4 it must still be as fine as float32."""
    noise = rows(0, range(200), 20000).flatten()
    small = noise[noise < 1e-4]
    assert 300 < len(small) < 500
    assert stats.kstest(small.numpy() / 1e-4, "uniform").pvalue > SIGNIFICANCE
    assert len(small.unique()) == len(small)
    assert noise.min() > 0.0
    assert noise.max() < 17.0


@pytest.mark.parametrize("lag", [1, 2, 3, 64, 1024])
@pytest.mark.parametrize("along", ["positions", "seeds", "token ids"])
def test_neighbours_are_independent(along: str, lag: int) -> None:
    num = 400
    if along == "seeds":
        noise_NV = torch.cat([rows(seed, [5], num + lag) for seed in (*range(num), *range(lag, num + lag))])
        a, b = noise_NV.split(num)
    elif along == "positions":
        a, b = rows(5, range(num), num), rows(5, range(lag, num + lag), num)
    else:
        noise_NV = rows(5, range(num), num + lag)
        a, b = noise_NV[:, :num], noise_NV[:, lag:]
    uniform_a, uniform_b = (-torch.expm1(-n[:, :num].double().flatten()) for n in (a, b))
    cells = ((uniform_a * 8).long() * 8 + (uniform_b * 8).long()).bincount(minlength=64)
    # 160,000 pairs show a dependence of Cohen's w 0.02 with power above 0.99.
    assert stats.chisquare(cells, torch.full((64,), num * num / 64.0)).pvalue > SIGNIFICANCE
    assert stats.pearsonr(uniform_a, uniform_b).pvalue > SIGNIFICANCE
    both_small = (uniform_a < 0.01) & (uniform_b < 0.01)
    assert stats.binomtest(int(both_small.sum()), num * num, 1e-4).pvalue > SIGNIFICANCE


def test_no_two_cells_share_their_bits() -> None:
    keys = {row_key(seed, position) for seed in (*range(300), 2**63 - 1) for position in range(300)}
    assert len(keys) == 301 * 300
    keys_R1 = torch.tensor([key - 2**63 for key in sorted(keys)[:50]])[:, None]
    assert len(hashed(keys_R1, 4096).unique()) == 50 * 4096


def test_seeds_and_positions_are_not_interchangeable() -> None:
    assert not torch.equal(rows(1, [2]), rows(2, [1]))
    assert not torch.equal(rows(0, [1]), rows(1, [0]))


def test_a_row_is_the_same_alone_and_in_a_batch() -> None:
    positions = [7, 3, 3, 2**20, 7, 0]
    batch_RV = rows(11, positions)
    assert batch_RV.dtype == torch.float32
    for noise_V, position in zip(batch_RV, positions, strict=True):
        assert torch.equal(noise_V, rows(11, [position])[0])
    # A smaller vocabulary sees the beginning of the same row; asking again changes nothing.
    assert torch.equal(rows(11, positions, 300), batch_RV[:, :300])
    assert torch.equal(rows(11, positions), batch_RV)
    assert rows(11, []).shape == (0, 1000)


def test_a_row_may_be_changed_without_harm() -> None:
    first = rows(1, [4])
    kept = first.clone()
    first.zero_()
    assert torch.equal(rows(1, [4]), kept)


def test_every_choice_has_a_seed_of_its_own_and_the_first_one_the_requests() -> None:
    for seed in (0, 1, 2**63 - 1):
        seeds = [choice_seed(seed, index) for index in range(1000)]
        assert seeds[0] == seed
        assert len(set(seeds)) == 1000
        assert all(0 <= derived < 2**63 for derived in seeds)
    # A promise, as the noise itself is.
    assert [choice_seed(7, index) for index in (1, 2)] == PINNED_SEEDS
