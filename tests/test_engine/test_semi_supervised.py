"""A student and its teacher, in a semi-supervised detector of mmdet."""

from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData
from mmengine.utils import import_modules_from_strings

from mmtoken.engine import TokenLossHook
from mmtoken.layers.common import routing
from mmtoken.runtime.decisions import record_routing

PVT = dict(
    type='mmtoken.DGEPVT',
    arch=dict(
        embed_dims=(8, 16), depths=(1, 1), num_heads=(1, 2), mlp_ratios=(2, 2), sr_ratios=(8, 4)
    ),
    out_indices=(0, 1),
    drop_path_rate=0.0,
    budget=dict(type='mmtoken.BudgetLoss', loss_weight=100.0),
)
MSVIT = dict(
    type='mmtoken.MSViT',
    arch=dict(embed_dims=16, num_layers=2, num_heads=2, feedforward_channels=16),
    out_indices=(0, 1),
    gate=dict(loss=dict(type='mmtoken.BatchShapingLoss', target_coarse_ratio=0.5)),
)
SIZE, BATCH = (48, 64), 64
BRANCHES = ('sup', 'unsup_teacher', 'unsup_student')


def make_model(backbone):
    import_modules_from_strings(['mmdet.models'])
    init_default_scope('mmdet')
    base = 'mmdet::_base_/models/faster-rcnn_r50_fpn.py'
    cfg = Config.fromstring(f'_base_ = {base!r}', '.py').model
    cfg.backbone = backbone
    widths = [8, 16] if backbone is PVT else [16, 16]
    cfg.neck = dict(type='FPN', in_channels=widths, out_channels=8, num_outs=2)
    cfg.rpn_head.update(in_channels=8, feat_channels=8)
    cfg.rpn_head.anchor_generator.strides = [4, 8]
    extractor = cfg.roi_head.bbox_roi_extractor
    extractor.update(out_channels=8, featmap_strides=[4, 8])
    cfg.roi_head.bbox_head.update(in_channels=8, fc_out_channels=8, num_classes=2)
    preprocessor = cfg.pop('data_preprocessor')
    preprocessor.update(pad_size_divisor=BATCH, pad_value=0, pad_mask=False)
    return MODELS.build(
        ConfigDict(
            type='SoftTeacher',
            detector=cfg,
            data_preprocessor=dict(
                type='MultiBranchDataPreprocessor', data_preprocessor=preprocessor
            ),
            semi_train_cfg=dict(
                freeze_teacher=True, sup_weight=1.0, unsup_weight=4.0,
                pseudo_label_initial_score_thr=0.0, rpn_pseudo_thr=0.0,
                cls_pseudo_thr=0.0, reg_pseudo_thr=1.0, jitter_times=2,
                jitter_scale=0.06, min_pseudo_bbox_wh=(1e-2, 1e-2),
            ),
            semi_test_cfg=dict(predict_on='teacher'),
        )
    )  # fmt: skip


def make_data():
    """One image in each branch."""
    from mmdet.structures import DetDataSample

    inputs, samples = {}, {}
    for name in BRANCHES:
        image = torch.randint(256, (3, *SIZE), dtype=torch.uint8)
        sample = DetDataSample(
            metainfo=dict(
                img_shape=SIZE, ori_shape=SIZE, scale_factor=(1.0, 1.0),
                homography_matrix=torch.eye(3).numpy(),
            ),
            gt_instances=InstanceData(
                bboxes=torch.tensor([[4.0, 4.0, 40.0, 40.0]]), labels=torch.tensor([1])
            ),
        )  # fmt: skip
        inputs[name], samples[name] = [image], [sample]
    return dict(inputs=inputs, data_samples=samples)


@pytest.mark.parametrize('backbone', [PVT, MSVIT])
def test_only_the_student_explores_and_is_held_to_the_budget(backbone, monkeypatch):
    torch.manual_seed(0)
    drawn = []

    def gumbel_noise(scores):
        drawn.append(len(scores))
        return torch.zeros_like(scores)

    monkeypatch.setattr(routing, 'gumbel_noise', gumbel_noise)
    model = make_model(backbone).train()
    TokenLossHook().before_train(SimpleNamespace(model=model))
    assert model.teacher.backbone.training  # mmdet leaves it so
    optim_wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.0))
    optim_wrapper.zero_grad = lambda: None
    with record_routing() as record:
        logged = model.train_step(make_data(), optim_wrapper)

    name = 'loss_budget' if backbone is PVT else 'loss_gate'
    assert logged[name].isfinite() and logged['loss'].isfinite()
    assert [key for key in logged if name in key] == [name]
    # One choice a network, or one a block: a view of the labelled image, then the teacher's, then
    # that of the other image. The second draws no noise.
    choices = len(record) // 3
    assert choices == (2 if backbone is PVT else 1) and len(drawn) == 2 * choices
    assert all(p.grad is None for p in model.teacher.parameters())
    chooser = [
        p for n, p in model.student.backbone.named_parameters() if 'router' in n or 'gate.' in n
    ]
    assert chooser and all(p.grad.abs().sum() > 0 for p in chooser)
    # Padding is known in all three branches.
    real = {tuple((~decision.padding[0]).any(1).tolist()) for decision in record}
    assert real == (
        {(True, True, True, False), (True, True)} if backbone is PVT else {(True, True)}
    )
