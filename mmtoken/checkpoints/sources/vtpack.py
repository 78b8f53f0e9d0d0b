"""DGE (arXiv 2301.03831) as released: on PVT and DeiT, and the plain networks beside them.

Names are those of PVT and DeiT; within a block, ``dge`` has the router and ``splits``, the numbers
of cells along the side of a region, by granularity. These are no weights: the model must have the
same. Deformable PVT was released without ``dge``.

Source: github.com/StevenGrove/vtpack (Apache-2.0).
"""

from torch import nn

from . import pvt, vit
from .source import Layout, Source, State, rename_with

SPLITS = (r'.*\.dge\.splits$', None)

pvt_names = rename_with(
    SPLITS,
    (r'block(\d)\.(\d+)\.dge\.router\.', pvt.in_stage(r'blocks.\2.router.')),
    (r'block(\d)\.(\d+)\.attn\.v\.', pvt.in_stage(r'blocks.\2.attn.value.')),
    (r'block(\d)\.(\d+)\.attn\.attn_weight\.', pvt.in_stage(r'blocks.\2.attn.weights.')),
    *pvt.RULES,
)
deit_names = vit.without_distillation(
    rename_with(vit.HEADS, SPLITS, (r'blocks\.(\d+)\.dge\.router\.', r'blocks.\1.router.'))
)


def check_splits(file: State, state: State, model: nn.Module) -> None:
    """Refuse weights that were trained with other granularities than those of the model.

    Args:
        file: Official names and tensors.
        state: Ours, which have no splits.
        model: Has blocks with ``granularities`` and ``region_size``, if it is for such weights.

    Raises:
        ValueError: They differ.
    """
    theirs = {tuple(t.flatten().tolist()) for n, t in file.items() if n.endswith('.dge.splits')}
    for block in model.modules():
        if hasattr(block, 'granularities') and hasattr(block, 'region_size'):
            ours = tuple(block.region_size // side for side in block.granularities)
            if theirs - {ours}:
                raise ValueError(
                    f'its dge.splits are {" and ".join(map(str, sorted(theirs)))}, but '
                    f'{type(model).__name__} has granularities {tuple(block.granularities)} in '
                    f'regions of {block.region_size}, which are splits of {ours}'
                )


VTPACK = Source(
    'vtpack',
    layouts=(
        Layout('PVT', pvt.OFFICIAL, pvt_names),
        Layout('DeiT', (r'patch_embed\.proj\.weight', r'blocks\.0\.norm1\.weight'), deit_names),
    ),
    known_keys=f'{pvt.NAMES}|{vit.NAMES}',
    ignorable_keys=pvt.CLASSIFIER,
    newly_initialized_keys=vit.GRAINED,
    key_signature=r'.*\.dge\..*|.*\.attn\.attn_weight\.weight',
    check=check_splits,
)
