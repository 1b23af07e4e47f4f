"""The head of re-identification: a BatchNorm between the feature that is compared and the one that is classified."""

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
    """BNNeck (Luo et al., CVPRW 2019, arXiv 1903.07071): identity loss behind a BatchNorm, triplet loss before it.

        ``L = L_id(W BN(f)) + triplet_weight * L_triplet(f)``

    The shift of the BatchNorm stays 0 and the classifier W has no bias. Distances need no such neck: images are matched
    by f, or by BN(f).

    Args:
        num_classes: Identities in the training set.
        in_channels: C, the channels of f.
        margin: Of the triplet loss; None is the soft margin, see :func:`batch_hard_triplet_loss`.
        triplet_weight: Weight of the triplet loss beside the identity loss.
        test_feature: ``'before'`` or ``'after'`` the neck: what is compared at test time.
        loss: Config of the identity loss; None is cross-entropy.
        init_cfg: Initialisation; None draws the classifier with a standard deviation of 0.001.

    Raises:
        InputError: An unknown ``test_feature`` or a negative margin.
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
        """Returns what is compared at test time, (B, C), not normalised.

        Args:
            feats: What backbone and neck return; the last entry is f, (B, C).
        """
        feature = self.pre_logits(feats)
        return feature if self.test_feature == 'before' else self.bnneck(feature)

    def loss(self, feats: tuple[Tensor, ...], data_samples: list[DataSample], **kwargs: Any) -> dict[str, Tensor]:
        """Returns ``loss_id`` and ``loss_triplet``, scalars.

        Args:
            feats: As in :meth:`forward`.
            data_samples: One an image, with ``gt_label``, the number of its identity.
            **kwargs: Handed to the identity loss.
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
        """Returns the data samples with ``pred_feature``, (C,) each: :meth:`forward` of the image."""
        features = self(feats)
        samples = data_samples or [None] * len(features)
        predictions = []
        for sample, feature in zip(samples, features, strict=True):
            sample = DataSample() if sample is None else sample
            sample.set_field(feature, 'pred_feature', dtype=Tensor)
            predictions.append(sample)
        return predictions


def batch_hard_triplet_loss(features: Tensor, identities: Tensor, margin: float | None = None) -> Tensor:
    """Returns the triplet loss of the hardest pairs in a batch (Hermans et al. 2017, arXiv 1703.07737).

    With the Euclidean distances of an anchor to its farthest positive ``d_ap`` and its nearest negative ``d_an``,

        soft margin:  ``log(1 + exp(d_ap - d_an))``
        hinge:        ``max(0, d_ap - d_an + margin)``

    averaged over all images as anchors. Computed in float32 at least, outside autocast. An anchor that has no negative
    in the batch adds nothing.

    Args:
        features: (B, C), not normalised.
        identities: (B,), integers.
        margin: None is the soft margin.
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
