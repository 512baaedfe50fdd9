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

"""One seeded synthetic CT-like volume: its scene, the grid that it is sampled on, and its noise.

All shapes are described in patient space (RAS, millimetres) and only then sampled on a voxel grid, so one seed shows
the same scene whichever orientation, obliqueness, spacing or matrix the grid has.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["GEOMETRIES", "PHANTOM_CLASSES", "RECIPE_VERSION", "make_phantom"]

PHANTOM_CLASSES: tuple[str, ...] = (
    "background",
    "liver-like",
    "spleen-like",
    "kidney-like",
    "vessel-like",
    "pancreas-like",
    "gallbladder-like",
)
"""Names by label value. Every shape is always drawn; the values from ``num_classes`` on are left unlabelled."""

RECIPE_VERSION = 1
"""Raised with any change that alters an array, so that older folders are told apart."""

GEOMETRIES = (
    ("RAS", False, False),
    ("LPS", False, True),
    ("LAS", True, False),
    ("PIR", False, True),
    ("LPS", True, True),
)
"""(Axis codes, oblique, anisotropic) of the cases in turn, so that a few cases already hold every kind."""

_SIZE_RANGE = (56, 80)  # voxels per axis of a drawn grid
_MAX_TILT = 20.0  # degrees, of an oblique grid
_OPPOSITE = {"L": "R", "P": "A", "I": "S"}
_HU_RANGE = (-1024, 1500)


def make_phantom(
    seed: int | Sequence[int],
    num_classes: int = 5,
    *,
    orientation: str | None = None,
    oblique: bool | None = None,
    anisotropic: bool | None = None,
    spatial_size: Sequence[int] | None = None,
    spacing: Sequence[float] | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Make one synthetic CT-like volume with its label map.

    A fat-lined body with an elliptic cross-section holds smoothly deformed organs. The liver-like and spleen-like
    organs share one range of intensities, the kidney-like and vessel-like ones another, and unlabelled shapes (a spine,
    bowel loops, and the classes from ``num_classes`` on) fall into the same ranges: place, size and shape tell them
    apart, a threshold does not. Edges are blended over about one voxel, and the noise is correlated.

    The scene, the grid and the noise draw from separate random streams: arguments that alter the grid leave the scene
    as it is.

    Args:
        seed: a number, or several, each in 0 to 2**32 - 1. The same seed gives the same arrays.
        num_classes: number of label values, background included, from 2 to 7 (see ``PHANTOM_CLASSES``).
        orientation: axis codes of the voxel axes, such as "RAS", "LPS" or "PIR". Drawn when None.
        oblique: whether the grid is tilted against the patient's axes, by 8 to 20 degrees. Drawn when None.
        anisotropic: whether the slices are thicker than the pixels are wide. Drawn when None. Ignored with ``spacing``.
        spatial_size: number of voxels along each voxel axis. Drawn from 56 to 80 when None.
        spacing: voxel size in mm along each voxel axis. Drawn when None.

    Returns:
        The image in Hounsfield-like units, int16 of shape ``spatial_size``; the label map, uint8 of the same shape; and
        the affine from voxel indices to patient space (RAS, mm), float64 of shape (4, 4).

    Raises:
        ValueError: When ``num_classes``, ``seed``, ``orientation``, ``spatial_size`` or ``spacing`` is out of range.
    """
    if not 2 <= num_classes <= len(PHANTOM_CLASSES):
        raise ValueError(
            f"num_classes must be from 2 to {len(PHANTOM_CLASSES)}, background included, got {num_classes}."
        )
    scene_rng, grid_rng, noise_rng = _random_streams(seed)
    spatial_size, voxel_mm, affine = _draw_grid(grid_rng, orientation, oblique, anisotropic, spatial_size, spacing)
    image, label = _draw_scene(
        scene_rng, _patient_coordinates(spatial_size, affine), float(voxel_mm.mean()), num_classes
    )
    image += _correlated_noise(noise_rng, spatial_size, std=noise_rng.uniform(10.0, 16.0))
    return np.rint(image.clip(*_HU_RANGE)).astype(np.int16), label, affine


