"""Sizes of images, from data samples to backbones and necks, in whole models."""

import copy

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.logging import MessageHub
from mmengine.model import BaseDataPreprocessor, BaseModel, ImgDataPreprocessor
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import BaseDataElement
from mmengine.utils import import_modules_from_strings
from torch import nn

import mmtoken
from mmtoken.engine.image_sizes import sizes_of_samples
from mmtoken.layers.common.padding import noted_sizes, valid_size
from mmtoken.necks import GrainUnpoolNeck
from mmtoken.runtime.decisions import record_routing


def samples(*metas):
    return [BaseDataElement(metainfo=meta) for meta in metas]


def batch(*sizes, shape=(64, 96), colour=0.0):
    images = torch.full((len(sizes), 3, *shape), colour)
    for image, (height, width) in zip(images, sizes, strict=True):
        image[:, :height, :width] = torch.randn(3, height, width)
    return images


def read(images, *metas, **kwargs):
    sizes = sizes_of_samples(images, samples(*metas), **kwargs)
    return None if sizes is None else sizes.tolist()


@pytest.mark.parametrize(
    'metas',
    [
        # mmdet: the preprocessor adds the shape of the batch.
        [dict(batch_input_shape=(64, 96))] * 2,
        # mmseg, in training and in test
        [dict(padding_size=(0, 46, 0, 0)), dict(padding_size=(0, 0, 0, 34))],
        [dict(img_padding_size=[0, 46, 0, 0]), dict(img_padding_size=[0, 0, 0, 34])],
        # mmpretrain: nothing; the largest sides are those of the batch.
        [{}, {}],
    ],
)
@pytest.mark.parametrize('colour', [0.0, 1e-6, 114.0, float('nan')])
def test_what_the_libraries_say(metas, colour):
    sizes = [(64, 50), (30, 96)]
    metas = [dict(meta, img_shape=size) for meta, size in zip(metas, sizes, strict=True)]
    assert read(batch(*sizes, colour=colour), *metas) == [[64, 50], [30, 96]]
    metas[0]['img_shape'] = (64, 50, 3)
    metas[1]['img_shape'] = torch.Size([30, 96])
    assert read(batch(*sizes, colour=colour), *metas) == [[64, 50], [30, 96]]


def test_a_divisor_enlarges_the_batch():
    images, metas = batch((60, 50), (30, 90)), [dict(img_shape=(60, 50)), dict(img_shape=(30, 90))]
    assert read(images, *metas, size_divisor=32) == [[60, 50], [30, 90]]
    assert read(images, *metas) is None


@pytest.mark.parametrize(
    'metas',
    [
        [{}, dict(img_shape=(64, 96))],
        [dict(img_shape=None), dict(img_shape=(64, 96))],
        [dict(img_shape=64), dict(img_shape=(64, 96))],
        [dict(img_shape=(65, 96)), dict(img_shape=(64, 96))],
        [dict(img_shape=(0, 96)), dict(img_shape=(64, 96))],
        # of something else than this batch, as in pose estimation
        [dict(img_shape=(40, 30)), dict(img_shape=(50, 90))],
        [dict(img_shape=(64, 96), batch_input_shape=(128, 96))] * 2,
        # not at the bottom and right
        [dict(img_shape=(64, 50), padding_size=(46, 0, 0, 0))] * 2,
        [dict(img_shape=(64, 50), padding_size=(23, 23, 0, 0))] * 2,
    ],
)
def test_what_does_not_fit_says_nothing(metas):
    assert read(batch((64, 96), (64, 96)), *metas) is None


@pytest.mark.parametrize(
    'images, given',
    [
        (batch((64, 96)), None),
        (batch((64, 96)), samples()),
        (batch((64, 96)), samples(dict(img_shape=(64, 96))) * 2),
        (batch((64, 96)), [dict(img_shape=(64, 96))]),
        (batch((64, 96)), [samples(dict(img_shape=(64, 96)))]),
        (batch((64, 96))[0], samples(dict(img_shape=(64, 96)))),
        ([batch((64, 96))], samples(dict(img_shape=(64, 96)))),
        (None, None),
    ],
)
def test_no_batch_or_no_samples(images, given):
    assert sizes_of_samples(images, given) is None


