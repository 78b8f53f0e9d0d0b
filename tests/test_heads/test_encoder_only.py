"""The heads in models of both libraries: losses, results, and what they refuse."""

import pytest
import torch
from families import VIT
from mmdet.structures import DetDataSample
from mmengine.config import ConfigDict
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData, PixelData
from mmseg.structures import SegDataSample

import mmtoken.heads.instance
import mmtoken.heads.semantic  # noqa: F401

SIZE = (64, 96)
BACKBONE = dict(
    type='mmtoken.MSViT', arch=VIT, gate=None, out_indices=(3,), out_prefix=True, img_size=64
)
DECODER = dict(arch=VIT, num_blocks=2, num_queries=6, annealing=dict(total_iters=4))


def detector(**kwargs):
    init_default_scope('mmdet')
    classes = dict(num_things_classes=3, num_stuff_classes=0)
    return MODELS.build(
        ConfigDict(
            type='Mask2Former',
            backbone=BACKBONE,
            panoptic_head=dict(
                type='mmtoken.EncoderOnlyInstanceHead', decoder=DECODER, **classes, **kwargs
            ),
            panoptic_fusion_head=dict(
                type='MaskFormerFusionHead', loss_panoptic=None, init_cfg=None, **classes
            ),
            train_cfg=dict(num_points=64),
            test_cfg=dict(
                panoptic_on=False, semantic_on=False, instance_on=True, max_per_image=5,
                iou_thr=0.8, filter_low_score=True,
            ),
        )
    )  # fmt: skip


def instances(number):
    sample = DetDataSample(
        metainfo=dict(
            img_shape=SIZE, ori_shape=SIZE, pad_shape=SIZE, batch_input_shape=SIZE,
            scale_factor=(1.0, 1.0),
        )
    )  # fmt: skip
    masks = torch.zeros(number, *SIZE, dtype=torch.uint8)
    masks[:, 8:40, 16:60] = 1
    sample.gt_instances = InstanceData(
        labels=torch.arange(number) % 3, masks=Masks(masks), bboxes=torch.zeros(number, 4)
    )
    return sample


class Masks:
    """What the head needs of mmdet's BitmapMasks."""

    def __init__(self, masks):
        self.masks = masks

    def __len__(self):
        return len(self.masks)

    def pad(self, shape, pad_val):
        return self

    def to_tensor(self, dtype, device):
        return self.masks.to(device, dtype)


def segmenter():
    init_default_scope('mmseg')
    return MODELS.build(
        ConfigDict(
            type='EncoderDecoder',
            backbone=BACKBONE,
            decode_head=dict(
                type='mmtoken.EncoderOnlySemanticHead',
                num_classes=4,
                decoder=DECODER,
                train_cfg=dict(num_points=64),
            ),
            test_cfg=dict(mode='whole'),
        )
    )


def labels(value):
    sample = SegDataSample(metainfo=dict(img_shape=SIZE, ori_shape=SIZE, pad_shape=SIZE))
    maps = torch.full((1, *SIZE), value)
    maps[:, :30] = 255
    sample.gt_sem_seg = PixelData(data=maps)
    return sample


CASES = dict(
    detector=(detector, lambda: [instances(2), instances(0)]),
    segmenter=(segmenter, lambda: [labels(1), labels(255)]),  # the second one without any label
)


@pytest.mark.parametrize('make, samples', CASES.values(), ids=CASES)
def test_losses_reach_all_parameters(make, samples):
    torch.manual_seed(0)
    model = make()
    model.init_weights()
    losses = model.loss(torch.randn(2, 3, *SIZE), samples())
    assert len(losses) == 9 and all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_instances_are_found():
    model = detector().eval()
    with torch.no_grad():
        results = model.predict(torch.randn(2, 3, *SIZE), [instances(1), instances(1)])
    for sample in results:
        found = sample.pred_instances
        assert found.masks.shape[1:] == SIZE and len(found.scores) == len(found.masks) <= 5


def test_labels_are_predicted():
    model = segmenter().eval()
    with torch.no_grad():
        results = model.predict(torch.randn(2, 3, *SIZE), [labels(1), labels(2)])
    for sample in results:
        assert sample.pred_sem_seg.data.shape == (1, *SIZE)
        assert sample.seg_logits.data.shape == (4, *SIZE)


def test_other_losses():
    head = detector(loss_cls=dict(type='CrossEntropyLoss', loss_weight=7.0)).panoptic_head
    assert head.loss_cls.loss_weight == 7.0
    assert head.class_weight == [1.0, 1.0, 1.0, 0.1]
    assert head.num_points == 64 and head.oversample_ratio == 3.0


@pytest.mark.parametrize('outputs', [1, 3])
def test_other_outputs_are_refused(outputs):
    head = segmenter().decode_head
    maps = [torch.zeros(1, 32, 4, 6)] * outputs
    with pytest.raises(ValueError, match='needs a map and prefix tokens.*out_prefix=True'):
        head(maps)
