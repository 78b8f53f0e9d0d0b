"""STViT-R on Swin (arXiv 2303.08685): the released classifiers and Cascade Mask R-CNN detectors.

Our names are the official ones. Source: github.com/changsn/STViT-R,
github.com/changsn/STViT-R-Object-Detection (MIT).
"""

from . import swin
from .source import Layout, Source

CROSS = rf'layers\.\d+\.blocks\.\d+\.attn\.(q|kv){swin.PARAM}'

STVIT_R = Source(
    'stvit-r',
    layouts=(
        Layout(
            'official',
            (r'layers\.2\.blocks\.1\.attn\.kv\.weight', r'layers\.2\.blocks\.1\.layer_scale_1'),
            swin.microsoft,
        ),
    ),
    known_keys=f'{swin.NAMES}|{CROSS}|{swin.CONV_STEM}|{swin.SEMANTIC}',
    ignorable_keys=swin.OUTPUT_NORMS,
)