@pytest.mark.parametrize('scale', [(0.5, 0.25), np.array([0.5, 0.25]), (0.5, 0.25, 0.5, 0.25)])
def test_padding_of_the_pipeline(scale):
    """``img_shape`` includes it, so the size of the content must come from elsewhere."""
    meta = dict(img_shape=(64, 96), batch_input_shape=(64, 128), scale_factor=scale)
    # 160 x 120 pixels become 40 x 60.
    images = batch((40, 60), shape=(64, 128))
    images[:, :, 40:, :96] = images[:, :, :40, 60:96] = 114
    assert read(images, dict(meta, ori_shape=(160, 120))) == [[40, 60]]
    # A crop of a larger image
    assert read(images, dict(meta, ori_shape=(300, 120))) == [[64, 60]]
    assert read(images, dict(meta, ori_shape=(3000, 1200))) == [[64, 96]]
    # A mosaic: there is something beyond.
    images[:, :, 50, 3] = 1
    assert read(images, dict(meta, ori_shape=(160, 120))) == [[64, 96]]
    assert read(images, dict(meta, ori_shape=(160, 120), scale_factor=None)) == [[64, 96]]
    assert read(images, dict(meta, ori_shape=(160, 120), scale_factor=(0.0, 1.0))) == [[64, 96]]


def test_only_images_with_a_plain_border_are_smaller():
    meta = dict(img_shape=(64, 96), scale_factor=0.5, ori_shape=(64, 96))
    images = batch((32, 48), (64, 96), colour=-1.7)
    assert read(images, meta, meta) == [[32, 48], [64, 96]]


class Detector(BaseModel):
    """Keeps the sizes that its backbone would see."""

    def __init__(self, backbone=None, neck=None):
        super().__init__(ImgDataPreprocessor(pad_size_divisor=32, pad_value=7))
        self.backbone, self.neck, self.seen = backbone or nn.Identity(), neck, []

    def forward(self, inputs, data_samples=None, mode='tensor'):
        self.seen.append(valid_size(inputs).tolist())
        return self.backbone(inputs)


SIZES = [(40, 90), (64, 33)]
DATA = dict(
    inputs=[torch.ones(3, *size) for size in SIZES],
    data_samples=samples(*(dict(img_shape=size) for size in SIZES)),
)


def test_a_model_follows():
    model = Detector()
    model.test_step(DATA)
    for _ in range(2):
        mmtoken.follow_image_sizes(model)
    assert len(model._forward_pre_hooks) == 1
    model.test_step(DATA)
    model.val_step(DATA)
    copied = copy.deepcopy(model)
    copied.seen.clear()
    copied.test_step(DATA)
    padded = model.data_preprocessor(DATA)['inputs']
    model(padded, DATA['data_samples'], 'predict')
    model(padded[:1])
    model(padded.clone())
    sizes, whole = [list(size) for size in SIZES], [64, 96]
    assert model.seen == [[whole] * 2, sizes, sizes, sizes, sizes[:1], [whole] * 2]
    assert copied.seen == [sizes]


def test_models_inside_models_follow():
    class Wrapper(BaseModel):
        def __init__(self, module):
            super().__init__(BaseDataPreprocessor())
            self.module = module

        def test_step(self, data):
            return self.module.test_step(data)

        def forward(self, inputs, data_samples, mode):
            return [self.module(images) for images in inputs.values()]

    model = Wrapper(Detector())
    mmtoken.follow_image_sizes(model)
    model.test_step(DATA)  # as test-time augmentation does
    whole = dict(a=torch.ones(1, 3, 20, 20), b=torch.ones(1, 3, 20, 20))
    metas = dict(a=samples(dict(img_shape=(10, 20), batch_input_shape=(20, 20))), c=None)
    model(whole, metas, 'loss')  # as semi-supervised detectors are called
    assert model.module.seen == [[list(size) for size in SIZES], [[10, 20]], [[20, 20]]]