def _random_streams(seed: int | Sequence[int]) -> list[np.random.RandomState]:
    """Three independent streams, for the scene, the grid and the noise.

    ``RandomState``, because NumPy promises that its numbers stay the same from version to version.
    """
    parts = [seed] if isinstance(seed, (int, np.integer)) else list(seed)
    if not parts or any(isinstance(p, bool) or not 0 <= int(p) < 2**32 or int(p) != p for p in parts):
        raise ValueError(f"seed must be whole numbers from 0 to 2**32 - 1, got {seed!r}.")
    return [np.random.RandomState([len(parts), *(int(p) for p in parts), stream]) for stream in range(3)]


def _draw_grid(
    rng: np.random.RandomState,
    orientation: str | None,
    oblique: bool | None,
    anisotropic: bool | None,
    spatial_size: Sequence[int] | None,
    spacing: Sequence[float] | None,
) -> tuple[tuple[int, int, int], np.ndarray, np.ndarray]:
    """Draw the voxel grid; every number is drawn whether needed or not, so a given argument shifts no other draw.

    Returns:
        The number of voxels per voxel axis, the voxel size in mm per voxel axis, and the affine to RAS mm.
    """
    drawn_geometry = GEOMETRIES[rng.randint(len(GEOMETRIES))]
    in_plane, thickness = rng.uniform(1.9, 2.4), rng.uniform(2.7, 3.1)
    field_of_view = rng.uniform((140.0, 124.0, 156.0), (156.0, 140.0, 176.0))  # mm along patient x, y and z
    centre = rng.uniform(-4.0, 4.0, size=3)
    axis, degrees = rng.normal(size=3), rng.uniform(8.0, _MAX_TILT)

    orientation = drawn_geometry[0] if orientation is None else str(orientation).upper()
    oblique = drawn_geometry[1] if oblique is None else oblique
    anisotropic = drawn_geometry[2] if anisotropic is None else anisotropic
    if sorted(_OPPOSITE.get(code, code) for code in orientation) != ["A", "R", "S"]:
        raise ValueError(f"orientation must name each patient axis once, such as 'RAS' or 'LPS', got {orientation!r}.")
    patient_axis = ["RAS".index(_OPPOSITE.get(code, code)) for code in orientation]  # of each voxel axis

    if spacing is None:
        drawn_spacing = np.array([in_plane, in_plane, thickness if anisotropic else in_plane])
        voxel_mm = drawn_spacing[patient_axis]
    else:
        voxel_mm = np.asarray(spacing, dtype=np.float64)
        if voxel_mm.shape != (3,) or not (voxel_mm > 0).all():
            raise ValueError(f"spacing must be three positive numbers in mm, got {spacing!r}.")
    if spatial_size is None:
        size = np.rint(field_of_view[patient_axis] / voxel_mm).astype(int).clip(*_SIZE_RANGE)
    else:
        size = np.asarray(spatial_size)
        if size.shape != (3,) or not np.issubdtype(size.dtype, np.integer) or size.min() < 1:
            raise ValueError(f"spatial_size must be three positive whole numbers, got {spatial_size!r}.")

    direction = np.zeros((3, 3))
    for voxel_axis, code in enumerate(orientation):
        direction[patient_axis[voxel_axis], voxel_axis] = -1.0 if code in _OPPOSITE else 1.0
    if oblique:
        direction = _rotation(axis, degrees) @ direction
    affine = np.eye(4)
    affine[:3, :3] = direction * voxel_mm
    affine[:3, 3] = centre - affine[:3, :3] @ ((size - 1) / 2)
    return (int(size[0]), int(size[1]), int(size[2])), voxel_mm, affine


