import pytest
import torch

from mmtoken.checkpoints import read_checkpoint
from mmtoken.checkpoints.download import cached_path

URL = 'https://example.org/weights/model%20a.pth?download=true'


@pytest.fixture
def web(tmp_path, monkeypatch):
    """Answers downloads with a file, and counts them."""
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    asked = []

    def answer(url, path, progress):
        asked.append(url)
        if 'missing' in url:
            raise OSError('HTTP Error 404: Not Found')
        torch.save(dict(weight=torch.ones(2)), path)

    monkeypatch.setattr(torch.hub, 'download_url_to_file', answer)
    return asked


def test_downloaded_once(web):
    for _ in range(2):
        assert torch.equal(read_checkpoint(URL)['weight'], torch.ones(2))
    assert web == [URL]
    assert cached_path(URL).name.endswith('-model a.pth')


def test_addresses_do_not_share_a_file(web):
    other = URL.replace('example.org', 'example.com')
    assert cached_path(URL) != cached_path(other)


def test_failed_download_names_the_address(web):
    with pytest.raises(OSError, match=r'https://missing\.org/a\.pth was not downloaded: .*404'):
        read_checkpoint('https://missing.org/a.pth')


def test_other_processes_wait_for_the_first(web, monkeypatch):
    monkeypatch.setenv('LOCAL_RANK', '1')
    with pytest.raises(OSError, match='by the first process of this machine'):
        read_checkpoint(URL)
    assert web == []


def test_damaged_download(web, monkeypatch):
    read_checkpoint(URL)
    cached_path(URL).write_bytes(cached_path(URL).read_bytes()[:100])
    with pytest.raises(ValueError, match=r'model%20a.*damaged.*delete .*model a\.pth'):
        read_checkpoint(URL)


def test_a_file_put_there_by_hand_is_taken(web, tmp_path):
    """As torch.hub and MMEngine do; a name that holds a hash is checked."""
    folder = tmp_path / 'hub' / 'checkpoints'
    folder.mkdir(parents=True)
    torch.save(dict(weight=torch.zeros(3)), folder / 'swin.pth')
    assert torch.equal(read_checkpoint('https://a.org/swin.pth')['weight'], torch.zeros(3))
    (folder / 'swin.pth').rename(folder / 'swin-01234567.pth')
    with pytest.raises(OSError, match='its SHA-256 begins with .*, not with the 01234567'):
        read_checkpoint('https://a.org/swin-01234567.pth')
    assert web == []


def test_a_failed_download_names_both_ways_out(web, tmp_path):
    folder = tmp_path / 'hub' / 'checkpoints'
    with pytest.raises(OSError, match=f'put the file at {folder}/a.pth or give its path'):
        read_checkpoint('https://missing.org/a.pth')


def test_every_name_that_mmengine_takes(web, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    torch.save(dict(weight=torch.zeros(3)), tmp_path / 'a.pth')
    for name in ('~/a.pth', f'file://{tmp_path}/a.pth', tmp_path / 'a.pth'):
        assert torch.equal(read_checkpoint(name)['weight'], torch.zeros(3))
    monkeypatch.setattr('mmengine.runner.checkpoint.get_external_models', lambda: {'swin': URL})
    assert torch.equal(read_checkpoint('open-mmlab://swin')['weight'], torch.ones(2))
    with pytest.raises(
        ValueError, match="open-mmlab://nosuch: open-mmlab:// has no model 'nosuch'"
    ):
        read_checkpoint('open-mmlab://nosuch')
    with pytest.raises(OSError, match='MMEngine could not fetch nowhere://a.pth'):
        read_checkpoint('nowhere://a.pth')
