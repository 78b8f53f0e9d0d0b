_base_ = [
    '../_base_/mmtoken.py',
    '../_base_/models/shapes_upernet.py',
    '../_base_/datasets/shapes_semantic.py',
    '../_base_/schedules/shapes_semantic_750i.py',
    'mmseg::_base_/default_runtime.py',
]
