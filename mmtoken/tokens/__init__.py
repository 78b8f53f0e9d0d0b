"""Token arithmetic in plain torch: tensors in, tensors out, nothing of OpenMMLab."""
