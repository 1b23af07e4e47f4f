"""Articles of Fashion-MNIST as identities, in Market-1501's layout; studies/make_reid.py writes the files."""

meta_keys = ('sample_idx', 'img_path', 'pid', 'camid', 'is_query')
data_preprocessor = dict(mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5], to_rgb=True)

train_dataloader = dict(
    batch_size=64,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(type='PKSampler', num_ids=16, num_instances=4),
    dataset=dict(
        type='Market1501',
        data_root='work_dirs/fashion-reid',
        split='train',
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='RandomFlip', prob=0.5, direction='horizontal'),
            dict(type='RandomCrop', crop_size=(64, 48), padding=4),
            dict(type='PackInputs'),
        ],
    ),
)
val_dataloader = dict(
    batch_size=256,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='Market1501',
        data_root='work_dirs/fashion-reid',
        split='test',
        pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs', meta_keys=meta_keys)],
    ),
)
test_dataloader = val_dataloader

val_evaluator = dict(type='ReIDMetric')
test_evaluator = val_evaluator
