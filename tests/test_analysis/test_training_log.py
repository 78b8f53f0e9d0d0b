import json

import pytest

from mmtoken.analysis.training_log import describe_progress, last_scores


def write(path, *records, end=''):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(''.join(json.dumps(record) + '\n' for record in records) + end)


def test_latest_training(tmp_path):
    assert describe_progress(tmp_path) == 'starting' and last_scores(tmp_path) == {}
    write(tmp_path / '20260101_000000/vis_data/scalars.json', dict(loss=9.0, iter=75))
    latest = tmp_path / '20260102_000000/vis_data/scalars.json'
    write(latest, dict(loss=2.0, iter=25), end='{"loss": 1.0, "it')
    assert describe_progress(tmp_path) == 'iteration 25, loss 2'
    first, last = {'coco/bbox_mAP': 0.1}, {'coco/bbox_mAP': 0.3, 'coco/segm_mAP': 0.2, 'step': 7}
    write(latest, dict(loss=2.0, iter=25), first, dict(loss=1.0, iter=50), last)
    assert describe_progress(tmp_path) == 'iteration 50, loss 1'
    assert last_scores(tmp_path) == pytest.approx({'coco/bbox_mAP': 30, 'coco/segm_mAP': 20})


def test_scores_of_a_test(tmp_path):
    write(tmp_path / '20260101_000000/vis_data/scalars.json', dict(loss=9.0, iter=75), dict(mIoU=3))
    write(tmp_path / '20260102_000000/20260102_000000.json', dict(mIoU=7.5, aAcc=67.0))
    assert last_scores(tmp_path) == dict(mIoU=7.5)
