from mmtoken.checkpoints import Report
from mmtoken.checkpoints.report import group_names


def test_names_are_grouped():
    names = [f'layers.{i}.blocks.{j}.norm1.weight' for i in range(2) for j in range(3)]
    grouped = 'layers.*.blocks.*.norm*.weight x 6'
    assert group_names(names) == [grouped]
    assert group_names([*names, 'norm3.bias']) == [grouped, 'norm3.bias']
    assert group_names([]) == []


def test_long_lists_are_shortened():
    names = [f'roi_head.{part}.weight' for part in 'abcdefghij'] + ['neck.a', 'scale']
    assert group_names(names) == ['roi_head.* x 10', 'neck.*', 'scale']
    assert group_names('abcdefghij') == [*'abcdefgh', 'and 2 more']


def test_as_text():
    report = Report(
        'swin',
        'timm',
        mapped={'layers.0.blocks.0.norm1.weight': 'layers.0.blocks.0.norm1.weight'},
        resized={f'blocks.{i}.table': ((225, 3), (169, 3)) for i in range(2)},
        dropped=['head.fc.weight'],
        newly_initialized=['norm0.weight', 'norm1.weight'],
    )
    text = str(report)
    assert text.startswith('Read as swin (timm names)\n')
    for what in (
        'mapped',
        'blocks.*.table (225, 3) -> (169, 3) x 2',
        'head.fc.weight',
        'norm*.weight x 2',
    ):
        assert what in text
    assert 'split' not in text and 'unknown' not in text
    assert max(len(line) for line in text.splitlines()) <= 100
    summary = report.summary()
    assert summary.startswith('swin (timm names): 1 tensors; 2 resized (blocks.*.table x 2); ')
    assert '\n' not in summary
