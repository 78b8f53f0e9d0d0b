"""The rows of the study: what they train, and from where."""

import pytest
import rows
from rows import ROOT, read_rows, tasks

DETECTOR = 'configs/shapes/mask-rcnn_stvit-r-swin-nano_fpn_1xb8-7e_shapes.py'


@pytest.mark.parametrize('task', tasks())
def test_rows_name_configs(task):
    for name, row in read_rows(task).items():
        assert (row.task, row.name) == (task, name)
        assert (ROOT / row.config).is_file()


@pytest.mark.parametrize('task', ['light', 'nuclei', 'shapes'])
def test_every_sparse_detector_has_its_twin(task):
    rows = read_rows(task)
    configs = {name: row.config for name, row in rows.items()}
    for name, config in configs.items():
        if not name.endswith('_dense'):
            size = '-dinov2_' if '-dinov2_' in config else '-nano_'
            twin = config.replace(size, size.replace('_', '-dense_'))
            assert twin in configs.values()
            assert rows[name].options or configs[f'{name}_dense'] == twin


def test_size_of_photographs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = read_rows('camvid')['dense_294x392'].load(seed=3)
    assert cfg.model.data_preprocessor.size == (294, 392)
    for part in (cfg.train_dataloader, cfg.test_dataloader):
        assert [t.scale for t in part.dataset.pipeline if t.type == 'Resize'] == [(392, 294)]
    assert cfg.randomness.seed == 3 and not cfg.resume


def test_detectors_have_no_size(write):
    write(f'{{config: {DETECTOR}, rows: {{small: {{size: [128, 160]}}}}}}')
    with pytest.raises(ValueError, match=r'size \[128, 160\] .* only segmenters .* not MaskRCNN'):
        read_rows('mine')['small'].load(seed=0)


def test_resumes_from_its_checkpoint_and_not_from_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = read_rows('shapes')['dge']
    cfg = row.load(seed=0)
    assert 'pvt-nano' in cfg.load_from and not cfg.resume
    row.work_dir(0).mkdir(parents=True)
    (row.work_dir(0) / 'last_checkpoint').write_text('epoch_1.pth')
    cfg = row.load(seed=0)
    assert cfg.load_from == 'epoch_1.pth' and cfg.resume
    assert not row.load(seed=1).resume


@pytest.mark.parametrize(
    'row, message',
    [('{config: c, sice: [1, 2]}', r"row a of mine.yml has unknown keys \['sice'\]"),
     ('{options: {x: 1}}', 'row a of mine.yml needs a config')],
)  # fmt: skip
def test_bad_rows(write, row, message):
    write(f'rows: {{a: {row}}}')
    with pytest.raises(ValueError, match=message):
        read_rows('mine')


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write the rows of a task named ``mine``."""
    monkeypatch.setattr(rows, 'HERE', tmp_path)
    monkeypatch.chdir(tmp_path)
    return (tmp_path / 'mine.yml').write_text
