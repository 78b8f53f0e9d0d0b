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
    with pytest.raises(OSError, match='by the process that should have'):
        read_checkpoint(URL)
    assert web == []


def test_damaged_download(web, monkeypatch):
    read_checkpoint(URL)
    cached_path(URL).write_bytes(cached_path(URL).read_bytes()[:100])
    with pytest.raises(ValueError, match=r'model%20a.*damaged.*delete .*model a\.pth'):
        read_checkpoint(URL)
