"""The backbones, as every suite that tests all of them sees them: one entry a backbone."""

from typing import NamedTuple

SWIN = dict(embed_dims=16, depths=(2, 1, 6, 1), num_heads=(1, 2, 2, 4))
VIT = dict(embed_dims=32, num_layers=6, num_heads=2, feedforward_channels=48)
LATER = dict(mlp='swiglu', norm_eps=1e-5, qk_norm=True, rotary='dinov3', num_registers=2)
SHORT_VIT = dict(VIT, num_layers=4)
SMALL_VIT = dict(VIT, num_layers=3)
DPVT = dict(
    embed_dims=(16, 32, 40, 64),
    depths=(1, 2, 1, 1),
    num_heads=(1, 2, 5, 4),
    mlp_ratios=(4, 2, 2, 2),
)
PVT = dict(DPVT, sr_ratios=(8, 4, 2, 1))
SHORT_DPVT = dict(embed_dims=(16, 32), depths=(1, 2), num_heads=(1, 2), mlp_ratios=(4, 2))
SHORT_PVT = dict(SHORT_DPVT, sr_ratios=(4, 1))
SWAT_SWIN = dict(embed_dims=32, depths=(2, 1, 3, 2), num_heads=(1, 2, 2, 4))
SWAT_VIT = dict(VIT, patch_size=16, mlp_kernel=3)
PSVIT = dict(stages=[(32, 2, (2,)), (48, 3, (2, 2, 1)), (64, 4, (1, 3))])


class Family(NamedTuple):
    """What differs between backbones.

    Attributes:
        variants: Arguments that the contract is tested with; the first ones are the usual ones.
        num_stages: Stages of all variants.
        strides: Of their maps.
        stem: Names of parameters that ``frozen_stages=0`` freezes start so.
        stage, output: Names, but for an index, of a stage and of what follows it, if anything.
        depths: Depth of some parameters, negative ones counted from the last.
        small: Arguments for suites that run a network often.
        networks: Arguments of every form that has layers or paths of its own, by what follows the
            name of the backbone.
        size: The argument for the image that positions are laid out for, and other arguments of a
            network with positions; None if there are none.
        chooses: Whether shapes depend on the values of an image, so that it cannot be exported.
    """

    variants: list[dict]
    num_stages: int
    strides: tuple[int, ...]
    stem: tuple[str, ...]
    stage: str
    output: str | None
    depths: dict[str, int]
    small: dict
    networks: dict[str, dict]
    size: tuple[str, dict] | None = None
    chooses: bool = False


