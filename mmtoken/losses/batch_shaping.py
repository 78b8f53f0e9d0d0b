"""A loss that makes gates depend on the image: batch shaping, plain and generalized.

Sources: MSViT, arXiv 2307.02321 (generalized batch shaping); Bejnordi et al., arXiv 1907.06627
(batch shaping). Formulas as in the released loss, Qualcomm-AI-research/batchshaping
(BSD-3-Clause-Clear).
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.dist import all_gather, get_rank, get_world_size
from torch import Tensor, nn

from ..arguments import as_tuple, is_count
from ..layers.common.positions import resample
from ..registry import MODELS
from .rate import check_open_interval, check_regions
from .warm_up import WarmUpLoss


def relaxed_bernoulli_cdf(x: Tensor, mean: Tensor, temperature: Tensor) -> Tensor:
    """Distribution function of the relaxed Bernoulli (binary concrete) distribution.

    Args:
        x: Values, clipped to [0.001, 0.999]; there is no gradient outside.
        mean: Probability of a value above 0.5, in (0, 1); broadcasts with ``x``.
        temperature: Above 0; the lower, the closer values are to 0 and 1. Broadcasts with ``x``.

    Returns:
        Probability of a value of at most ``x``.
    """
    # The logit of a mean that has saturated to 0 or 1 would be infinite.
    return (temperature * x.logit(eps=1e-3) - mean.logit(eps=1e-6)).sigmoid()


def normal_cdf(x: Tensor, mean: Tensor | float, std: Tensor | float) -> Tensor:
    """Distribution function of the normal distribution; all broadcast."""
    return torch.special.ndtr((x - mean) / std)


PRIORS = dict(relaxed_bernoulli=relaxed_bernoulli_cdf, normal=normal_cdf)


def batch_shaping(
    probability: Tensor, group: Tensor | None = None, groups: int = 1
) -> tuple[Tensor, Tensor]:
    """Distance of groups of values from their priors: that of the distribution functions, squared.

    It is the mean over the n values of a group of ``(i / (n + 1) - F(x_i))**2``, where ``x_i`` is
    the i-th smallest and F the prior's distribution function. Values are given as ``F(x)``, which
    preserves the order of ``x``.

    Args:
        probability: The prior's distribution function at each value, ``(N,)``.
        group: Group of each value, int64, ``(N,)``; None for one group.
        groups: Number of groups.

    Returns:
        Distance of each group, 0 of an empty one, ``(groups,)``, and its number of values, int64,
        ``(groups,)``.
    """
    if group is None:
        group = torch.zeros_like(probability, dtype=torch.int64)
    order = probability.detach().argsort()
    order = order[group[order].argsort(stable=True)]  # by group, then by value
    probability, group = probability[order], group[order]
    sizes = torch.bincount(group, minlength=groups)
    starts = sizes.cumsum(0) - sizes
    rank = torch.arange(1, len(group) + 1, device=group.device) - starts[group]
    empirical = rank / (sizes[group] + 1).to(probability.dtype)
    squares = (empirical - probability) ** 2
    sums = probability.new_zeros(groups).index_add(0, group, squares)
    return sums / sizes.clamp(min=1), sizes


def bin_grid(batches: Sequence[tuple[float, int, int]], min_samples: int) -> tuple[int, int]:
    """Number of bins that the coarse grid is divided into.

    Args:
        batches: Number of images, rows and columns of the coarse grid, of each process. An image
            with padding counts by the share of it that is not.
        min_samples: The least number of values that each bin should have.

    Returns:
        Rows and columns of bins. Candidates have enough values in each bin and are no finer than
        the coarsest of the coarse grids; the one is taken whose bins have the shortest longer side,
        and among equals the one with most bins. One bin if there is no candidate.
    """
    height, width = (min(batch[side] for batch in batches) for side in (1, 2))
    rows, columns = np.arange(1, height + 1)[:, None], np.arange(1, width + 1)
    # Regions in the smallest bins, of all images
    smallest = sum(images * (h // rows) * (w // columns) for images, h, w in batches)
    enough = (np.argwhere(smallest >= min_samples) + 1).tolist()

    def coarseness(grid: list[int]) -> tuple[float, int]:
        return max(height / grid[0], width / grid[1]), -grid[0] * grid[1]

    return tuple(min(enough, key=coarseness, default=[1, 1]))


@MODELS.register_module()
class BatchShapingLoss(WarmUpLoss):
    """Compares the distribution of gates over a batch with a prior, position by position.

    A prior with most of its mass near 0 and 1 makes the gate decide, and decide differently for
    different images: a gate that is the same for all images does not have the distribution of the
    prior, even if its mean fits. Generalized batch shaping learns the prior of each position, so
    that some may be coarse more often than others, and limits the means of the priors by a normal
    hyper-prior::

        loss = mean over positions of distance(gates, prior) + distance(means, hyper-prior)
             + temperature_penalty * mean temperature

    The distance is :func:`batch_shaping`. It needs more values than a GPU has images when training
    detectors, so values come from the images of all GPUs, and neighboring positions are pooled into
    bins until each has ``min_samples`` of them (see :func:`bin_grid`; where images are padded, bins
    with padding have fewer, and bins without values are left out). The parameters of the priors are
    stored on a grid of fixed size that covers the padded images, and are resampled to the grid of
    the bins, so images may have any size.

    The logits of the parameters, ``mean_logits`` and ``temperature_logits``, need a learning rate
    above that of the network, but not so high that they follow the gate faster than it follows
    them: about four standard deviations away from the target, the gradient of the hyper-prior
    vanishes and no longer pulls a mean back. They need no weight decay, which would pull means and
    temperatures to 0.5. The released loss starts with means and temperatures of 0.5; here means
    start at the target.

    Args:
        target_coarse_ratio: Mean of the hyper-prior; with ``generalised=False`` that of the prior.
            Above 0 and below 1.
        loss_weight: Factor of the loss.
        generalised: False gives all positions the same, fixed prior and no hyper-prior.
        prior: ``'relaxed_bernoulli'``, whose mean is the share of values above 0.5, or
            ``'normal'``.
        temperature: Temperature of the prior, initial if ``generalised`` and else fixed; of a
            normal prior the standard deviation. Above 0 and below 1.
        temperature_penalty: Factor of the mean temperature in the loss. The higher it is, the more
            decided the gates, and the further their mean shifts from the target towards 0.5. Normal
            priors have no such term: it would contract them to a constant.
        hyper_std: Standard deviation of the hyper-prior.
        grid: Rows and columns of the grid of the learned parameters.
        min_samples: The least number of values that a bin should have. With 1, no positions are
            pooled unless there is padding.
        warmup_iters: Number of training passes over which the factor rises from 0 to
            ``loss_weight``. They are counted in the buffer ``iterations``, which checkpoints keep.

    Raises:
        ValueError: An argument outside its range.
    """

    def __init__(
        self,
        target_coarse_ratio: float = 0.5,
        loss_weight: float = 1.0,
        generalised: bool = True,
        prior: str = 'relaxed_bernoulli',
        temperature: float = 0.4,
        temperature_penalty: float = 0.1,
        hyper_std: float = 0.1,
        grid: tuple[int, int] = (7, 7),
        min_samples: int = 16,
        warmup_iters: int = 0,
    ) -> None:
        super().__init__(loss_weight, warmup_iters)
        check_open_interval(target_coarse_ratio=target_coarse_ratio, temperature=temperature)
        if prior not in PRIORS:
            raise ValueError(f'prior must be one of {", ".join(PRIORS)}, got {prior!r}')
        if not temperature_penalty >= 0:
            raise ValueError(f'temperature_penalty must be 0 or more, got {temperature_penalty}')
        if not hyper_std > 0:
            raise ValueError(f'hyper_std must be above 0, got {hyper_std}')
        if len(as_tuple(grid)) != 2 or not all(map(is_count, grid)):
            raise ValueError(f'grid must be two numbers of 1 or more, got {grid!r}')
        if not min_samples >= 1:
            raise ValueError(f'min_samples must be 1 or more, got {min_samples}')
        self.target_coarse_ratio = target_coarse_ratio
        self.generalised = generalised
        self.prior = prior
        self.temperature = temperature
        self.temperature_penalty = temperature_penalty if prior == 'relaxed_bernoulli' else 0
        self.hyper_std = hyper_std
        self.min_samples = min_samples
        if generalised:
            # On the CPU even if parameters are created on the meta device.
            start = torch.tensor([target_coarse_ratio, temperature], device='cpu')
            mean, temperature = start.logit().tolist()
            # With equal means it would be arbitrary which ones the hyper-prior moves up or down.
            self.mean_logits = nn.Parameter(mean + 0.01 * torch.randn(*grid))
            self.temperature_logits = nn.Parameter(torch.full(grid, temperature))

    def forward(self, coarse: Tensor, valid_mask: Tensor | None = None) -> Tensor:
        """Compare gates with the prior.

        In distributed training all processes must call it, each with its own images, which may
        have other sizes.

        Args:
            coarse: Probability that a region is coarse, ``(B, Hr, Wr)``.
            valid_mask: Regions that count, bool, ``(B, Hr, Wr)``; None for all. Those that lie in
                the padding of a batch should not.

        Returns:
            The loss, float32, ``()``; 0 if no region counts. It is computed in float32 or, of
            float64, in that.

        Raises:
            ValueError: Shapes or types other than these.
        """
        valid_mask = check_regions(coarse, valid_mask)
        coarse = coarse.to(torch.promote_types(coarse.dtype, torch.float32))
        values, bins, shape = _pool(coarse, valid_mask, self.min_samples)
        mean, temperature = (
            resample(p.reshape(1, -1, 1), p.shape, shape, 'bilinear', True).flatten()
            for p in self._priors(coarse)
        )
        probability = PRIORS[self.prior](values, mean[bins], temperature[bins])
        distances, sizes = batch_shaping(probability, bins, len(mean))
        loss = distances.sum() / (sizes > 0).sum().clamp(min=1)
        if self.generalised:
            loss = loss + self._hyper_loss(coarse) * (len(values) > 0)
        return (self._weight() * loss).float()

    def _priors(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Means and temperatures of the priors, on their own grid."""
        if self.generalised:
            logits = self.mean_logits, self.temperature_logits
            return tuple(p.to(like.dtype).sigmoid() for p in logits)
        constants = self.target_coarse_ratio, self.temperature
        return tuple(like.new_full((1, 1), value) for value in constants)

    def _hyper_loss(self, like: Tensor) -> Tensor:
        """Keeps the priors from following the gates away from the target."""
        mean, temperature = self._priors(like)
        probability = normal_cdf(mean.flatten(), self.target_coarse_ratio, self.hyper_std)
        distance, _ = batch_shaping(probability)
        return distance[0] + self.temperature_penalty * temperature.mean()


