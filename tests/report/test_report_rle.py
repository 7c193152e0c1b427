"""RLE Lossless: what others decode from it, and that it is PS3.5 annex G to the letter."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import UID, RLELossless, SecondaryCaptureImageStorage

from dicom_node.report import rle

Frame = np.ndarray[Any, Any]


def speckle(rows: int, columns: int) -> Frame:
    """Noise between flat margins, as a capture is; the flat rows are of one level, so runs could cross their ends."""
    rng = np.random.default_rng(rows * 1000 + columns)
    frame = np.full((rows, columns, 3), (18, 19, 22), np.uint8)
    middle = slice(columns // 4, columns - columns // 4)
    frame[rows // 3 :, middle] = rng.integers(0, 256, frame[rows // 3 :, middle].shape, np.uint8)
    return frame


def as_dataset(frame: Frame) -> Dataset:
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = RLELossless
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = SecondaryCaptureImageStorage
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = UID("1.2.3.4")
    ds.Rows, ds.Columns, ds.SamplesPerPixel = frame.shape
    ds.PhotometricInterpretation, ds.PlanarConfiguration = "RGB", 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 8, 8, 7, 0
    ds.PixelData = encapsulate([rle.encode(frame)])
    ds["PixelData"].is_undefined_length = True
    return ds


def unpacked(segment: bytes, columns: int) -> bytes:
    """By the words of G.3.2; a run or a literal that goes beyond the end of a row is an error."""
    out, at = bytearray(), 0
    while at < len(segment):
        n = segment[at]
        if n == 128 or (at == len(segment) - 1 and n == 0):
            at += 1  # nothing, or the byte that makes the length even
            continue
        count = n + 1 if n < 128 else 257 - n
        assert len(out) % columns + count <= columns, "rows are packed each by itself (G.3.1)"
        out += segment[at + 1 : at + 1 + count] if n < 128 else segment[at + 1 : at + 2] * count
        at += 1 + (count if n < 128 else 1)
    return bytes(out)


SHAPES = [(1, 1), (2, 3), (40, 129), (61, 300), (530, 926)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("plugin", ["pylibjpeg", "pydicom"])
def test_every_decoder_gives_the_same_pixels_back(shape: tuple[int, int], plugin: str) -> None:
    frame = speckle(*shape)
    ds = as_dataset(frame)
    ds.pixel_array_options(decoding_plugin=plugin)
    assert np.array_equal(ds.pixel_array, frame)


def test_gdcm_gives_the_same_pixels_back(tmp_path: Path) -> None:
    import gdcm

    frame = speckle(61, 300)
    pydicom.dcmwrite(tmp_path / "rle.dcm", as_dataset(frame), enforce_file_format=True)
    reader = gdcm.ImageReader()
    reader.SetFileName(str(tmp_path / "rle.dcm"))
    assert reader.Read()
    assert reader.GetImage().GetBuffer().encode("utf-8", "surrogateescape") == frame.tobytes()


def test_dcmtk_gives_the_same_pixels_back(tmp_path: Path, tool: Callable[..., Any]) -> None:
    frame = speckle(61, 300)
    pydicom.dcmwrite(tmp_path / "rle.dcm", as_dataset(frame), enforce_file_format=True)
    done = tool("dcmdrle", tmp_path / "rle.dcm", tmp_path / "plain.dcm")
    assert done.returncode == 0 and done.stderr == ""
    assert np.array_equal(pydicom.dcmread(tmp_path / "plain.dcm").pixel_array, frame)


@pytest.mark.parametrize("shape", SHAPES)
def test_three_even_segments_whose_rows_are_packed_each_by_itself(shape: tuple[int, int]) -> None:
    frame = speckle(*shape)
    data = rle.encode(frame)
    count, *offsets = struct.unpack("<16L", data[:64])
    assert count == 3 and offsets[0] == 64 and not any(offsets[3:])
    assert not any(offset % 2 for offset in offsets) and len(data) % 2 == 0
    for plane, (start, end) in enumerate(zip(offsets, [*offsets[1:3], len(data)], strict=False)):
        assert unpacked(data[start:end], shape[1]) == frame[..., plane].tobytes()


def test_the_same_pixels_give_the_same_bytes_whatever_their_layout_in_memory() -> None:
    frame = speckle(61, 300)
    assert rle.encode(frame) == rle.encode(np.asfortranarray(frame)) == rle.encode(frame[::-1][::-1])


def test_it_packs_no_worse_than_pylibjpeg(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = speckle(530, 926)
    ours = rle.encode(frame)
    monkeypatch.setattr("dicom_node.report.rle.features.check", lambda _name: False)
    assert len(ours) <= len(rle.encode(frame)) < frame.nbytes


def test_a_pillow_without_libtiff_packs_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dicom_node.report.rle.features.check", lambda _name: False)
    monkeypatch.setattr("dicom_node.report.rle.Image", None)
    frame = speckle(40, 129)
    assert np.array_equal(as_dataset(frame).pixel_array, frame)
