"""Hidden states, weights and targets whose softmax has known statistics, and real ones from a file.

    untrained:    hidden ~ N(0, 1), weight ~ N(0, 0.02^2), targets uniform: the softmax is close to uniform.
    trained:      the probability of rank k is ~ k^-2: 49 are above 2^-12, and the entropy is 2.4 bits.
    soft:         the same with k^-1.6: 109 and 3.9 bits.
    uneven:       rows differ as those of a real head do; on average 53 are above 2^-12 and the entropy is 3.2 bits.
    uneven-soft:  the same with 116 and 5.2 bits.

The last four share the way in which they are made. The real head has 6 layers, V = 32768, D = 768, measured on held-out
text: 146 probabilities above 2^-12 and 4.1 bits a row.

1. A row has a law of its log-probabilities by rank. In `uneven` it draws a place u in [0, 1] among the real rows sorted
   by entropy and takes what is found there (`RANK_CURVES`), divided by a temperature. In the tenth of most certain
   rows the first token has 0.99, in that of the least certain 0.07.
2. Tokens have frequencies, and all but the most frequent eighth have a topic. A row's first 16 ranks are taken by
   frequent tokens, rank k by that of frequency rank r with a probability ~ (r + 2k)^-1.2, and the others, up to K, by
   all tokens of one topic. Tokens of a topic share most of their row of the weight, as those that compete do.
3. The K ranks are planted: the hidden state has exactly these logits there, and is random otherwise. The rest of the
   vocabulary has a normal distribution of logits around its prior, and the level of the planted ones is such that what
   the law has beyond rank K is left for the rest (`uneven`: what the real row has beyond rank 128, `TAIL_MASS`, times a
   factor). The prior of a token is a logit of -0.6 ln r; the last of the D features is the same number in all hidden
   states and carries it. Ids follow the frequency but for a factor of e^(1.2 * normal), as those of a BPE do.
4. Targets are drawn from the softmax of the finished, rounded hidden states and weight.

Figures above: V = 32768, D = 2304; at D = 768 they are within a tenth. With the real curves as they are (temperature 1,
K = 128, tail 1) and V = 32768:

    |                                                          | real head       | made, D = 2304   |
    |----------------------------------------------------------|-----------------|------------------|
    | mass in the 64, 512, 4096 first ids                      | 0.33 0.59 0.84  | 0.38 0.59 0.77   |
    | variance of a logit: between tokens, rest                | 0.7, 2.4        | 0.4, 1.6         |
    | (row, 256 ids) pairs needed at 2^-2, 2^-3, 2^-4, 2^-5    | .22 .32 .43 .53 | .30 .43 .54 .63  |

So they are harder to approximate than the real head is. Not matched: the count above 2^-12 ends at about K, where real
rows reach 400; a row has one topic; a real model is overconfident: its targets rank a little lower.
`python -m cce_inductor.bench --describe` prints what was achieved.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .shapes import Shape


@dataclass(frozen=True)
class Ranked:
    """All rows follow p ~ rank^-power."""

    power: float
    planted: int

    def shapes(self, planted: int, place: Tensor) -> tuple[Tensor, Tensor]:
        """(log of the share [rows, K] of each planted rank among the planted, mass of all others [rows])."""
        law = -self.power * torch.arange(1, 1_000_000, device=place.device, dtype=torch.float64).log()
        tail = law[planted:].exp().sum() / law.exp().sum()
        share = law[:planted].log_softmax(0).float()
        return share.expand(len(place), -1), tail.float().expand(len(place))


@dataclass(frozen=True)
class Uneven:
    """Rows like those of the real head, sharpened or flattened."""

    temperature: float
    planted: int
    tail: float

    def shapes(self, planted: int, place: Tensor) -> tuple[Tensor, Tensor]:
        """(log of the share [rows, K] of each planted rank among the planted, mass of all others [rows])."""
        curves = torch.tensor(RANK_CURVES, device=place.device)
        log_ranks = torch.tensor(RANKS, device=place.device).log()
        curves = _interpolate(curves, log_ranks, torch.arange(1, planted + 1, device=place.device).log())  # [10, K]
        middles = (torch.arange(len(RANK_CURVES), device=place.device) + 0.5) / len(RANK_CURVES)
        tails = torch.tensor(TAIL_MASS, device=place.device).log()[None]
        curve = _interpolate(curves.T, middles, place).T
        tail = self.tail * _interpolate(tails, middles, place)[0].exp()
        return (curve / self.temperature).log_softmax(1), tail


PROFILES: dict[str, Ranked | Uneven] = {
    "trained": Ranked(2.0, 160),
    "soft": Ranked(1.6, 160),
    "uneven": Uneven(0.92, 76, 0.45),
    "uneven-soft": Uneven(1.4, 113, 1.0),
}
DATA = ("untrained", *PROFILES)

RANKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
RANK_CURVES = (  # log-probabilities at RANKS, means over each tenth of the real rows, from certain to uncertain
    (-0.01, -6.30, -7.85, -8.56, -9.46, -10.09, -10.90, -11.44, -12.15, -12.61, -13.25, -13.70, -14.31, -14.74),
    (-0.07, -3.84, -5.44, -6.19, -7.05, -7.64, -8.35, -8.88, -9.58, -10.06, -10.72, -11.19, -11.84, -12.30),
    (-0.23, -2.59, -4.09, -5.04, -5.99, -6.61, -7.47, -7.98, -8.66, -9.16, -9.84, -10.31, -10.96, -11.41),
    (-0.47, -2.11, -3.13, -3.99, -5.03, -5.66, -6.45, -6.97, -7.69, -8.18, -8.88, -9.38, -10.05, -10.53),
    (-0.70, -2.11, -2.93, -3.44, -4.16, -4.65, -5.39, -5.88, -6.58, -7.07, -7.74, -8.20, -8.84, -9.29),
    (-1.00, -2.22, -2.83, -3.25, -3.80, -4.20, -4.83, -5.29, -5.92, -6.36, -7.00, -7.45, -8.09, -8.53),
    (-1.31, -2.36, -2.88, -3.25, -3.71, -4.06, -4.58, -4.94, -5.49, -5.87, -6.42, -6.83, -7.45, -7.89),
    (-1.72, -2.53, -2.99, -3.28, -3.70, -4.01, -4.46, -4.77, -5.26, -5.59, -6.10, -6.47, -7.02, -7.42),
    (-2.07, -2.82, -3.23, -3.49, -3.84, -4.10, -4.49, -4.76, -5.16, -5.45, -5.89, -6.21, -6.71, -7.07),
    (-2.69, -3.28, -3.59, -3.83, -4.15, -4.39, -4.70, -4.93, -5.28, -5.53, -5.92, -6.20, -6.62, -6.93),
)
TAIL_MASS = (0.0006, 0.0030, 0.0075, 0.0163, 0.0371, 0.0670, 0.1092, 0.1697, 0.2526, 0.4077)  # beyond rank 128
FREQUENCY_POWER = 1.2
PRIOR = 0.6
ID_JITTER = 1.2
FIRST_RANKS = 16
TOPIC = 0.7  # of the squared length of a weight row, that its topic shares
NOISE = 1.0  # variance of the logits that no candidate asks for
PRIOR_FEATURE = 8.0  # of the hidden states; the weight holds the prior divided by it
CHUNK_BYTES = 1 << 29


def make_data(name: str, shape: Shape, dtype: torch.dtype, device: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden [N, D], weight [V, D], target [N]) by one of the names in DATA. The same for the same seed and device."""
    generator = torch.Generator(device).manual_seed(seed)
    if name == "untrained":
        hidden = torch.randn(shape.rows, shape.width, generator=generator, device=device, dtype=dtype)
        weight = torch.randn(shape.vocab, shape.width, generator=generator, device=device, dtype=dtype).mul_(0.02)
        target = torch.randint(shape.vocab, (shape.rows,), generator=generator, device=device)
        return hidden, weight, target
    hidden, weight = _planted(PROFILES[name], shape, dtype, generator)
    return hidden, weight, sample_targets(hidden, weight, generator)


