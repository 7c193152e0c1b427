"""The two ways to decode JPEG baseline agree: the fast one is only ever the same picture sooner."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
from PIL import Image
from pydicom import dcmread, uid
from pydicom.encaps import generate_frames

from dicom_node.pixels import codecs
from dicom_node.pixels.codecs import jpeg
from dicom_node.pixels.framing import ImagePixel

ROWS, COLUMNS = 75, 101


def encoded(samples: int, **options: object) -> bytes:
    rng = np.random.default_rng(3)
    shape = (ROWS, COLUMNS) if samples == 1 else (ROWS, COLUMNS, 3)
    smooth = np.cumsum(rng.integers(-9, 10, shape), axis=0) + 128
    buffer = io.BytesIO()
    Image.fromarray(smooth.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85, **options)
    return buffer.getvalue()


def image(samples: int, rows: int = ROWS, columns: int = COLUMNS) -> ImagePixel:
    return ImagePixel(rows, columns, samples, "MONOCHROME2" if samples == 1 else "YBR_FULL_422", 0, 8, 8, False)


def without_the_fast_way(data: bytes, of: ImagePixel, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    with monkeypatch.context() as patch:
        patch.setattr(codecs, "_sound_jpeg", lambda data, image: None)
        return jpeg(data, of).samples


@pytest.mark.parametrize(
    ("samples", "options"),
    [(1, {}), (3, {"subsampling": "4:4:4"}), (3, {"subsampling": "4:2:2"}), (3, {"subsampling": "4:2:0"}),
     (3, {"progressive": True}), (3, {"keep_rgb": True}), (1, {"restart_marker_rows": 1})],
)  # fmt: skip
def test_both_ways_give_the_same_samples(samples, options, monkeypatch):
    data = encoded(samples, **options)
    assert codecs._sound_jpeg(data, image(samples)) is not None
    np.testing.assert_array_equal(
        jpeg(data, image(samples)).samples, without_the_fast_way(data, image(samples), monkeypatch)
    )


def test_a_damaged_codestream_is_judged_by_one_decoder(monkeypatch):
    """Cut, or with bytes turned: refused or shown exactly as without the fast way."""
    whole, chance, refused, shown = encoded(3), random.Random(5), 0, 0
    for _ in range(150):
        data = bytearray(whole[: chance.randrange(len(whole) // 2, len(whole))] if chance.random() < 0.3 else whole)
        for _ in range(chance.randint(1, 3)):
            data[chance.randrange(600, len(data))] = chance.randrange(256)
        results = []
        for decode in (lambda d: jpeg(d, image(3)).samples, lambda d: without_the_fast_way(d, image(3), monkeypatch)):
            try:
                results.append(decode(bytes(data)))
            except (ValueError, OSError, SyntaxError) as e:
                results.append(type(e).__name__)
        if isinstance(results[0], str) or isinstance(results[1], str):
            assert str(results[0]) == str(results[1])
            refused += 1
        else:
            np.testing.assert_array_equal(*results)
            shown += 1
    assert refused > 10
    assert shown > 10


def test_real_clips_come_the_same_both_ways(shared_data, monkeypatch):
    compared = 0
    for path in sorted(shared_data.glob("us/*.dcm")):
        ds = dcmread(path)
        if ds.file_meta.TransferSyntaxUID != uid.JPEGBaseline8Bit:
            continue
        data = next(generate_frames(ds.PixelData, number_of_frames=int(ds.get("NumberOfFrames", 1))))
        of = ImagePixel(ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation, 0, 8, 8, False)
        np.testing.assert_array_equal(jpeg(data, of).samples, without_the_fast_way(data, of, monkeypatch))
        compared += 1
    assert compared >= 2
