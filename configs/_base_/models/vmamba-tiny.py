"""VMamba-T as a classifier; ``import mmdenoiserep`` registers the backbone."""

custom_imports = dict(imports=['mmdenoiserep'], allow_failed_imports=False)
model = dict(
    type='ImageClassifier',
    backbone=dict(type='VMamba', arch='tiny', drop_path_rate=0.2),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        in_channels=768,
        init_cfg=dict(type='TruncNormal', layer='Linear', std=0.02),
        loss=dict(type='CrossEntropyLoss'),
    ),
)
