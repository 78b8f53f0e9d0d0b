"""Which method for whom: the first table of the README."""

from statistics import median

from .common import BENCHMARKS, markdown, read
from .machines import other_machines
from .scores import differences

# Rows of the README's first table: what the user has, folder and name of the method, what it does
# to tokens, what else it costs; files of timings and of scores, with what was measured.
CHOICE = (
    ('Swin; any task', 'stvit_r', 'STViT-R', 'each window of 49 becomes 9',
     'ImageNet weights of its own: released for small and base',
     {'stvit-r-swin-s_forward_800x1280_run*': 'small'}, {'stvit-r': ''}),
    ('plain DeiT; speed first', 'stvit_deit', 'STViT', '4×4 become 1, attention is global',
     'score not measured; pretrain on ImageNet',
     {'stvit-deit-s_forward_800x1280_run*': 'small'}, {}),
    ('PVT or DeiT; images with large quiet areas', 'dge', 'DGE',
     'in every block, 16 of a region become 16, 4 or 1', 'a budget loss',
     {'dge-pvt-s_forward_800x1280_run*': 'PVT small, 0.436 of the queries'}, {'dge': ''}),
    ('plain ViT: DeiT, MAE, DINOv2', 'msvit', 'MSViT',
     'at the input, 4 of a region stay or become 1', 'a gate loss',
     {'msvit-s_forward_1x1024x1024_run*': 'small, half of the regions coarse'}, {'msvit': ''}),
    ('any weights of a plain ViT; no training', 'merge', 'MPM',
     'pairs of alike tokens become one, twice', 'score not measured',
     {'merge-vit-s_forward_1x1024x1024_run*': 'small; depends on the image'}, {}),
    ('time to train from scratch', 'psvit', 'PSViT', 'pooled twice; layers share attention maps',
     'no pretrained weights', {'psvit-t_forward_800x1280_run*': 'tiny'}, {'psvit': ''}),
    ('time to spend on accuracy', 'swat', 'SWAT', 'all stay and keep their spatial structure',
     'no weights released',
     {'swat-swin-t_forward_800x1280_run*': 'Swin tiny',
      'swat-deit-s_forward_800x1280_run*': 'DeiT small'},
     {'swat-swin': 'Swin', 'swat-deit': 'DeiT'}),
)  # fmt: skip


def choice() -> str:
    """The methods, for the README."""
    rows = []
    for have, folder, method, tokens, costs, timings, comparisons in CHOICE:
        gains = [f'{speedups(glob)}× ({what})' for glob, what in timings.items()]
        points = [
            ' '.join(filter(None, [what, *differences(read(BENCHMARKS / 'shapes', name)[name])]))
            for name, what in comparisons.items()
        ]
        rows.append(
            (have, f'[{method}](configs/{folder})', tokens, ', '.join(gains) or '–',
             '; '.join([*points, costs]))
        )  # fmt: skip
    header = ('you have', 'method', 'tokens', 'you get: speed-up', 'it costs: score in points')
    return markdown(header, rows)


def speedups(glob: str) -> str:
    """Of all machines: the median over our runs, or the range of that and what others measured."""
    ours = median(run['speedup'] for run in read(BENCHMARKS, glob).values())
    network = glob.removesuffix('_run*')
    others = [
        speedup
        for found in other_machines().values()
        for (of, _), speedup in found.items()
        if of == network
    ]
    return '–'.join(dict.fromkeys(f'{end([ours, *others]):.2f}' for end in (min, max)))
