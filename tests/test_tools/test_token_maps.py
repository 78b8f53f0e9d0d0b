"""The command lines that look at what a network chooses."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent.parent
SHAPES = ROOT / 'configs' / 'shapes'
STATIC = SHAPES / 'mask-rcnn_stvit-r-swin-nano_fpn_1xb8-7e_shapes.py'
DENSE = SHAPES / 'mask-rcnn_stvit-r-swin-nano-dense_fpn_1xb8-7e_shapes.py'
(DETECTOR,) = SHAPES.glob('mask-rcnn_dge-pvt-nano_fpn_*_shapes.py')
(SEGMENTER,) = SHAPES.glob('fpn_dge-pvt-nano_1xb16-*.py')


@pytest.fixture(scope='module')
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp('images') / 'noise.png'
    noise = np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)
    Image.fromarray(noise).save(path)
    return path


def test_maps_are_drawn(image, run, tmp_path):
    out, ratios = tmp_path / 'maps', tmp_path / 'ratios.json'
    args = (DETECTOR, image, '--out', out, '--json', ratios, '--dpi', 40)
    result = run('token_maps', *args)
    assert result.returncode == 0, result.stderr
    assert 'weights are random' in result.stdout and 'noise.png' in result.stderr
    assert Image.open(out / 'noise.png').width > 300
    ratios = json.loads(ratios.read_text())[str(image)]
    assert len(ratios['stages']) == 4 and ratios['query_ratio'] > 0.9
    result = run('token_maps', *args)
    assert result.returncode == 1 and '--force' in result.stderr


def test_maps_of_a_network_that_chooses_once(image, run, tmp_path):
    config, ratios = tmp_path / 'msvit.py', tmp_path / 'ratios.json'
    config.write_text(f"""
_base_ = '{SEGMENTER}'
arch = dict(embed_dims=32, num_layers=1, num_heads=2, feedforward_channels=32)
model = dict(backbone=dict(_delete_=True, type='mmtoken.MSViT', arch=arch), neck=None)
""")
    result = run('token_maps', config, image, '--out', tmp_path, '--json', ratios, '--dpi', 40)
    assert result.returncode == 0, result.stderr
    assert '1.00 tokens per fine patch, 0.00 of the regions coarse' in result.stderr
    assert Image.open(tmp_path / 'noise.png').width > 200
    ratios = json.loads(ratios.read_text())[str(image)]
    unit = 'tokens per fine patch'
    assert ratios == dict(query_ratio=1.0, coarse_ratio=0.0, unit=unit, stages=[1.0])


def test_maps_of_several_budgets(image, run, tmp_path):
    ratios = tmp_path / 'ratios.json'
    args = (image, '--out', tmp_path, '--json', ratios, '--dpi', 40, '--budgets', 0.4, 1)
    result = run('token_maps', DETECTOR, *args)
    assert result.returncode == 0, result.stderr
    assert 'budget 0.4: 0.' in result.stderr and 'budget 1.0: 1.00 queries' in result.stderr
    assert Image.open(tmp_path / 'noise.png').width > 400
    measured = json.loads(ratios.read_text())[str(image)]
    assert measured['0.4']['query_ratio'] <= 0.4 < measured['1.0']['query_ratio']
    result = run('token_maps', STATIC, *args, '--force')
    assert result.returncode == 1 and 'no part of MaskRCNN chooses its tokens' in result.stderr


def test_maps_of_a_network_that_chooses_nothing(image, run, tmp_path):
    ratios = tmp_path / 'ratios.json'
    result = run('token_maps', STATIC, image, '--out', tmp_path, '--json', ratios, '--dpi', 40)
    assert result.returncode == 0, result.stderr
    assert Image.open(tmp_path / 'noise.png').width > 400
    assert json.loads(ratios.read_text()) == {str(image): {}}


def test_tables_of_statistics(capsys):
    from token_stats import report

    spread = dict(mean=0.5, std=0.125, min=0.25, max=0.75)
    shares = dict(all=0.456, objects=0.123, background=0.789)
    stage = dict(
        stride=8, query_ratio=0.654, objects=0.9, background=None, contrast=2.0,
        coarse_ratio=shares,
    )  # fmt: skip
    report(
        dict(
            images=4, unit='tokens per fine patch', stages=[stage], overall=stage,
            per_image=spread | dict(coarse_ratio=spread | dict(std=0.111)),
        )
    )  # fmt: skip
    out = capsys.readouterr().out
    assert 'Tokens per fine patch, images: 4' in out and '0.5 ± 0.111' not in out
    rows = [line.split() for line in out.splitlines() if line.startswith(' 1')]
    assert rows == [['1', '8', '0.654', '0.900', '2.000'], ['1', '8', '0.456', '0.123', '0.789']]
    assert '0.500 ± 0.111, from 0.250 to 0.750' in out


def test_nothing_to_draw(image, run, tmp_path):
    result = run('token_maps', DENSE, image, '--out', tmp_path)
    assert result.returncode == 1
    assert f'{DENSE}: no part of the model reduces, chooses' in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    'files, message',
    [
        (['none.jpg'], 'no image none.jpg'),
        (['none.pth', 'none.jpg'], 'no checkpoint none.pth'),
        ([__file__, 'other/test_token_maps.py'], 'no image other/test_token_maps.py'),
        ([__file__, __file__], 'several images have the same name'),
        ([__file__], f'{__file__}: failed to load image'),
    ],
)
def test_errors_are_one_line(files, message, run, tmp_path):
    result = run('token_maps', DETECTOR, *files, '--out', tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith(f'token_maps: {message}') and '\n' not in result.stderr.strip()


def test_statistics_over_a_validation_set(shapes_root, tmp_path):
    from mmengine.config import Config

    from mmtoken.analysis.configs import load_config
    from mmtoken.analysis.recording import load_model, record_batch, val_dataloader
    from mmtoken.analysis.token_stats import annotated, collect

    roots = (shapes_root / 'coco', shapes_root / 'ade' / 'ADEChallengeData2016')
    shares = []
    for path, root in zip((DETECTOR, SEGMENTER), roots, strict=True):
        cfg: Config = load_config(path)
        cfg.val_dataloader.dataset.data_root = str(root)
        model, objects = load_model(cfg, None), []

        def batches(cfg=cfg, model=model, objects=objects):
            for batch in val_dataloader(cfg):
                recorded = record_batch(model, batch)
                on_object, valid = annotated(recorded, background=[0])
                objects.append((on_object.sum() / valid.sum()).item())
                yield recorded, on_object, valid

        stats = collect(batches())
        assert stats['images'] == 4 and len(stats['stages']) == 4
        assert [stage['stride'] for stage in stats['stages']] == [4, 8, 16, 32]
        assert stats['overall']['query_ratio'] > 0.9
        shares.append(sum(objects) / len(objects))
    # The same scenes and objects in both layouts, but for batches and rounding.
    assert shares[0] == pytest.approx(shares[1], rel=0.3) and 0.05 < shares[0] < 0.7


def test_statistics_need_a_checkpoint(run, tmp_path):
    result = run('token_stats', SEGMENTER, tmp_path / 'none.pth')
    assert result.returncode == 1 and 'no checkpoint' in result.stderr
