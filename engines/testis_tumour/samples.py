"""A phantom as the node sees it: through the engine's own selection and preparation. No torch.

Everything that shapes the cohorts and is no phantom stands here: a change makes them anew (`Recipe.sources`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from dicom_node.engine import Selection
from dicom_node.pixels import ultrasound
from dicom_node.pixels.grey import resize
from dicom_node.result import Refusal
from dicom_node.study import Study
from engines.testis_tumour import engine, objects, phantom
from engines.training.headers import instance_of
from engines.training.nuisance import image_statistics
from engines.training.recipe import Sample, Settings

if TYPE_CHECKING:
    from engines.training.superres import Pairs


def sample(seed: int, label: int, settings: Settings, encoding: str) -> Sample | Refusal:
    """Grey and region of one phantom, (1, 2, 128, 128) in 0..255, and what is known of it."""
    made = phantom.make(seed, label, settings)
    found = prepared(made, encoding)
    if isinstance(found, Refusal):
        return found
    metadata = [made.mm_per_px, float((found.share > 127).sum())]
    return Sample(
        np.stack([found.image, found.share]).astype(np.float32)[None],
        resize(_window(made.signal, made, found), (64, 64)),  # cells of 0.4 mm
        np.concatenate([image_statistics(found.image[None] / 255.0), metadata]),
        np.array([made.blood[name] for name in phantom.MARKERS]),
        _for_locator(made),
    )


def prepared(made: phantom.Still, encoding: str) -> engine.Prepared | Refusal:
    """A phantom through the engine's own selection and preparation, its hand-drawn region as a SEG would give it."""
    labels = objects.Labels(uid_seed=made.seed)
    ds = objects.header(made, labels)
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    instance = instance_of(ds)
    selection = engine.select(Study.from_instances("1.2", 1, [instance]), {})
    if not isinstance(selection, Selection):
        return selection
    picture = objects.jpeg_round_trip(made.picture) if encoding == "jpeg" else made.picture
    mask = np.zeros(picture.shape, np.bool_)
    panel = ultrasound.tissue_regions(instance.header)[0]
    panel.crop(mask)[:] = made.roi
    return engine.prepare(picture, panel, mask)


def pairs_of(first_seed: int, count: int, settings: Settings | None = None) -> Pairs:
    """Acquired and sharp pictures of the same tissue, the window that the engine would cut."""
    from engines.training.superres import Pairs

    low, high = [], []
    for index in range(count):
        made = phantom.make(first_seed + index, index % 2, settings, sharp=True)
        found = prepared(made, ("raw", "jpeg")[index // 2 % 2])
        if isinstance(found, Refusal) or made.sharp is None:
            continue
        low.append(found.image)
        high.append(np.rint(_window(made.sharp, made, found, 2)).astype(np.uint8))
    return Pairs(np.stack(low), np.stack(high))


def _window(image: NDArray[Any], made: phantom.Still, found: engine.Prepared, finer: int = 1) -> NDArray[np.float32]:
    """Another image of the panel, resampled and cut as `prepare` cut the picture; borders repeated."""
    size = [finer * max(1, round(n * made.mm_per_px / engine.NATIVE_MM)) for n in phantom.PANEL]
    resampled = resize(image, (size[0], size[1]))
    at = [
        np.clip(finer * start + np.arange(finer * n), 0, whole - 1)
        for start, n, whole in zip(found.corner, found.image.shape, size, strict=True)
    ]
    return np.asarray(resampled[np.ix_(*at)], np.float32)


def _for_locator(made: phantom.Still) -> dict[str, NDArray[Any]]:
    """The whole panel and the tumour on the locator's grid."""
    x0, y0, x1, y1 = made.region
    seen = engine.locator_input(made.picture[y0 : y1 + 1, x0 : x1 + 1])[0]
    mask = resize(made.tumour.astype(np.float32), engine.LOCATOR_SIZE)
    return {"locator_x": seen.astype(np.float16), "locator_mask": mask > 0.5}
