import json
import shutil

import pytest
from mmdet.datasets import CocoDataset
from shapes import CLASS_IDS

# What the miniature COCO calls the classes of the embedded data set.
COCO_NAMES = dict(
    lamp='umbrella', box='suitcase', bottle='bottle', ball='sports ball', fan='scissors',
    plate='frisbee', clock='clock', flag='kite',
)  # fmt: skip
COCO_IDS = [i for i in range(1, 91) if i not in {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}]


@pytest.fixture(scope='session')
def workspace(shapes_root, tmp_path_factory):
    """A folder with ``data/shapes``, ``data/coco`` and ``data/ade``, as the configs expect them."""
    root = tmp_path_factory.mktemp('workspace')
    shutil.copytree(shapes_root, root / 'data' / 'shapes')
    shutil.copytree(shapes_root / 'ade', root / 'data' / 'ade')  # its ids are ADE20K's already
    shutil.copytree(shapes_root / 'coco', root / 'data' / 'coco')
    names = CocoDataset.METAINFO['classes']
    id_of = dict(zip(names, COCO_IDS, strict=True))
    new_id = {CLASS_IDS[ours]: id_of[theirs] for ours, theirs in COCO_NAMES.items()}
    for path in (root / 'data' / 'coco' / 'annotations').glob('*.json'):
        content = json.loads(path.read_text())
        content['categories'] = [dict(id=id_of[name], name=name) for name in names]
        for annotation in content['annotations']:
            annotation['category_id'] = new_id[annotation['category_id']]
        path.write_text(json.dumps(content))
    return root