def _pool(
    coarse: Tensor, valid_mask: Tensor, min_samples: int
) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Values of all processes that count, ``(N,)``, their bins, ``(N,)``, and the grid of bins."""
    height, width = coarse.shape[1:]
    own = torch.tensor([int(valid_mask.sum()), coarse.numel(), height, width], device=coarse.device)
    batches = torch.stack(all_gather(own)).tolist()
    shape = rows, columns = bin_grid(
        [(n / max(h * w, 1), h, w) for n, _, h, w in batches], min_samples
    )

    row, column = (
        torch.arange(regions, device=coarse.device) * bins // max(regions, 1)
        for regions, bins in ((height, rows), (width, columns))
    )
    bins = (row[:, None] * columns + column).expand_as(coarse)
    bins = bins.masked_fill(~valid_mask, -1).flatten()

    # Processes gather tensors of one shape only.
    missing = max(size for _, size, _, _ in batches) - coarse.numel()
    values, bins = F.pad(coarse.flatten(), (0, missing)), F.pad(bins, (0, missing), value=-1)
    all_values, all_bins = all_gather(values.detach()), torch.cat(all_gather(bins))
    # The gradient comes from the local values only, multiplied by the number of processes, since
    # DDP averages over them.
    all_values[get_rank()] = values.detach() + get_world_size() * (values - values.detach())
    counts = all_bins >= 0
    return torch.cat(all_values)[counts], all_bins[counts], shape
