import torch

from mmtoken.runtime.reference import is_compiling, on_reference_path, reference_path


def test_it_nests_and_ends():
    assert not on_reference_path()
    with reference_path():
        with reference_path():
            assert on_reference_path()
        assert on_reference_path()
    assert not on_reference_path()


def test_traces_record_the_reference():
    traced = torch.jit.trace(lambda x: x + float(on_reference_path()), torch.zeros(1))
    assert traced(torch.zeros(1)) == 1 and not on_reference_path()


def test_compiled_graphs_take_the_ordinary_path():
    def function(x):
        # Neither returns x itself: torch 2.1 does not compile what has no operation
        return x + 1 if on_reference_path() or not is_compiling() else x + 2

    compiled = torch.compile(function, backend='eager', fullgraph=True)
    with reference_path():
        assert compiled(torch.zeros(1)) == 2
    assert not is_compiling()
