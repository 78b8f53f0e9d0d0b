"""The backbones that are measured."""

from dataclasses import dataclass, field

from benchmarking.targets import BenchmarkTarget

HIERARCHICAL, PLAIN = (800, 1280), (1024, 1024)  # images of the full report
QUICK = (64, 96)  # and of the quick one
TINY_SWIN = dict(embed_dims=16, depths=(1, 1, 6, 1), num_heads=(1, 1, 2, 2))
TINY_DPVT = dict(
    embed_dims=(8, 16, 16, 32), depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 4), mlp_ratios=(2,) * 4
)
TINY_VIT = dict(embed_dims=32, num_layers=4, num_heads=2, feedforward_channels=64)


@dataclass(frozen=True)
class Network:
    """A backbone.

    Attributes:
        name: Of the class.
        sizes: Names of architectures, the one to measure first coming first.
        shape: Height and width of the images, in pixels.
        tiny: Arguments for the quick report.
        routing: Arguments of :func:`mmtoken.routing_override`.
        chooses: Whether shapes depend on values, so that there is no CUDA graph of it.
        compares: Whether it compares tokens, so that rounding may change which ones merge.
    """

    name: str
    sizes: tuple[str, ...]
    shape: tuple[int, int]
    tiny: dict
    routing: dict = field(default_factory=dict)
    chooses: bool = False
    compares: bool = False

    def target(self, size: str) -> BenchmarkTarget:
        """The backbone of an architecture, or with the size ``'tiny'`` that of the quick report."""
        args = self.tiny if size == 'tiny' else dict(arch=size)
        cfg = dict(backbone=dict(type=f'mmtoken.{self.name}', **args))
        return BenchmarkTarget(self.name, cfg, 'mmengine', 'backbone', routing=self.routing)


NETWORKS = {
    network.name: network
    for network in (
        Network('STViTRSwin', ('small', 'base'), HIERARCHICAL, dict(arch=TINY_SWIN)),
        Network('STViTDeiT', ('small', 'base'), PLAIN, dict(arch=TINY_VIT, base_layers=2)),
        Network(
            'DGEPVT', ('small', 'medium'), HIERARCHICAL,
            dict(arch=dict(TINY_DPVT, sr_ratios=(8, 4, 2, 1))), dict(query_ratio=0.436), True,
        ),
        Network(
            'MSViT', ('small', 'base'), PLAIN, dict(arch=TINY_VIT), dict(coarse_ratio=0.5), True
        ),
        Network(
            'MergeViT', ('small', 'base'), PLAIN, dict(arch=TINY_VIT, merge_blocks=(1, 2)),
            chooses=True, compares=True,
        ),
        Network(
            'DGEDPVT', ('small',), HIERARCHICAL, dict(arch=TINY_DPVT), dict(query_ratio=0.436), True
        ),
        Network(
            'DGEDeiT', ('small', 'base'), PLAIN, dict(arch=TINY_VIT), dict(query_ratio=0.436), True
        ),
        Network(
            'PSViT', ('small',), HIERARCHICAL,
            dict(arch=dict(stages=[(16, 1, (1,)), (32, 2, (2, 1))]), out_indices=(0, 1),
                 window_sizes=(4, None)),
        ),
        Network(
            'SWATSwin', ('small',), HIERARCHICAL,
            dict(arch=dict(TINY_SWIN, embed_dims=32, num_heads=(1, 2, 2, 4))),
        ),
        Network(
            'SWATDeiT', ('small', 'base32'), PLAIN,
            dict(arch=dict(TINY_VIT, patch_size=16, mlp_kernel=3), plane_size=4),
        ),
    )
}  # fmt: skip
MAIN = tuple(NETWORKS)[:5]  # the five main methods
