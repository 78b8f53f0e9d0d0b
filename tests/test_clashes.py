"""The table itself; what is done with it is in test_stack.py."""

import pytest
from packaging.specifiers import SpecifierSet

from mmtoken.clashes import CLASHES, MMCV_BELOW


@pytest.mark.parametrize('clash', CLASHES, ids=range(len(CLASHES)))
def test_entries_can_be_shown(clash):
    for versions in filter(None, clash.found.values()):
        SpecifierSet(versions)  # raises for what pip cannot read
    installed = [name for name, versions in clash.found.items() if versions is not None]
    assert installed and clash.why.count('{}') <= len(installed)
    shown = clash.why.format(*(f'{name} 1.0' for name in installed))
    assert shown and '{' not in shown
    for command in clash.command.split('&&'):
        assert 'pip ' in command or '{install_mmcv}' in command


def test_no_release_has_two_limits():
    for release in ('3.1.0', '3.3.0', '1.1.2', '1.2.2', '1.0.0', '1.2.0'):
        for name in ('mmdet', 'mmsegmentation', 'mmpretrain'):
            limits = [b for n, v, b in MMCV_BELOW if n == name and release in SpecifierSet(v)]
            assert len(limits) <= 1
