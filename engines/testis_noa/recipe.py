"""How the packages of this task are made: one testis of each phantom patient through the engine. No torch.

A cohort holds one side of each patient, so that its units are independent and threshold, gate and nomogram fit the unit
that is reported. The nomogram is fitted on log-odds out of fold: for each fold of the training cohort a network of the
same kind is trained on the others, calibrated, and asked about it.
"""

from __future__ import annotations

import numpy as np

from dicom_node.pixels.grey import resize
from dicom_node.result import Refusal
from engines.testis_noa import dicom, engine, phantom
from engines.training.headers import MemoryReader, instance_of
from engines.training.nuisance import image_statistics
from engines.training.recipe import Recipe, Sample, Settings

PLACE = (28, 28)
COVARIATES = ("FSH", "TESTICULAR_VOLUME", "EDV")
JITTER = 0.06
"""Of the box's side: a reader outlines a testis, and the locator finds it, only so exactly."""


class TestisNoa(Recipe):
    """NASNet-A Mobile on the testis, and the nomogram."""

    task = "testis_noa"
    covariates = COVARIATES
    network_name = "NASNet-A Mobile topology"

    def sample(self, seed: int, label: int, settings: Settings, encoding: str) -> Sample | Refusal:
        side = phantom.SIDES[seed // 2 % 2]
        return self.prepared(phantom.make(seed, label, settings, (side,)), encoding)

    def prepared(self, patient: phantom.Patient, encoding: str) -> Sample | Refusal:
        """The first testis of a patient in memory, as the node would see it in that encoding."""
        still = patient.stills[0]
        ds = dicom.header(still, 1, dicom.Labels(uid_seed=patient.seed), b"")
        image = dicom.jpeg_round_trip(still.image) if encoding == "jpeg" else still.image
        found = engine.prepare(instance_of(ds), MemoryReader(image[None]), reader_box(patient.seed, still))
        if isinstance(found, Refusal):
            return found
        x0, y0, x1, y1 = found.region
        signal = still.signal[y0 : y1 + 1, x0 : x1 + 1]
        place = resize(signal, PLACE) * np.float32(patient.label)
        area = float(np.log(still.mask.sum()))
        shape = (y1 - y0 + 1) / (x1 - x0 + 1)
        metadata = [still.mm_per_px, area, shape, float(still.side == "R")]
        nuisance = np.concatenate([image_statistics(found.crop[None].astype(np.float64) / 255), metadata])
        return Sample(
            found.x, np.asarray(place, np.float32), nuisance, np.array(patient.covariates(still.side)),
            {"strength": np.array(still.strength)},
        )  # fmt: skip


def reader_box(seed: int, still: phantom.Still) -> engine.Box:
    """The box of the testis as somebody would have outlined it."""
    rows, columns = np.nonzero(still.mask.any(axis=1))[0], np.nonzero(still.mask.any(axis=0))[0]
    x0, x1, y0, y1 = columns[0], columns[-1], rows[0], rows[-1]
    off = np.random.default_rng([seed, 7]).uniform(-JITTER, JITTER, 4)
    wide, high = x1 - x0 + 1, y1 - y0 + 1
    return (
        int(x0 + off[0] * wide), int(y0 + off[1] * high), int(x1 + off[2] * wide), int(y1 + off[3] * high)
    )  # fmt: skip


RECIPE = TestisNoa()