def mask_targets(target: Tensor, share: float, ignore_index: int = -100) -> Tensor:
    """The targets, a share of them (evenly spread, in runs as prompts are) replaced by ignore_index."""
    run = min(512, target.numel())
    place = torch.arange(target.numel(), device=target.device) % run
    return target.masked_fill(place < share * run, ignore_index)


def _planted(
    profile: Ranked | Uneven, shape: Shape, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    device = generator.device
    N, D = shape.rows, shape.width
    planted = max(2, min(profile.planted, D // 6, shape.vocab // 16))
    vocabulary = _Vocabulary.make(shape, planted, dtype, generator)
    prior = vocabulary.prior
    places = (torch.randperm(N, generator=generator, device=device) + 0.5) / N
    hidden = torch.empty(N, D, device=device, dtype=dtype)
    hidden[:, -1] = PRIOR_FEATURE
    chunk = max(1, CHUNK_BYTES // (4 * planted * D))
    for start in range(0, N, chunk):
        rows = slice(start, min(start + chunk, N))
        log_share, tail = profile.shapes(planted, places[rows])
        tokens = vocabulary.candidates(rows.stop - start, generator)
        noise = math.sqrt(NOISE) * torch.randn(len(tokens), D - 1, generator=generator, device=device)
        planes = vocabulary.weight[tokens, :-1].float()
        hidden[rows, :-1] = _solve(planes, log_share - prior[tokens], tail, prior, noise).to(dtype)
    return hidden, vocabulary.weight


@dataclass(frozen=True)
class _Vocabulary:
    """The classifier weight, and which of its tokens are candidates together."""

    weight: Tensor  # [V, D]
    prior: Tensor  # [V]
    common: Tensor  # [V // 8]: the ids of the frequent tokens, from the most frequent on; they have no topic
    topics: Tensor  # [T, G]: the ids of each topic's tokens
    first: int  # how many first ranks frequent tokens take

    @classmethod
    def make(cls, shape: Shape, planted: int, dtype: torch.dtype, generator: torch.Generator) -> "_Vocabulary":
        device = generator.device
        V, D = shape.vocab, shape.width
        first = min(FIRST_RANKS, planted // 2)
        token_of = _tokens_by_frequency(V, generator)
        prior = torch.empty(V, device=device)
        prior[token_of] = -PRIOR * torch.arange(1, V + 1, device=device).log()
        prior -= prior.mean()
        common, others = token_of[: V // 8], token_of[V // 8 :]
        size = planted - first
        shuffled = others[torch.randperm(len(others), generator=generator, device=device)]
        topics = shuffled[: len(others) // size * size].view(-1, size)
        weight = torch.randn(V, D, generator=generator, device=device, dtype=dtype).mul_(D**-0.5)
        centers = torch.randn(len(topics), D, generator=generator, device=device, dtype=dtype).mul_(D**-0.5)
        for members in topics.T:  # one of each topic at a time, for its memory
            weight[members] = math.sqrt(TOPIC) * centers + math.sqrt(1 - TOPIC) * weight[members]
        weight[:, -1] = prior / PRIOR_FEATURE
        return cls(weight, prior, common, topics, first)

    def candidates(self, rows: int, generator: torch.Generator) -> Tensor:
        """[rows, K]: which token takes which rank: frequent ones the first, those of a random topic the others."""
        device = generator.device
        topic = self.topics[torch.randint(len(self.topics), (rows,), generator=generator, device=device)]
        order = torch.rand(topic.shape, generator=generator, device=device).argsort(1)
        frequent = self.common[_frequency_ranks(rows, self.first, len(self.common), generator)]
        return torch.cat([frequent, topic.gather(1, order)], 1)


def _tokens_by_frequency(vocab: int, generator: torch.Generator) -> Tensor:  # [V]: ids from frequent to rare
    order = torch.arange(1, vocab + 1, device=generator.device).log()
    return (order + ID_JITTER * torch.randn(vocab, generator=generator, device=generator.device)).argsort()


def _interpolate(values: Tensor, places: Tensor, wanted: Tensor) -> Tensor:
    """[rows, wanted]: the piecewise linear functions [rows, places]; constant outside of the places."""
    right = torch.searchsorted(places, wanted).clamp(1, len(places) - 1)
    part = ((wanted - places[right - 1]) / (places[right] - places[right - 1])).clamp(0, 1)
    return torch.lerp(values[:, right - 1], values[:, right], part)


def _frequency_ranks(rows: int, planted: int, vocab: int, generator: torch.Generator) -> Tensor:
    """[rows, K]: distinct frequency ranks from 0, that of rank k with a probability ~ (r + 2k)^-FREQUENCY_POWER."""
    device = generator.device
    shift = 2.0 * torch.arange(1, planted + 1, device=device)
    power = 1 - FREQUENCY_POWER
    uniform = torch.rand(rows, planted, generator=generator, device=device)
    drawn = shift * ((1 - uniform * (1 - (1 + vocab / shift) ** power)) ** (1 / power) - 1)
    drawn, order = drawn.long().clamp_(0, vocab - 1).sort(1)
    step = torch.arange(planted, device=device)
    distinct = (drawn - step).cummax(1).values + step  # equal neighbours move up
    distinct = torch.minimum(distinct, vocab - planted + step)
    return torch.empty_like(distinct).scatter_(1, order, distinct)


def _solve(planes: Tensor, logits: Tensor, tail: Tensor, prior: Tensor, noise: Tensor) -> Tensor:
    """[rows, D - 1]: the hidden states closest to `noise` with `planes` [rows, K, D - 1] @ hidden = logits + level.

    The others' logits are normal around their priors with the variance |hidden|^2 / D, so their sum of exponentials
    is e^(|hidden|^2 / 2D) sum e^prior, and |hidden|^2 is quadratic in the level: the level at which they have the mass
    `tail` solves a quadratic equation. Where there is none, that at which they have the least.
    """
    factor = torch.linalg.cholesky(planes @ planes.transpose(1, 2))
    seen = (planes @ noise[:, :, None]).squeeze(2)  # of the noise, which is replaced
    wanted = torch.stack([logits, torch.ones_like(logits), seen], 2)  # [rows, K, 3]
    solved = torch.cholesky_solve(wanted, factor)
    products = (
        wanted.transpose(1, 2) @ solved / planes.shape[2]
    )  # |hidden|^2 / D at a level l: kept + c + 2 b l + a l^2
    c, b, a = products[:, 0, 0], products[:, 0, 1], products[:, 1, 1]
    kept = NOISE * (1 - planes.shape[1] / planes.shape[2])
    constant = (c + kept) / 2 + prior.logsumexp(0) - tail.logit()
    level = ((1 - b) - ((1 - b) ** 2 - 2 * a * constant).clamp_min(0).sqrt()) / a
    coefficients = solved[:, :, 0] - solved[:, :, 2] + level[:, None] * solved[:, :, 1]  # [rows, K]
    return noise + (coefficients[:, None] @ planes).squeeze(1)


@torch.no_grad()
def sample_targets(hidden: Tensor, weight: Tensor, generator: torch.Generator) -> Tensor:
    """[N]: a token of each row's softmax."""
    targets = []
    for logits in logit_chunks(hidden, weight):
        noise = torch.empty_like(logits).exponential_(generator=generator)
        targets.append(logits.sub_(noise.log_()).argmax(1))
    return torch.cat(targets)


def logit_chunks(hidden: Tensor, weight: Tensor) -> Iterator[Tensor]:
    """The logits [rows, V] in float32, CHUNK_BYTES at a time; the products have the precision of the dtype."""
    for rows in hidden.split(max(1, CHUNK_BYTES // (4 * weight.shape[0]))):
        yield (rows @ weight.T).float()


def read_head(path: Path, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden, weight, target) from a safetensors file with `hidden`, `classifier` and `targets`."""
    from safetensors.torch import load_file

    tensors = load_file(path, device)
    return tensors["hidden"], tensors["classifier"], tensors["targets"].long()
