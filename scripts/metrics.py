# Copyright (c) 2026 SegResMamba bundle contributors
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Metrics of a case in physical units, with a value for each case: empty references and predictions are defined."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from monai.handlers import IgniteMetricHandler
from monai.metrics import CumulativeIterationMetric, HausdorffDistanceMetric, SurfaceDiceMetric, do_metric_reduction
from monai.metrics.utils import ignore_background
from monai.utils import MetricReduction, ensure_tuple_rep

__all__ = ["HausdorffDistance", "MetricInMM", "SurfaceDice", "VolumeError"]


class MetricInMM(IgniteMetricHandler):
    """
    MONAI's ``IgniteMetricHandler`` that tells the metric the voxel size of each case, read from the affine of its
    reference. Takes the same arguments.
    """

    def update(self, output: Sequence[Any]) -> None:
        """
        Args:
            output: lists of one-hot predictions and references, each (C, D, H, W); the references are ``MetaTensor``.
        """
        for prediction, reference in zip(*output):
            self.metric_fn([prediction], [reference], spacing=reference.pixdim.tolist())
        self._is_reduced = False


class HausdorffDistance(HausdorffDistanceMetric):
    """
    MONAI's ``HausdorffDistanceMetric`` with a finite value for each case: 0 mm where both label maps are empty,
    and the diagonal of the volume where one of them is, as the BraTS challenges have it. Takes the same arguments.
    """

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        distances = super()._compute_tensor(y_pred, y, **kwargs)
        spacing = ensure_tuple_rep(kwargs.get("spacing") or 1.0, y.ndim - 2)
        diagonal = math.hypot(*(size * step for size, step in zip(y.shape[2:], spacing)))
        return _where_empty(distances, y_pred, y, self.include_background, both=0.0, one=diagonal)


class SurfaceDice(SurfaceDiceMetric):
    """
    MONAI's ``SurfaceDiceMetric`` with one tolerance for all classes, or one for each: 1 where reference and prediction
    are both empty, and 0 where one of them is.

    Args:
        tolerance: distance in mm up to which surfaces agree.
        include_background: whether the first channel is a class to measure.
        kwargs: other arguments of MONAI's class.
    """

    def __init__(self, tolerance: float | Sequence[float], include_background: bool = False, **kwargs: Any) -> None:
        super().__init__(class_thresholds=[], include_background=include_background, **kwargs)
        self.tolerance = tolerance

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.class_thresholds = list(ensure_tuple_rep(self.tolerance, y.shape[1] - (not self.include_background)))
        values = super()._compute_tensor(y_pred, y, **kwargs)
        return _where_empty(values, y_pred, y, self.include_background, both=1.0, one=0.0)


class VolumeError(CumulativeIterationMetric):
    """
    Volume of the prediction less that of the reference, in millilitres: above 0 where too much was segmented.

    Args:
        include_background: whether the first channel is a class to measure.
        reduction: as of MONAI's metrics.
    """

    def __init__(
        self, include_background: bool = False, reduction: MetricReduction | str = MetricReduction.MEAN
    ) -> None:
        super().__init__()
        self.include_background = include_background
        self.reduction = reduction

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        voxel = math.prod(ensure_tuple_rep(kwargs.get("spacing") or 1.0, y.ndim - 2))
        predicted, reference = _voxels(y_pred, y, self.include_background)
        return (predicted - reference) * voxel / 1000

    def aggregate(self, reduction: MetricReduction | str | None = None) -> torch.Tensor:
        """
        Args:
            reduction: in place of the one given at the start.

        Returns:
            the reduced values, in millilitres.
        """
        return do_metric_reduction(self.get_buffer(), reduction or self.reduction)[0]


def _voxels(y_pred: torch.Tensor, y: torch.Tensor, include_background: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Number of voxels of each case and class, (B, C), predicted and of the reference."""
    if not include_background:
        y_pred, y = ignore_background(y_pred, y)
    return y_pred.flatten(2).sum(2, dtype=torch.float64), y.flatten(2).sum(2, dtype=torch.float64)


def _where_empty(
    values: torch.Tensor, y_pred: torch.Tensor, y: torch.Tensor, include_background: bool, both: float, one: float
) -> torch.Tensor:
    """The values, with others where prediction and reference of a class are both empty, and where one of them is."""
    predicted, reference = (count == 0 for count in _voxels(y_pred, y, include_background))
    values = values.masked_fill(predicted ^ reference, one)
    return values.masked_fill(predicted & reference, both)
