"""BNNeck head and batch-hard triplet loss for re-identification."""

from typing import Any

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from mmpretrain.models import ClsHead
from mmpretrain.structures import DataSample
from torch import Tensor, nn

from ..core import InputError

FEATURES = ('before', 'after')


@MODELS.register_module()
class BNNeckReIDHead(ClsHead):
    """BNNeck (Luo et al., CVPRW 2019, arXiv 1903.07071): triplet loss before a BatchNorm, identity loss behind it.

        ``L = L_id(W BN(f)) + triplet_weight * L_triplet(f)``

    The BatchNorm has no trainable bias, and the classifier W has none.

    Args:
        num_classes: Number of identities in the training set.
        in_channels: C, the number of channels of the feature f.
        margin: Margin of the triplet loss; None is the soft margin, see :func:`batch_hard_triplet_loss`.
        triplet_weight: Weight of the triplet loss.
        test_feature: Feature to match images by: f ``'before'`` the BatchNorm, or BN(f) ``'after'`` it.
        loss: Config of the identity loss; None is cross-entropy.
        init_cfg: Initialisation; None draws the classifier with a standard deviation of 0.001.

    Raises:
        InputError: ``test_feature`` is unknown, or the margin is negative.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        margin: float | None = None,
        triplet_weight: float = 1.0,
        test_feature: str = 'before',
        loss: dict[str, Any] | None = None,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        if test_feature not in FEATURES:
            raise InputError(
                f'test_feature of BNNeckReIDHead must be one of {", ".join(FEATURES)}, got {test_feature!r}'
            )
        if margin is not None and margin < 0:
            raise InputError(f'margin of BNNeckReIDHead must not be negative (None is the soft one), got {margin}')
        super().__init__(
            loss=loss or dict(type='CrossEntropyLoss'),
            init_cfg=init_cfg or dict(type='Normal', layer='Linear', std=0.001),
        )
        self.num_classes = num_classes
        self.margin = margin
        self.triplet_weight = triplet_weight
        self.test_feature = test_feature
        self.bnneck = nn.BatchNorm1d(in_channels)
        self.bnneck.bias.requires_grad_(False)
        self.classifier = nn.Linear(in_channels, num_classes, bias=False)

    def forward(self, feats: tuple[Tensor, ...]) -> Tensor:
        """Returns the test feature, (B, C), not normalised.

        Args:
            feats: Outputs of backbone and neck; the last one is f, (B, C).
        """
        feature = self.pre_logits(feats)
        return feature if self.test_feature == 'before' else self.bnneck(feature)

    def loss(self, feats: tuple[Tensor, ...], data_samples: list[DataSample], **kwargs: Any) -> dict[str, Tensor]:
        """Returns ``loss_id`` and ``loss_triplet``, scalars.

        Args:
            feats: See :meth:`forward`.
            data_samples: One for each image, with ``gt_label``, the class of its identity.
            **kwargs: Arguments of the identity loss.
        """
        feature = self.pre_logits(feats)
        identities = torch.cat([sample.gt_label for sample in data_samples])
        scores = self.classifier(self.bnneck(feature))
        return dict(
            loss_id=self.loss_module(scores, identities, avg_factor=len(identities), **kwargs),
            loss_triplet=self.triplet_weight * batch_hard_triplet_loss(feature, identities, self.margin),
        )

    def predict(
        self, feats: tuple[Tensor, ...], data_samples: list[DataSample | None] | None = None
    ) -> list[DataSample]:
        """Returns the data samples with the test feature of the image, ``pred_feature``, (C,)."""
        features = self(feats)
        samples = data_samples or [None] * len(features)
        predictions = []
        for sample, feature in zip(samples, features, strict=True):
            sample = DataSample() if sample is None else sample
            sample.set_field(feature.clone(), 'pred_feature', dtype=Tensor)  # a view would keep all tokens in memory
            predictions.append(sample)
        return predictions


def batch_hard_triplet_loss(features: Tensor, identities: Tensor, margin: float | None = None) -> Tensor:
    """Returns the triplet loss of the hardest pairs in a batch (Hermans et al. 2017, arXiv 1703.07737).

    With the Euclidean distances of an anchor to its farthest positive ``d_ap`` and its nearest negative ``d_an``,

        soft margin:  ``log(1 + exp(d_ap - d_an))``
        hinge:        ``max(0, d_ap - d_an + margin)``

    averaged over all images as anchors. The loss of an anchor without a negative in the batch is 0. Computed in float32
    or more, outside autocast.

    Args:
        features: Features, (B, C), not normalised.
        identities: Identities, (B,), integers.
        margin: Margin of the hinge; None is the soft margin.
    """
    with torch.autocast(features.device.type, enabled=False):
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        distances = torch.cdist(features, features, compute_mode='donot_use_mm_for_euclid_dist')
        same = identities[:, None] == identities
        farthest = distances.masked_fill(~same, -torch.inf).amax(1)
        nearest = distances.masked_fill(same, torch.inf).amin(1)
        excess = farthest - nearest
        losses = F.softplus(excess) if margin is None else F.relu(excess + margin)
        return losses.mean()
