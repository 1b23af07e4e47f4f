"""Settings of all pairs on ADE20K: 40,000 iterations, and the import of boundary IoU."""

custom_imports = dict(imports=['mmdenoiserep.evaluation.boundary_iou'], allow_failed_imports=False)
max_iters = 40000
