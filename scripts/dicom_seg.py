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

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.utils import optional_import

from scripts.dicom import add_empty, read_series
from scripts.output import case_name, whole_file

__all__ = ["DicomSegmentations", "dicom_segmentation"]

_LONGEST_NAME = 64  # of DICOM's value representation LO


class DicomSegmentations:
    """
    Handler of an inference that writes a DICOM segmentation (SEG) beside the label map of each case that came as the
    folder of a DICOM series; needs highdicom. Other cases are let pass.

    It takes the label maps as the engine's postprocessing leaves them, on the series' own grid.

    Args:
        output_dir: folder to write ``<folder of the series>_seg.dcm`` to.
        class_names: names by label value, background first; values without a name are left out.
        metadata: the bundle's metadata.json, for the algorithm's version.
        pred_key: key of the label map in the engine's output.
    """

    def __init__(
        self, output_dir: str, class_names: Sequence[str], metadata: str | os.PathLike, pred_key: str = "pred"
    ) -> None:
        self.output_dir = Path(output_dir)
        self.class_names = list(class_names)
        self.metadata = metadata
        self.pred_key = pred_key
        self.logger = logging.getLogger(__name__)

    def attach(self, engine: Engine) -> None:
        """
        Args:
            engine: the evaluator.
        """
        self.logger = engine.logger
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """
        Args:
            engine: the evaluator.
        """
        for output in engine.state.output:
            series = Path(str(output[self.pred_key].meta["filename_or_obj"]))
            if not series.is_dir():
                continue
            if not optional_import("highdicom")[1]:
                self.logger.warning(f"No DICOM SEG of {series.name}: pip install highdicom to get one.")
                continue
            version = json.loads(Path(self.metadata).read_text(encoding="utf-8"))["version"]
            try:
                segmentation = dicom_segmentation(output[self.pred_key], series, self.class_names, version)
            except (AttributeError, TypeError, ValueError) as error:  # the series lacks what DICOM asks of it
                self.logger.warning(f"No DICOM SEG of {series.name}: {error}")
                continue
            with whole_file(self.output_dir / f"{case_name(series)}_seg.dcm") as unfinished:
                segmentation.save_as(unfinished)


def dicom_segmentation(label: MetaTensor, series: str | os.PathLike, class_names: Sequence[str], version: str) -> Any:
    """
    Args:
        label: label map (1, I, J, K) on the grid of the series as ``monai.transforms.LoadImage`` reads it, columns
            first.
        series: folder with one file for each slice.
        class_names: names by label value, background first; values without a name are left out.
        version: of the bundle.

    Returns:
        a ``highdicom.seg.Segmentation``: a segment for each named class, coded as tissue, since class names carry no
        codes; its frames refer to the slices that they lie on.

    Raises:
        ValueError: When the label map is not on the grid of the series, no class has a name, or one a name that is too
            long for DICOM.
    """
    highdicom, _ = optional_import("highdicom")
    codes, _ = optional_import("pydicom.sr.codedict", name="codes")
    names = {value: name for value, name in enumerate(class_names) if value and name}
    if not names:
        raise ValueError("no class has a name: a DICOM segmentation would be empty.")
    long = next((name for name in names.values() if len(name) > _LONGEST_NAME), None)
    if long is not None:
        raise ValueError(f"the class name {long!r} is longer than the {_LONGEST_NAME} characters that DICOM takes.")
    slices = read_series(series)
    for header in slices:
        add_empty(header)
    planes = np.asarray(label)[0].transpose(2, 1, 0)
    if planes.shape != (len(slices), slices[0].Rows, slices[0].Columns):
        raise ValueError(f"the label map's slices, {planes.shape}, are not those of {series}.")
    kind = np.uint8 if len(names) < 256 else np.uint16
    numbers = np.zeros(max(len(class_names), int(planes.max()) + 1), kind)  # segments are numbered without a gap
    numbers[list(names)] = np.arange(1, len(names) + 1)
    algorithm = highdicom.AlgorithmIdentificationSequence(
        name="SegResMamba", version=version, family=codes.DCM.ArtificialIntelligence
    )
    segmentation = highdicom.seg.Segmentation(
        source_images=slices,
        pixel_array=numbers[planes.astype(np.intp)],
        segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[
            highdicom.seg.SegmentDescription(
                segment_number=number,
                segment_label=name,
                segmented_property_category=codes.SCT.Tissue,
                segmented_property_type=codes.SCT.Tissue,
                algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
                algorithm_identification=algorithm,
            )
            for number, name in enumerate(names.values(), 1)
        ],
        series_instance_uid=highdicom.UID(),
        series_number=int(slices[0].get("SeriesNumber") or 0) + 1000,
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer="SegResMamba bundle contributors",
        manufacturer_model_name="SegResMamba",
        software_versions=version,
        device_serial_number="0",
        series_description="SegResMamba segmentation",
        content_description="Automatic segmentation, research only",
    )
    segmentation.decode()  # by the series' character set, which cannot hold every name
    segmentation.SpecificCharacterSet = "ISO_IR 192"  # UTF-8
    return segmentation