def _patient_coordinates(spatial_size: Sequence[int], affine: np.ndarray) -> np.ndarray:
    """Return patient coordinates (RAS, mm) of every voxel centre, float32 of shape (3, *spatial_size)."""
    axes = np.meshgrid(*(np.arange(n, dtype=np.float32) for n in spatial_size), indexing="ij", sparse=True)
    matrix = affine.astype(np.float32)
    return np.stack([sum(matrix[row, k] * axes[k] for k in range(3)) + matrix[row, 3] for row in range(3)])


def _draw_scene(
    rng: np.random.RandomState, points: np.ndarray, edge_mm: float, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Paint the scene without noise.

    Args:
        rng: the stream to draw from; the number of draws does not depend on the other arguments.
        points: patient coordinates in mm, shape (3, *spatial_size).
        edge_mm: width over which two tissues are blended.
        num_classes: shapes of this class and above are painted, yet not labelled.

    Returns:
        The image in Hounsfield-like units, float32, and the label map, uint8, both of shape ``spatial_size``.
    """
    points = points / np.float32(rng.uniform(0.93, 1.07)) + _deformation(rng, points)
    image = np.full(points.shape[1:], -1000.0, dtype=np.float32)
    label = np.zeros(points.shape[1:], dtype=np.uint8)

    def paint(distance: np.ndarray, hounsfield: float, value: int = 0) -> None:
        """Blend a shape in, from its signed distance in mm (positive inside)."""
        share = np.clip(0.5 + distance / edge_mm, 0.0, 1.0)
        image[...] += share * (np.float32(hounsfield) - image)
        label[distance > 0] = value if value < num_classes else 0

    def ellipsoid(
        centre: Sequence[float], radii: Sequence[float], shift: float = 3.0, tilt: float = 15.0
    ) -> np.ndarray:
        """Signed distance to an ellipsoid whose place, size and tilt vary about the ones given."""
        middle = np.asarray(centre) + rng.uniform(-shift, shift, size=3)
        semiaxes = np.asarray(radii) * rng.uniform(0.88, 1.12) * rng.uniform(0.95, 1.05, size=3)
        turn = _rotation(rng.normal(size=3), rng.uniform(0.0, tilt))
        return _ellipsoid_distance(points, middle, semiaxes, turn)

    def tube(centre: Sequence[float], radii: Sequence[float], length: tuple[float, float]) -> np.ndarray:
        """Signed distance to an elliptic tube along the patient's long axis that winds a little."""
        middle = np.asarray(centre) + rng.uniform(-2.0, 2.0, size=2)
        semiaxes = np.asarray(radii) * rng.uniform(0.9, 1.12)
        swing, phase = rng.uniform(0.0, 3.0, size=2), rng.uniform(0.0, 2 * np.pi, size=2)
        x, y = (
            points[k] - np.float32(middle[k]) - np.float32(swing[k]) * np.sin(points[2] * np.float32(0.06) + phase[k])
            for k in range(2)
        )
        radial = (1.0 - np.sqrt((x / semiaxes[0]) ** 2 + (y / semiaxes[1]) ** 2)) * semiaxes.min()
        return np.minimum(radial, np.minimum(points[2] - length[0], length[1] - points[2])).astype(np.float32)

    body_radii = np.array([62.0, 46.0]) * rng.uniform(0.95, 1.05, size=2)
    body = (1.0 - np.sqrt((points[0] / body_radii[0]) ** 2 + (points[1] / body_radii[1]) ** 2)) * body_radii.min()
    body = body.astype(np.float32)
    paint(body, rng.uniform(-110.0, -90.0))  # fat
    paint(body - rng.uniform(4.0, 7.0), rng.uniform(25.0, 45.0))  # soft tissue

    paint(tube((0.0, -31.0), (9.0, 7.0), (-200.0, 200.0)), rng.uniform(140.0, 240.0))  # spine
    parenchyma, enhanced = (95.0, 125.0), (140.0, 185.0)
    paint(ellipsoid((25.0, 5.0, 20.0), (26.0, 25.0, 24.0)), rng.uniform(*parenchyma), 1)
    paint(ellipsoid((-35.0, -11.0, 24.0), (13.0, 16.0, 19.0)), rng.uniform(*parenchyma), 2)
    for side in (1.0, -1.0):
        paint(ellipsoid((side * 28.0, -14.0, -27.0), (10.0, 10.0, 17.0)), rng.uniform(*enhanced), 3)
    for _ in range(3):  # bowel loops
        loop = ellipsoid((rng.uniform(-28.0, 28.0), 18.0, rng.uniform(-62.0, -40.0)), (8.0, 7.0, 8.0), tilt=45.0)
        paint(loop, rng.uniform(60.0, 150.0))
    paint(tube((-2.0, -13.0), (6.5, 6.5), (-62.0, 56.0)), rng.uniform(*enhanced), 4)
    paint(ellipsoid((-16.0, 15.0, -6.0), (16.0, 7.0, 8.0)), rng.uniform(80.0, 115.0), 5)
    paint(ellipsoid((22.0, 19.0, -15.0), (7.0, 7.0, 10.0)), rng.uniform(-5.0, 15.0), 6)
    return image, label


def _deformation(rng: np.random.RandomState, points: np.ndarray, num_waves: int = 5) -> np.ndarray:
    """Smooth displacements of a few mm: plane waves whose slopes sum to less than one, so that nothing folds over."""
    displacement = np.zeros_like(points)
    for _ in range(num_waves):
        wave_vector = rng.normal(size=3)
        wave_vector *= 2 * np.pi / rng.uniform(55.0, 120.0) / np.linalg.norm(wave_vector)
        phase = sum(np.float32(wave_vector[k]) * points[k] for k in range(3)) + np.float32(rng.uniform(0.0, 2 * np.pi))
        amplitude = rng.normal(size=3)
        amplitude *= rng.uniform(0.8, 1.7) / np.linalg.norm(amplitude)
        displacement += amplitude.astype(np.float32).reshape(3, 1, 1, 1) * np.sin(phase)
    return displacement


def _ellipsoid_distance(points: np.ndarray, centre: np.ndarray, radii: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """Signed distance in mm to an ellipsoid's surface, positive inside; exact to first order at the surface.

    With q the norm of the coordinates over the radii, (1 - q) is divided by the length of q's gradient.
    """
    centred = [points[k] - np.float32(centre[k]) for k in range(3)]
    level, slope = np.float32(0.0), np.float32(0.0)
    for k in range(3):
        scaled = sum(np.float32(turn[j, k] / radii[k]) * centred[j] for j in range(3))
        level = level + scaled**2
        slope = slope + (scaled / np.float32(radii[k])) ** 2
    level = np.sqrt(level)
    return (1.0 - level) * level / np.sqrt(np.maximum(slope, np.float32(1e-12))) + (level < 1e-3)


def _rotation(axis: np.ndarray, degrees: float) -> np.ndarray:
    """Return the rotation by an angle about an axis (Rodrigues' formula), shape (3, 3)."""
    x, y, z = np.asarray(axis) / np.linalg.norm(axis)
    cross = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    angle = np.deg2rad(degrees)
    return np.eye(3) + np.sin(angle) * cross + (1.0 - np.cos(angle)) * cross @ cross


def _correlated_noise(rng: np.random.RandomState, spatial_size: Sequence[int], std: float) -> np.ndarray:
    """Gaussian noise smoothed over neighbouring voxels by (1/4, 1/2, 1/4) along each axis, with the given deviation."""
    noise = rng.normal(size=[n + 2 for n in spatial_size]).astype(np.float32)
    for axis, n in enumerate(spatial_size):
        low, mid, high = (np.take(noise, range(k, k + n), axis=axis) for k in range(3))
        noise = 0.25 * low + 0.5 * mid + 0.25 * high
    return noise * np.float32(std / 0.375**1.5)  # 0.375 = 1/16 + 1/4 + 1/16, once per axis