FAMILIES = {
    'STViTRSwin': Family(
        variants=[
            dict(arch=SWIN),
            dict(arch=SWIN, pad_mask='exact'),
            dict(arch=SWIN, pad_mask=None, conv_pos=True),
            dict(arch=SWIN, semantic_size=None),
            dict(arch=SWIN, form='classification', use_global=True),
        ],
        num_stages=4,
        strides=(4, 8, 16, 32),
        stem=('patch_embed.',),
        stage='layers.{}.',
        output='norm{}.',
        depths={
            'patch_embed.proj.0.c.weight': 0,
            'layers.0.blocks.1.norm1.weight': 2,
            'layers.0.downsample.norm.weight': 2,
            'norm3.weight': -1,
        },
        small=dict(
            arch=dict(embed_dims=8, depths=(1, 2, 6), num_heads=(1, 2, 2)), out_indices=(0, 1, 2)
        ),
        networks={
            '': dict(arch=SWIN, conv_pos=True),
            ' dense': dict(arch=SWIN, semantic_size=None, stem='patch'),
            ' classifier': dict(arch=SWIN, form='classification'),
        },
    ),
    'STViTDeiT': Family(
        variants=[
            dict(arch=VIT, base_layers=2, img_size=80, out_indices=(1, 3, 4, 5)) | kwargs
            for kwargs in (
                {},
                dict(pooling='max', global_centers=False, qkv_bias=False),
                dict(pooling='mean', refine_residual='initial', recovery_scale=0.1),
                dict(semantic_size=None),
                dict(arch=dict(VIT, **LATER), cls_token=True, layer_scale=1e-5),
            )
        ],
        num_stages=6,
        strides=(16, 16, 16, 16),
        stem=('patch_embed.', 'pos_embed', 'cls_token', 'reg_token'),
        stage='blocks.{}.',
        output='recover.{}.',
        depths={
            'patch_embed.proj.weight': 0,
            'pos_embed': 0,
            'cls_token': 0,
            'reg_token': 0,
            'blocks.0.norm1.weight': 1,
            'blocks.5.norm1.weight': 6,
        },
        small=dict(arch=SMALL_VIT, base_layers=1, img_size=80),
        networks={
            '': dict(arch=SHORT_VIT, base_layers=1, out_indices=(0, 3)),
            ' later': dict(
                arch=dict(SHORT_VIT, pos_embed=False, **LATER), base_layers=1, out_indices=(0, 3)
            ),
        },
        size=('img_size', dict(arch=VIT, base_layers=2)),
    ),
    'DGEPVT': Family(
        variants=[
            dict(arch=PVT),
            dict(arch=PVT, cls_token=True, granularities=(1, 2), train_mode='dense'),
            dict(arch=PVT, train_mode='sparse', region_size=8, qkv_bias=False),
            dict(arch=PVT, granularities=(1,)),
        ],
        num_stages=4,
        strides=(4, 8, 16, 32),
        stem=('layers.0.patch_embed.', 'layers.0.pos_embed'),
        stage='layers.{}.',
        output=None,
        depths={
            'layers.0.patch_embed.proj.weight': 0,
            'layers.0.pos_embed': 0,
            'layers.0.blocks.0.norm1.weight': 1,
            'layers.1.patch_embed.proj.weight': 2,
            'layers.1.pos_embed': 2,
            'layers.1.blocks.1.norm1.weight': 3,
            'layers.3.blocks.0.mlp.fc1.weight': 5,
        },
        small=dict(arch=PVT),
        networks={
            '': dict(arch=SHORT_PVT, out_indices=(0, 1), cls_token=True),
            ' dense': dict(arch=SHORT_PVT, out_indices=(0, 1), granularities=(1,)),
        },
        size=('pretrain_img_size', dict(arch=PVT, budget=None)),
        chooses=True,
    ),
    'DGEDPVT': Family(
        variants=[dict(arch=DPVT), dict(arch=DPVT, granularities=(1,), num_points=2)],
        num_stages=4,
        strides=(4, 8, 16, 32),
        stem=('layers.0.patch_embed.', 'layers.0.pos_embed'),
        stage='layers.{}.',
        output=None,
        depths={'layers.0.pos_embed': 0, 'layers.2.blocks.0.attn.offsets.weight': 4},
        small=dict(arch=DPVT),
        networks={'': dict(arch=SHORT_DPVT, out_indices=(0, 1))},
        size=('pretrain_img_size', dict(arch=DPVT, budget=None)),
        chooses=True,
    ),
    'DGEDeiT': Family(
        variants=[
            dict(arch=VIT, img_size=80, out_indices=(1, 3, 4, 5)) | kwargs
            for kwargs in (
                {},
                dict(cls_token=True, granularities=(1, 4), train_mode='dense'),
                dict(train_mode='sparse', region_size=8, qkv_bias=False),
                dict(cls_token=True, granularities=(1,)),
                dict(arch=dict(VIT, **LATER)),
            )
        ],
        num_stages=6,
        strides=(16, 16, 16, 16),
        stem=('patch_embed.', 'pos_embed', 'cls_token'),
        stage='blocks.{}.',
        output=None,  # but for the last block, a norm
        depths={
            'patch_embed.proj.weight': 0,
            'pos_embed': 0,
            'cls_token': 0,
            'blocks.0.router.gate.weight': 1,
            'blocks.5.norm1.weight': 6,
            'norm.weight': -1,
        },
        small=dict(arch=SMALL_VIT, img_size=80),
        networks={
            '': dict(arch=SHORT_VIT, granularities=(1, 2), region_size=2),
            ' later': dict(arch=dict(SHORT_VIT, pos_embed=False, **LATER)),
        },
        size=('img_size', dict(arch=VIT, cls_token=True)),
        chooses=True,
    ),
    'MSViT': Family(
        variants=[
            dict(arch=VIT, img_size=80, out_indices=(1, 3, 4, 5)) | kwargs
            for kwargs in (
                {},
                dict(train_mode='gathered', num_registers=2, layer_scale=1e-5, qkv_bias=False),
                dict(cls_token=False, window_size=4, share_patch_embed=False),
                dict(gate=None),
                dict(arch=dict(VIT, **LATER)),
            )
        ],
        num_stages=6,
        strides=(16, 16, 16, 16),
        stem=('patch_embed.', 'patch_embed_coarse.', 'pos_embed', 'cls_token', 'reg_token', 'gate'),
        stage='blocks.{}.',
        output=None,  # but for the last block, a norm
        depths={
            'patch_embed.proj.weight': 0,
            'patch_embed_coarse.proj.weight': 0,
            'pos_embed': 0,
            'cls_token': 0,
            'reg_token': 0,
            'gate.layers.0.weight': -1,
            'gate_loss.mean_logits': -1,
            'blocks.0.norm1.weight': 1,
            'blocks.5.norm1.weight': 6,
            'norm.weight': -1,
        },
        small=dict(arch=SMALL_VIT, img_size=80),
        networks={
            '': dict(arch=SHORT_VIT, layer_scale=0.5),
            ' windows': dict(
                arch=SHORT_VIT, cls_token=False, window_size=2, share_patch_embed=False
            ),
            ' later': dict(arch=dict(SHORT_VIT, pos_embed=False, **LATER)),
        },
        size=('img_size', dict(arch=VIT, gate=dict(loss=None))),
        chooses=True,
    ),
    'MergeViT': Family(
        variants=[
            dict(arch=VIT, img_size=80, out_indices=(1, 3, 4, 5)) | kwargs
            for kwargs in (
                dict(merge_blocks=(2, 4)),
                dict(merge_blocks=(0, -1), num_registers=2, layer_scale=1e-5, qkv_bias=False),
                dict(merge_blocks=1, proportional=False, cls_token=False),
                dict(merge_blocks=()),
                dict(arch=dict(VIT, mlp='swiglu-norm', rotary='eva02'), merge_blocks=2),
            )
        ],
        num_stages=6,
        strides=(16, 16, 16, 16),
        stem=('patch_embed.', 'pos_embed', 'cls_token', 'reg_token'),
        stage='blocks.{}.',
        output=None,  # but for the last block, a norm
        depths={
            'patch_embed.proj.weight': 0,
            'pos_embed': 0,
            'cls_token': 0,
            'reg_token': 0,
            'blocks.0.norm1.weight': 1,
            'blocks.5.norm1.weight': 6,
            'norm.weight': -1,
        },
        small=dict(arch=SMALL_VIT, img_size=80, merge_blocks=(1, 2)),
        networks={
            '': dict(arch=SHORT_VIT, layer_scale=0.5, merge_blocks=(1, 3)),
            ' later': dict(arch=dict(SHORT_VIT, pos_embed=False, **LATER), merge_blocks=(1, 3)),
        },
        size=('img_size', dict(arch=VIT, merge_blocks=(2, 4))),
        chooses=True,
    ),
    'PSViT': Family(
        variants=[
            dict(arch=PSVIT, img_size=80, window_sizes=(4, None, None), **kwargs)
            for kwargs in (
                {},
                dict(pooling='mean', pool_kernel=1, qkv_bias=False),
                dict(pooling='conv'),
                dict(sharing=None),
            )
        ],
        num_stages=3,
        strides=(8, 16, 32),
        stem=('patch_embed.', 'pos_embed'),
        stage='layers.{}.',
        output='norm{}.',
        depths={
            'patch_embed.proj.weight': 0,
            'pos_embed': 0,
            'layers.0.blocks.1.norm1.weight': 2,
            'layers.1.pool.proj.weight': 3,
            'layers.2.blocks.3.mlp.fc1.weight': 11,
            'norm2.weight': -1,
        },
        small=dict(
            arch=dict(stages=[(32, 2, (2,)), (48, 3, (2, 1))]),
            img_size=80,
            window_sizes=(4, None),
            out_indices=(0, 1),
        ),
        networks={
            '': dict(
                arch=dict(stages=[(32, 2, (2,)), (48, 3, (2, 1))]),
                window_sizes=(4, None),
                out_indices=(0, 1),
                finest_map=True,
            )
        },
        size=('img_size', dict(arch=PSVIT, window_sizes=(4, None, None))),
    ),
    'SWATSwin': Family(
        variants=[
            dict(arch=SWAT_SWIN),
            dict(arch=SWAT_SWIN, window_size=4, mlp_ratio=2.0),
            dict(arch=SWAT_SWIN, structured=False),
        ],
        num_stages=4,
        strides=(4, 8, 16, 32),
        stem=('patch_embed.',),
        stage='layers.{}.',
        output='norm{}.',
        depths={
            'patch_embed.conv1.weight': 0,
            'patch_embed.norm.weight': 0,
            'layers.0.blocks.1.norm1.weight': 2,
            'layers.0.downsample.norm.weight': 2,
            'norm3.weight': -1,
        },
        small=dict(arch=dict(embed_dims=32, depths=(2, 1), num_heads=(1, 2)), out_indices=(0, 1)),
        networks={
            '': dict(
                arch=dict(embed_dims=16, depths=(2, 1, 1), num_heads=(1, 2, 2)),
                window_size=4,
                out_indices=(0, 1, 2),
            )
        },
    ),
    'SWATDeiT': Family(
        variants=[
            dict(img_size=80, out_indices=(1, 3, 4, 5), **kwargs)
            for kwargs in (
                dict(arch=SWAT_VIT, plane_size=4),
                dict(arch=dict(SWAT_VIT, mlp_kernel=5), plane_size=2, qkv_bias=False),
                dict(arch=SWAT_VIT, structured=False),
            )
        ],
        num_stages=6,
        strides=(16, 16, 16, 16),
        stem=('patch_embed.', 'pos_embed'),
        stage='blocks.{}.',
        output=None,  # but for the last block, a norm
        depths={
            'pos_embed': 0,
            'blocks.0.norm1.weight': 1,
            'blocks.5.mlp.fc1.weight': 6,
            'norm.weight': -1,
        },
        small=dict(arch=dict(SMALL_VIT, patch_size=16, mlp_kernel=3), plane_size=4, img_size=80),
        networks={
            '': dict(arch=dict(SHORT_VIT, patch_size=16, mlp_kernel=3), plane_size=4),
            ' dense': dict(arch=dict(SHORT_VIT, patch_size=16, mlp_kernel=3), structured=False),
        },
        size=('img_size', dict(arch=SWAT_VIT, plane_size=4, out_indices=(1, 3, 4, 5))),
    ),
}
