"""One choice of granularities for all blocks of a stage.

DGE (arXiv 2301.03831) has a router in each block. Sharing its choice is ours: the queries of a
stage are the same in all of its blocks, and labels can teach the one router.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from ...arguments import is_number
from ...runtime.decisions import RoutingDecision, record_decision
from ..common.gate import RegionGate, start_of
from ..common.regions import RegionLayout, describe_regions, plan_regions
from ..common.routing import choose, explores, spend_queries
from .block import DynamicGranularityBlock, Routing


class SharedRouter(nn.Module):
    """Scores the granularities of each region once, from the mean and the spread of its tokens.

    Args:
        embed_dims: Channels, C.
        granularities: Sides of the cells, finest first, in tokens.
        region_size: Side of a region, in tokens.
        query_ratio: Queries over tokens that every image has, at most. None samples in training and
            takes the highest score in testing.
        taught: Whether labels teach it. With ``query_ratio`` they alone do, and its choices have no
            gradient of the task.
        gate: Arguments of :class:`~mmtoken.layers.common.gate.RegionGate`.

    Raises:
        ValueError: ``query_ratio`` out of range.
    """

    def __init__(
        self,
        embed_dims: int,
        granularities: tuple[int, ...],
        region_size: int,
        query_ratio: float | None = None,
        taught: bool = False,
        **gate,
    ) -> None:
        super().__init__()
        if query_ratio is not None and not (is_number(query_ratio) and 0 < query_ratio <= 1):
            raise ValueError(f'query_ratio must be above 0 and at most 1, got {query_ratio!r}')
        if query_ratio is not None:
            gate.setdefault('start_ratio', start_of(1 - query_ratio))
        self.granularities = granularities
        self.region_size = region_size
        self.query_ratio = query_ratio
        self.budget: float | None = None  # of mmtoken.set_budget
        self.learns_from_task = not (taught and query_ratio is not None)
        self.gate = RegionGate(2 * embed_dims, num_choices=len(granularities), **gate)

    @property
    def least_budget(self) -> float | None:
        """Queries over tokens where all regions are as coarse as possible."""
        return self.granularities[-1] ** -2

    def forward(
        self, x: Tensor, layout: RegionLayout, padding: Tensor | None, num_blocks: int
    ) -> tuple[Routing, Tensor]:
        """Choose the granularity of every region.

        Args:
            x: Tokens in front of the first block, ``(B, N, C)``.
            layout: Of the regions.
            padding: Regions that are padding, ``(B, Hr, Wr)``, or None.
            num_blocks: Blocks that use the choice.

        Returns:
            The choice, for each of the blocks, and scores, ``(B, Hr, Wr, K)``, float32.
        """
        grid = x[:, layout.num_prefix_tokens :].unflatten(1, layout.grid)
        if not self.learns_from_task:
            grid = grid.detach()  # labels teach the router, not what is in front of it
        scores = self.gate(describe_regions(grid, self.region_size), padding)
        ratio = self.query_ratio if self.budget is None else self.budget
        settled = None
        if ratio is not None:
            settled = spend_queries(scores, layout.num_cells, ratio, padding)
        gates = choose(
            scores,
            layout.num_cells,
            DynamicGranularityBlock.ratio_name,
            explores(self.gate, grid) and self.learns_from_task,
            padding,
            settled=settled,
        )
        choice = gates.argmax(dim=-1)
        for _ in range(num_blocks):
            record_decision(
                RoutingDecision(choice, self.granularities, self.region_size, layout.grid, padding)
            )
        return Routing(gates, plan_regions(choice, layout)), scores


def split_router_args(
    router: Mapping, budget: Mapping | None
) -> tuple[dict, Mapping | None, Mapping | None]:
    """What a backbone's argument ``router`` means.

    Args:
        router: Of the backbone.
        budget: Of the backbone.

    Returns:
        Arguments of :class:`SharedRouter`; the config of the loss by which labels teach it, or
        None; and that of the budget loss, or None if ``query_ratio`` takes its place.

    Raises:
        ValueError: Unknown arguments.
    """
    args = dict(router)
    label_loss = args.pop('label_loss', None)
    allowed = ('query_ratio', 'hidden_channels', 'num_layers', 'start_ratio', 'kernel_size')
    if unknown := args.keys() - set(allowed):
        raise ValueError(f'router takes {("label_loss", *allowed)}, got {sorted(unknown)}')
    args['taught'] = label_loss is not None
    return args, label_loss, budget if args.get('query_ratio') is None else None
