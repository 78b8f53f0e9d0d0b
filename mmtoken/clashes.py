"""Distributions that are known not to work together, or with mmtoken.

As of November 2026, with the newest releases: mmengine 0.10.7, mmcv 2.2.0, mmdet 3.3.0,
mmsegmentation 1.2.2, mmpretrain 1.2.0; onedl-mmengine 0.10.12, onedl-mmcv 2.3.6,
onedl-mmdetection 3.5.1, onedl-mmsegmentation 1.4.2, onedl-mmpretrain 1.3.6; torch 2.11.0.
"""

from typing import NamedTuple

# import name -> (upstream distribution, onedl distribution)
DISTRIBUTIONS = {
    'mmengine': ('mmengine', 'onedl-mmengine'),
    'mmcv': ('mmcv', 'onedl-mmcv'),
    'mmdet': ('mmdet', 'onedl-mmdetection'),
    'mmseg': ('mmsegmentation', 'onedl-mmsegmentation'),
    'mmpretrain': ('mmpretrain', 'onedl-mmpretrain'),
}
# Libraries that import mmcv's ops with any model. mmpretrain does not.
NEED_OPS = (*DISTRIBUTIONS['mmdet'], *DISTRIBUTIONS['mmseg'])
# Checked by a library at its import: (distribution, its versions, mmcv must be below)
MMCV_BELOW = (
    ('mmdet', '>=3.0.dev0,<3.2', '2.1'),
    ('mmdet', '>=3.2,<3.4', '2.2'),
    ('mmsegmentation', '>=1.0.dev0,<1.2', '2.1'),
    ('mmsegmentation', '>=1.2,<1.3', '2.2'),
    ('mmpretrain', '>=1.0.dev0,<1.1', '2.1'),
    ('mmpretrain', '>=1.1,<1.2', '2.2'),
    ('mmpretrain', '>=1.2,<1.3', '2.4'),
    ('onedl-mmpretrain', '<=1.3.6', '2.4'),
)


class Clash(NamedTuple):
    """Distributions that do not work together, or one that does not work with mmtoken.

    Attributes:
        found: Distribution to the versions that clash, as pip writes them (``'>=2.dev0'`` includes
            the pre-releases of 2), ``''`` for any version, None for not installed.
        why: What does not work. Each ``{}`` becomes a distribution and its version, in order.
        command: The command that solves it. ``{install_mmcv}`` becomes the one that compiles the
            mmcv that suits what is installed.
    """

    found: dict[str, str | None]
    why: str
    command: str


BOTH_FAMILIES = [
    Clash(
        {upstream: '', onedl: ''},
        f'both {upstream} and {onedl} are installed, and each overwrites the files of `{module}`; '
        'keep one',
        '{install_mmcv}'
        if module == 'mmcv'
        else f'pip uninstall -y {upstream} {onedl} && pip install {onedl}',
    )
    for module, (upstream, onedl) in (
        *DISTRIBUTIONS.items(),
        ('mmengine', ('mmengine-lite', 'onedl-mmengine')),
    )
]

TOO_OLD = [
    *(
        Clash({name: f'<{oldest}'}, f'{{}} is too old, mmtoken needs {oldest} or later', command)
        for name, oldest, command in (
            ('timm', '1.0', 'pip install "timm>=1.0"'),
            ('mmengine', '0.8.3', 'pip install "mmengine==0.10.7"'),
            ('mmengine-lite', '0.8.3', 'pip install "mmengine-lite==0.10.7"'),
            ('mmcv', '2.0.0rc4', '{install_mmcv}'),
            ('mmdet', '3.0', 'pip install "mmdet==3.3.0"'),
            ('mmsegmentation', '1.0', 'pip install "mmsegmentation==1.2.2"'),
            ('mmpretrain', '1.0', 'pip install "mmpretrain==1.2.0"'),
        )
    ),
    Clash(
        {'torch': '<2.1.dev0'},
        '{} is too old, mmtoken needs 2.1 or later, and mmcv compiled for it',
        'pip install "torch>=2.1,<2.6" "torchvision<0.21"',
    ),
    Clash(
        {'mmcv-full': ''},
        '{} is too old, mmtoken needs mmcv 2, where the package that has the ops is named mmcv',
        '{install_mmcv}',
    ),
    Clash(
        {'mmcls': '', 'mmpretrain': None, 'onedl-mmpretrain': None},
        '{} is too old, mmtoken needs 1.0 or later, which is named mmpretrain',
        'pip uninstall -y mmcls && pip install "mmpretrain==1.2.0"',
    ),
]

WRONG_MMCV = [
    *(
        Clash(
            {library: versions, mmcv: f'>={limit}'},
            f'{{}} refuses {{}} (it allows 2.0.0 and later below {limit})',
            '{install_mmcv}',
        )
        for library, versions, limit in MMCV_BELOW
        for mmcv in DISTRIBUTIONS['mmcv']
    ),
    *(
        Clash(
            {library: '', 'mmcv': '', 'onedl-mmcv': None},
            '{} goes with onedl-mmcv, and not with {}',
            '{install_mmcv}',
        )
        for library in NEED_OPS
        if library.startswith('onedl-')
    ),
    *(
        Clash(
            {library: '', 'mmcv-lite': ''},
            '{} imports ops of mmcv, which {} lacks',
            '{install_mmcv}',
        )
        for library in NEED_OPS
    ),
]

# Of the last upstream release, in either of its two distributions; fixed in onedl-mmengine
WRONG_MMENGINE = [
    clash
    for mmengine in ('mmengine', 'mmengine-lite')
    for clash in (
        Clash(
            {mmengine: '<=0.10.7', 'torch': '>=2.6.dev0'},
            '{} cannot read its own checkpoints with {}, whose torch.load accepts only weights: '
            'testing and resuming fail; install an older torch and compile mmcv for it, or '
            'change to the onedl stack',
            'pip install "torch<2.6" "torchvision<0.21" && {install_mmcv}, or: '
            'pip uninstall -y {upstream} && '
            'pip install --no-build-isolation --no-cache-dir --no-binary onedl-mmcv {onedl}',
        ),
        Clash(
            {mmengine: '<=0.10.7', 'setuptools': '>=82.dev0'},
            '{} needs pkg_resources, which {} does not have, so no `mmdet::` config path resolves',
            'pip install "setuptools<82"',
        ),
    )
]

OTHERS = [
    Clash(
        {'torch': '<2.3.dev0', 'numpy': '>=2.dev0'},
        '{} was built for numpy 1 and cannot exchange arrays with {}',
        'pip install "numpy<2"',
    ),
    # mmpretrain imports its multimodal models if there is pycocotools; mmdet imports mmpretrain.
    *(
        Clash(
            {mmpretrain: versions, 'transformers': f'>={limit}.dev0', 'pycocotools': ''},
            '{} and mmdet cannot be imported, because {} lacks what the former imports from it',
            f'pip install "transformers<{limit}"',
        )
        for mmpretrain, versions, limit in (
            ('mmpretrain', '<=1.2.0', '4.56'),
            ('onedl-mmpretrain', '<=1.3.6', '5'),
        )
    ),
]

CLASHES = (*BOTH_FAMILIES, *TOO_OLD, *WRONG_MMCV, *WRONG_MMENGINE, *OTHERS)
