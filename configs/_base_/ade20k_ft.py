"""What the pairs on ADE20K share and no config of mmseg sets: 40,000 iterations, and the import of boundary IoU."""

custom_imports = dict(imports=['mmdenoiserep.evaluation.boundary_iou'], allow_failed_imports=False)
max_iters = 40000
