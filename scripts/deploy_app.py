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
"""
The bundle as an application of MONAI Deploy: a DICOM series in, a DICOM segmentation (SEG) out. Needs
monai-deploy-app-sdk, pydicom and highdicom.

Usage::

    python -m scripts.deploy_app --input path/to/series --output path/to/folder
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from monai.bundle import ConfigParser

try:
    import monai.deploy  # noqa: F401
except ImportError as error:
    raise ImportError("MONAI Deploy App SDK is missing: it wants an environment of its own, docs/deploy.md.") from error

from monai.deploy.conditions import CountCondition
from monai.deploy.core import AppContext, Application, Image, IOType, init_app_context
from monai.deploy.operators import (
    DICOMDataLoaderOperator,
    DICOMSegmentationWriterOperator,
    DICOMSeriesSelectorOperator,
    DICOMSeriesToVolumeOperator,
    IOMapping,
    ModelInfo,
    MonaiBundleInferenceOperator,
)
from monai.deploy.operators.dicom_seg_writer_operator import SegmentDescription
from pydicom.sr.codedict import codes

from scripts.clear_errors import install
from scripts.dicom import add_empty, read_series, series_folders

__all__ = ["SegmentationApp", "main", "one_series"]

_ROOT = Path(__file__).resolve().parents[1]


class SegmentationApp(Application):
    """
    Reads a series, segments it as ``configs/inference.json`` says, and writes ``<its UID>.dcm``, a segment for each
    class.

    Args:
        context: of the SDK, with the folder of the output; its models are not used.
        series: folder of the series, as :py:func:`one_series` gives it.
        bundle: folder that holds ``configs`` and ``models``, the working directory of the process.

    Raises:
        FileNotFoundError: When the bundle has no weights.
        ValueError: When its network takes images of several channels, of which a series has one, its checkpoint is not
            models/model.pt, or the weights are another network's.
    """

    def __init__(self, context: AppContext, series: Path, bundle: Path) -> None:
        super().__init__()
        context.models = None  # so that the operator loads the bundle's weights itself
        self.app_context, self.series, self.bundle = context, series, bundle
        parser = ConfigParser(ConfigParser.load_config_file(bundle / "configs" / "inference.json"))
        if parser.get_parsed_content("in_channels") != 1:
            raise ValueError(f"{bundle}: its network takes images of several channels, a DICOM series has one.")
        checkpoint = Path(parser.get_parsed_content("checkpoint"))
        if checkpoint.absolute() != bundle / "models" / "model.pt":
            raise ValueError(f"{bundle}: its checkpoint is {checkpoint}, but MONAI Deploy takes models/model.pt.")
        parser.get_parsed_content("weights_check")
        self.labels: list[str] = parser.get_parsed_content("label_names")[1:]
        self.version = json.loads((bundle / "configs" / "metadata.json").read_text(encoding="utf-8"))["version"]

    def compose(self) -> None:
        """Called by the SDK: the operators, and what each hands to the next."""
        loader = DICOMDataLoaderOperator(self, CountCondition(self, 1), name="loader", input_folder=self.series)
        selector = DICOMSeriesSelectorOperator(self, name="selector")
        volume = DICOMSeriesToVolumeOperator(self, name="volume")
        network = MonaiBundleInferenceOperator(
            self,
            name="network",
            app_context=self.app_context,
            input_mapping=[IOMapping("image", Image, IOType.IN_MEMORY)],
            output_mapping=[IOMapping("pred", Image, IOType.IN_MEMORY)],
            bundle_path=self.bundle,
        )
        writer = _Writer(
            self,
            name="writer",
            segment_descriptions=[
                SegmentDescription(
                    segment_label=label or f"class {value}",
                    segmented_property_category=codes.SCT.Tissue,
                    segmented_property_type=codes.SCT.Tissue,
                    algorithm_name="SegResMamba",
                    algorithm_version=self.version,
                )
                for value, label in enumerate(self.labels, 1)
            ],
            output_folder=Path(self.app_context.output_path),
            model_info=ModelInfo("SegResMamba bundle contributors", "SegResMamba", self.version),
            custom_tags={
                "SeriesDescription": "SegResMamba segmentation",
                "ContentDescription": "Automatic segmentation, research only",
            },
        )
        self.add_flow(loader, selector, {("dicom_study_list", "dicom_study_list")})
        self.add_flow(selector, volume, {("study_selected_series_list", "study_selected_series_list")})
        self.add_flow(selector, writer, {("study_selected_series_list", "study_selected_series_list")})
        self.add_flow(volume, network, {("image", "image")})
        self.add_flow(network, writer, {("pred", "seg_image")})


class _Writer(DICOMSegmentationWriterOperator):
    """Takes slices that lack what DICOM lets be empty, as the bundle's own DICOM segmentations do."""

    def create_dicom_seg(self, image: np.ndarray, dicom_series: Any, output_dir: Path) -> None:
        for instance in dicom_series.get_sop_instances():
            add_empty(instance.get_native_sop_instance())
        super().create_dicom_seg(image, dicom_series, output_dir)


def one_series(folder: str | os.PathLike) -> Path:
    """
    Args:
        folder: of a DICOM series, or that holds one at any depth.

    Returns:
        the series' own folder.

    Raises:
        FileNotFoundError: When the folder does not exist, or holds no series.
        ValueError: When it holds several, or one that cannot be read as one volume, or not rightly by the SDK.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"There is no folder {folder}: give --input the folder of a DICOM series.")
    found = series_folders(folder)
    if not found:
        raise FileNotFoundError(f"{folder} holds no DICOM series (files with their preamble).")
    if len(found) > 1:
        raise ValueError(f"{folder} holds {len(found)} DICOM series: give --input the folder of one.")
    rows, columns = map(float, read_series(found[0], stop_before_pixels=True)[0].PixelSpacing)
    if abs(rows - columns) > 1e-4:
        raise ValueError(f"{found[0]}: its pixels are not square, and MONAI Deploy would exchange their sides.")
    return found[0]


def main() -> None:
    """
    Run the application. Command line and environment variables are those of all applications of MONAI Deploy;
    ``--model`` (``HOLOSCAN_MODEL_PATH``) names another bundle than the one that this file is in.

    Raises:
        FileNotFoundError: When there is no series, no bundle, or the bundle has no weights.
        ValueError: When series or bundle cannot be used, as the message says.
    """
    install()
    context = init_app_context(sys.argv)
    series = one_series(context.input_path).absolute()
    bundle = Path(context.args.get("model") or os.environ.get("HOLOSCAN_MODEL_PATH") or _ROOT).absolute()
    if not (bundle / "configs" / "inference.json").is_file():
        raise FileNotFoundError(f"{bundle} is no bundle: it has no configs/inference.json.")
    context.output_path = os.path.abspath(context.output_path)
    os.chdir(bundle)  # which the config's paths start from
    SegmentationApp(context, series, bundle).run()


if __name__ == "__main__":
    main()
