import pytest

from mmtoken.files import replacing


@pytest.mark.parametrize('exists', [False, True])
@pytest.mark.parametrize('is_folder', [False, True])
def test_replaced_as_a_whole_or_not_at_all(exists, is_folder, tmp_path):
    path = tmp_path / 'parent' / 'name'
    file = path / 'file' if is_folder else path

    def write(place, text):
        if is_folder:
            place.mkdir(exist_ok=True)
            place = place / 'file'
        place.write_text(text)

    if exists:
        path.parent.mkdir()
        write(path, 'old')
        if is_folder:
            (path / 'other').touch()
    with pytest.raises(KeyboardInterrupt), replacing(path) as new:
        write(new, 'half')
        raise KeyboardInterrupt
    assert path.exists() == exists
    assert not exists or file.read_text() == 'old'

    with replacing(path) as new:
        write(new, 'new')
        assert path.exists() == exists
    assert file.read_text() == 'new' and not (path / 'other').exists()
    assert list(path.parent.iterdir()) == [path]


def test_nothing_written(tmp_path):
    (tmp_path / 'folder').mkdir()
    for name in ('folder', 'file'):
        with pytest.raises(FileNotFoundError), replacing(tmp_path / name):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ['folder']