def test_models_that_cannot_follow():
    with pytest.raises(TypeError, match='Linear has no BaseModel.* mmtoken.set_image_sizes'):
        mmtoken.follow_image_sizes(nn.Linear(1, 1))


class Patches(nn.Module):
    """A backbone of somebody else."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 8, 8)

    def forward(self, x):
        return (self.conv(x),)


@pytest.mark.parametrize('listed', [False, True])
def test_a_neck_learns_behind_any_backbone(listed):
    """Regions of 4 x 4 places of stride 8, in a batch of 64 x 96 pixels."""
    neck = GrainUnpoolNeck([8], [2], depth=2, budget=None)
    model = Detector(Patches(), nn.Sequential(neck) if listed else neck).eval()
    mmtoken.follow_image_sizes(model)
    with torch.no_grad(), record_routing() as record:
        (maps,) = model.test_step(DATA)
        assert noted_sizes(maps).tolist() == [[5, 12], [8, 5]]
        model.neck([maps])
        model.neck([maps.clone()])
    padding = torch.tensor([[[0, 0, 0], [0, 0, 0]], [[0, 0, 1], [0, 0, 1]]]).bool()
    for decision in record[:2]:
        assert torch.equal(decision.padding, padding)
        assert (decision.choice[padding] == 2).all()
    assert all(decision.padding is None for decision in record[2:])


# Whole models of the libraries

PVT = dict(
    type='mmtoken.DGEPVT',
    arch=dict(
        embed_dims=(8, 16), depths=(1, 1), num_heads=(1, 2), mlp_ratios=(2, 2), sr_ratios=(8, 4)
    ),
    out_indices=(0, 1),
    drop_path_rate=0.0,
)


def paddings(model, call):
    """Size in regions of the part that is no padding, of each image, in the first block."""
    with record_routing() as record, torch.no_grad():
        call(model.eval())
    real = ~record[0].padding
    return [(int(image.any(1).sum()), int(image.any(0).sum())) for image in real]


def retinanet(**preprocessor):
    import_modules_from_strings(['mmdet.models'])
    init_default_scope('mmdet')
    return MODELS.build(
        ConfigDict(
            type='RetinaNet',
            data_preprocessor=dict(
                type='DetDataPreprocessor', mean=[0.0] * 3, std=[1.0] * 3, **preprocessor
            ),
            backbone=PVT,
            neck=dict(type='FPN', in_channels=[8, 16], out_channels=8, num_outs=2),
            bbox_head=dict(
                type='RetinaHead',
                num_classes=2,
                in_channels=8,
                feat_channels=8,
                stacked_convs=1,
                anchor_generator=dict(
                    type='AnchorGenerator', octave_base_scale=4, scales_per_octave=1,
                    ratios=[1.0], strides=[4, 8],
                ),
                bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
            ),
            train_cfg=dict(
                assigner=dict(
                    type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0
                ),
                sampler=dict(type='PseudoSampler'),
                allowed_border=-1,
                pos_weight=-1,
            ),
            test_cfg=dict(
                nms_pre=10, score_thr=0.0, nms=dict(type='nms', iou_threshold=0.5), max_per_img=5
            ),
        )
    )  # fmt: skip


def packed(image, pipeline):
    """An image through transforms of mmdet."""
    from mmcv.transforms import Compose
    from mmdet.structures.bbox import HorizontalBoxes

    import_modules_from_strings(['mmdet.datasets.transforms'])
    height, width = image.shape[:2]
    meta = dict(
        img=image, img_shape=(height, width), ori_shape=(height, width), img_id=0, img_path='',
        scale_factor=(1.0, 1.0), gt_bboxes=HorizontalBoxes(torch.zeros(0, 4)),
    )  # fmt: skip
    init_default_scope('mmdet')
    return Compose([*pipeline, dict(type='PackDetInputs')])(meta)


def noise(height, width):
    return np.random.default_rng(0).integers(256, size=(height, width, 3), dtype=np.uint8)


def collate(items):
    return {key: [item[key] for item in items] for key in ('inputs', 'data_samples')}


@pytest.mark.parametrize('pad_value', [0, 114])
def test_mmdet_pads_the_batch(pad_value):
    """Images of zeros, in a batch that is padded; regions of 16 pixels."""
    data = collate([packed(np.zeros((h, w, 3), np.uint8), []) for h, w in ((48, 64), (64, 16))])
    model = retinanet(pad_size_divisor=32, pad_value=pad_value)
    mmtoken.follow_image_sizes(model)
    assert paddings(model, lambda m: m.test_step(data)) == [(3, 4), (4, 1)]


def test_mmdet_pads_in_the_pipeline_of_rtmdet():
    pipeline = [
        dict(type='Resize', scale=(64, 64), keep_ratio=True),
        dict(type='Pad', size=(64, 64), pad_val=dict(img=(114, 114, 114))),
    ]
    items = [packed(noise(h, w), pipeline) for h, w in ((64, 128), (99, 51))]
    assert items[0]['data_samples'].img_shape == (64, 64)  # what the pipeline says
    model = retinanet()
    mmtoken.follow_image_sizes(model)
    assert paddings(model, lambda m: m.test_step(collate(items))) == [(2, 4), (4, 3)]


def test_mmdet_resizes_the_batch():
    data = collate([packed(noise(h, w), []) for h, w in ((64, 64), (64, 32))])
    model = retinanet(
        batch_augments=[
            dict(type='BatchSyncRandomResize', random_size_range=(128, 128), interval=1)
        ]
    )
    mmtoken.follow_image_sizes(model)
    preprocessor = model.data_preprocessor
    preprocessor.batch_augments[0]._input_size = (128, 128)
    for sample in data['data_samples']:
        del sample.ignored_instances
    MessageHub.get_current_instance().update_info('iter', 1)
    prepared = preprocessor(data, training=True)
    assert prepared['inputs'].shape[2:] == (128, 128)
    assert paddings(model, lambda m: m(**prepared, mode='predict')) == [(8, 8), (8, 4)]


def segmentor(mode, **preprocessor):
    import_modules_from_strings(['mmseg.models'])
    init_default_scope('mmseg')
    return MODELS.build(
        ConfigDict(
            type='EncoderDecoder',
            data_preprocessor=dict(type='SegDataPreProcessor', **preprocessor),
            backbone=PVT,
            decode_head=dict(
                type='FPNHead', in_channels=[8, 16], in_index=[0, 1], feature_strides=[4, 8],
                channels=8, num_classes=3,
            ),
            test_cfg=mode,
        )
    )  # fmt: skip


def seg_data(*sizes):
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    def sample(size):
        labels = PixelData(data=torch.zeros(1, *size, dtype=torch.long))
        return SegDataSample(gt_sem_seg=labels, metainfo=dict(img_shape=size, ori_shape=size))

    return dict(
        inputs=[torch.zeros(3, *size, dtype=torch.uint8) for size in sizes],
        data_samples=[sample(size) for size in sizes],
    )


def test_mmseg_in_training_and_in_test():
    model = segmentor(
        dict(mode='whole'), size=(64, 64), pad_val=114, test_cfg=dict(size_divisor=64)
    )
    mmtoken.follow_image_sizes(model)

    def train(model):
        prepared = model.data_preprocessor(seg_data((48, 64), (64, 16)), training=True)
        model.train()
        with mmtoken.token_losses():
            model(**prepared, mode='loss')

    assert paddings(model, train) == [(3, 4), (4, 1)]
    assert paddings(model, lambda m: m.test_step(seg_data((48, 32)))) == [(3, 2)]


def test_mmseg_slides_over_images_that_are_black_in_part():
    model = segmentor(
        dict(mode='slide', crop_size=(64, 64), stride=(32, 32)), test_cfg=dict(size=(64, 160))
    )
    mmtoken.follow_image_sizes(model)
    data = seg_data((64, 130))
    data['inputs'][0][:, :, :10] = 9
    with record_routing() as record:
        model.eval().test_step(data)
    real = [int((~decision.padding).any(1).sum()) for decision in record[::2]]
    # Crops begin at 0, 32, 64 and 96, and the image ends at 130.
    assert real == [4, 4, 4, 3]
