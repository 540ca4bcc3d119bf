"""What one running request carries from pass to pass."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from orthrus.config import SamplingParams
from orthrus.decoding.acceptance import TreeOnDevice
from orthrus.decoding.noise import exponential_noise
from orthrus.decoding.pairs import given_the_prefix
from orthrus.decoding.processors import LogitRules
from orthrus.decoding.sampling import coupled_log_scores, draw_with_noise, filtered_probs
from orthrus.decoding.tree import Candidates
from orthrus.kernels.best import best_tokens, first_best
from orthrus.kernels.pairs import repaired_pairs
from orthrus.model.dual_view import DualView
from orthrus.model.slot_cache import SlotCache
from orthrus.types import CycleKind


@dataclass(slots=True, kw_only=True)
class DecodeState:
    """One stream. The anchor, its last committed token, is not in the cache yet: it stands at position
    `length`. block_size: rows of the blocks that are drafted next. drafts: what the diffusion view proposes
    after the anchor, None where it has not been asked; late: their block stood further back, so it has not
    seen all of the text before them. eos_token_ids end the text: no pass is spent on what comes after one
    that the host knows of. dear_reads: `reads_are_dear`."""

    dual: DualView
    cache: SlotCache
    sampling: SamplingParams
    seed: int
    rules: LogitRules
    block_size: int
    floor: bool
    context_length: int
    eos_token_ids: frozenset[int] = frozenset()
    num_candidates: int = 8
    dear_reads: bool = False
    anchor_id: int = 0
    drafts: Candidates | None = None
    late: bool = False
    _noise: dict[int, Tensor] = field(default_factory=dict)

    @property
    def length(self) -> int:
        return self.cache.lengths[0]

    @property
    def asks_once(self) -> bool:
        """Whether a pass may propose before the host knows what the AR view chose: see `reads_are_dear`."""
        return self.dear_reads and self.sampling.greedy and not self.rules.active

    def choose(
        self, logits_RV: Tensor, positions: Sequence[int], paths: Sequence[Sequence[int]]
    ) -> list[int]:
        """The AR view's own token for each row; positions: those that the rows decide.

        paths[r]: tokens that row r has seen beyond the committed ones. A sampled token is a function of seed
        and position, whoever asks and how often: so drafts cannot touch the text.
        """
        logits_RV = self.rules(logits_RV, paths)
        if self.sampling.greedy:
            return first_best(logits_RV).tolist()
        probs_RV = filtered_probs(logits_RV, self.sampling)
        return draw_with_noise(probs_RV, self._noise_at(positions, probs_RV.shape[-1])).tolist()

    def propose(self, hidden_DC: Tensor, first_position: int, logits_DV: Tensor | None = None) -> Candidates:
        """The best candidates of each draft row; the first decides `first_position`, after the anchor.

        hidden_DC: before the head; logits_DV: after it, where they are at hand.
        """
        ranked = self._rank(hidden_DC, first_position, logits_DV, slice(0, 1), self.anchor_id)
        return ranked.candidates(ranked.flat().tolist(), 0)

    def choose_and_propose(
        self, logits_RV: Tensor, tree: TreeOnDevice, hidden_BDC: Tensor, logits_BDV: Tensor | None
    ) -> tuple[list[int], Candidates]:
        """`choose` and `propose` with one read by the host, where `asks_once`: the device finds out which of
        the blocks the text goes on from. Where that is none the candidates mean nothing.

        hidden_BDC: of each block's guesses, that of its first row left out; logits_BDV: the same after the
        head, where they are at hand.
        """
        own_ids_R = first_best(logits_RV)
        serving = tree.serving(own_ids_R)
        ranked = self._rank(
            hidden_BDC[serving.index_1][0],
            0,
            None if logits_BDV is None else logits_BDV[serving.index_1][0],
            # Beyond the guesses nothing is left of the block, before them it does not serve.
            serving.first_1.clamp(0, hidden_BDC.shape[1] - 1),
            serving.anchor_1,
        )
        # Numbers up to 2**24 are exact in float32: ids and places are below.
        own_R, first_1 = own_ids_R.float(), serving.first_1.clamp_min(0).float()
        first, *read = torch.cat([first_1, own_R, ranked.flat()]).tolist()
        own_ids = [int(i) for i in read[: len(own_R)]]
        return own_ids, ranked.candidates(read[len(own_R) :], int(first))

    def choose_and_walk(self, logits_1V: Tensor, hidden_DC: Tensor, logits_DV: Tensor | None) -> Tensor:
        """The AR view's own token and the walk through the guesses after it, ids (1 + D,) that stay on the
        device, where `asks_once`. hidden_DC and logits_DV: of the guesses, as for `propose`."""
        own_1 = first_best(logits_1V)
        return torch.cat([own_1, self._rank(hidden_DC, 0, logits_DV, slice(0, 1), own_1).walk()])

    def _rank(
        self,
        hidden_DC: Tensor,
        first_position: int,
        logits_DV: Tensor | None,
        first: slice | Tensor,
        anchor: int | Tensor,
    ) -> "_Ranked":
        """The best candidates of draft rows, of which `first` follows the anchor; those before mean nothing.

        A repair head lets that row know the anchor, and each further candidate the one before it: see
        `Candidates.pairs_DPC`.
        """
        dual = self.dual
        logits_DV = dual.head(hidden_DC, drafts=True) if logits_DV is None else logits_DV
        scores_DV = self._scores(logits_DV, first_position)
        width = min(self.num_candidates, scores_DV.shape[-1])
        best_DC, ids_DC, all_D1 = best_tokens(scores_DV, width)
        alone_DC = best_DC - all_D1
        log_probs_DC = given_the_prefix(alone_DC)
        if dual.repair is None:
            log_probs_DC[first] = alone_DC[first]
            return _Ranked(ids_DC, log_probs_DC, None)
        parents_DP = ids_DC.roll(1, 0)
        parents_DP[first] = anchor
        temperature = 1.0 if self.sampling.greedy else self.sampling.temperature
        given_DPC = repaired_pairs(dual, hidden_DC, parents_DP, ids_DC, best_DC, all_D1, temperature)
        log_probs_DC[first] = given_DPC[first][:, 0]
        return _Ranked(ids_DC, log_probs_DC, given_the_prefix(given_DPC))

    def _scores(self, logits_DV: Tensor, first_position: int) -> Tensor:
        """Unnormalised log probs, scores_DV float32, by which draft rows rank their guesses.

        Sampled drafts rank by the same noise that the AR view's own choice will meet: where both laws agree,
        so do the tokens (arXiv 2408.07978).
        """
        logits_DV = self.rules(logits_DV, [()] * len(logits_DV))
        if self.sampling.greedy:
            return logits_DV.float()
        probs_DV = filtered_probs(logits_DV, self.sampling)
        positions = range(first_position, first_position + len(probs_DV))
        return coupled_log_scores(probs_DV, self._noise_at(positions, probs_DV.shape[-1]))

    def commit(self, token_ids: Sequence[int]) -> None:
        """Take note of tokens that are decided; the last one is the new anchor."""
        self.rules.see(token_ids)
        self.anchor_id = token_ids[-1]

    def _noise_at(self, positions: Sequence[int], vocab_size: int) -> list[Tensor]:
        """The rows of noise_RV; kept until passed, since drafting and verifying ask for the same."""
        new = [p for p in dict.fromkeys(positions) if p not in self._noise]
        if new:
            self._noise = {p: row for p, row in self._noise.items() if p >= self.length}
            rows = exponential_noise(self.seed, new, vocab_size, self.dual.device)
            self._noise |= zip(new, rows, strict=True)
        return [self._noise[p] for p in positions]


class _Ranked(NamedTuple):
    """Candidates as they lie on the device: ids_DC, log_probs_DC, pairs_DPC."""

    ids_DC: Tensor
    log_probs_DC: Tensor
    pairs_DPC: Tensor | None

    def walk(self) -> Tensor:
        """The token ids (D,) of `Candidates.walk`, without a look at a value."""
        ranks = [first_best(self.log_probs_DC[:1])]
        for position in range(1, len(self.ids_DC)):
            if self.pairs_DPC is None:
                row_1C = self.log_probs_DC[position : position + 1]
            else:
                row_1C = self.pairs_DPC[position].index_select(0, ranks[-1])
            ranks.append(first_best(row_1C))
        return self.ids_DC.gather(1, torch.stack(ranks))[:, 0]

    def flat(self) -> Tensor:
        """All tables in a row, so that one copy brings everything to the host. Ids are exact in float32."""
        return torch.cat([table.float().flatten() for table in self if table is not None])

    def candidates(self, flat: list[float], first: int) -> Candidates:
        """What `flat` has become on the host, without the rows before `first`."""
        num_rows, width = self.ids_DC.shape
        rows = [flat[i : i + width] for i in range(0, len(flat), width)]
        pairs = rows[2 * num_rows :]
        return Candidates(
            [[int(i) for i in row] for row in rows[first:num_rows]],
            rows[num_rows + first : 2 * num_rows],
            [[], *(pairs[i : i + width] for i in range((first + 1) * width, len(pairs), width))]
            if pairs
            else None,
        )


def reads_are_dear(device: torch.device) -> bool:
    """Whether the host waits for all that was launched when it reads a number: then it asks once a pass,
    and once a cycle of `chain`.

    The device decides on the way; on a CPU that would compute guesses which are known to be of no use.
    """
    return device.type != "cpu"


def num_candidates(dual: DualView) -> int:
    """Of each draft row; more with a repair head, which may raise what the block itself ranks low."""
    return 8 if dual.repair is None else 16


def timed_request(
    dual: DualView, cache: SlotCache, sampling: SamplingParams, context_length: int
) -> DecodeState:
    """A request with the view's own settings and no text, for whoever times passes."""
    return DecodeState(
        dual=dual,
        cache=cache,
        sampling=sampling,
        seed=0,
        rules=LogitRules(sampling, dual.vocab_size, dual.device),
        block_size=dual.config.block_size,
        floor=True,
        context_length=context_length,
        num_candidates=num_candidates(dual),
        dear_reads=reads_are_dear(dual.device),
    )


class Step(NamedTuple):
    """What a cycle committed, on the host. `is_draft` marks tokens that the diffusion view proposed."""

    kind: CycleKind
    token_ids: list[int]
    is_draft: list[bool]
    num_drafted: int
    num_passes: int
    num_rows: int
