"""Control of *_denoiserep.py: the released SegFormer MiT-B1, trained on without denoising, as MiT-B0 is.

The released checkpoint has mIoU 40.97 (mmseg's metafile).
"""

_base_ = './segformer_mit-b0_8xb2-160k_ade20k-512x512_baseline-ft.py'

load_from = (
    'https://download.openmmlab.com/mmsegmentation/v0.5/segformer/segformer_mit-b1_512x512_160k_ade20k/'
    'segformer_mit-b1_512x512_160k_ade20k_20210726_112106-d70e859d.pth'
)
# mmseg loads ImageNet weights into the backbone; load_from replaces them.
checkpoint = 'https://download.openmmlab.com/mmsegmentation/v0.5/pretrain/segformer/mit_b1_20220624-02e5a6a1.pth'
model = dict(backbone=dict(embed_dims=64), decode_head=dict(in_channels=[64, 128, 320, 512]))
