"""Single-bit pixels (segmentations): equal to pydicom's, frames that start inside a byte, both byte orders, bounds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom import Dataset, dcmread, uid
from pydicom.data import get_testdata_file
from roi_files import Files, describe, reference

from dicom_node.pixels.decode import PixelsUndecodableError, decode_file
from dicom_node.pixels.framing import Limits


def bits(shape: tuple[int, int, int], seed: int = 1) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 2, shape, dtype=np.uint8)


def packed(folder: Path, frames: NDArray[np.uint8]) -> Path:
    files = Files(folder)
    image = files.ultrasound(*frames.shape[1:])
    files.plain_seg([(1, f, {}) for f in frames], ["a"], SourceImageSequence=[reference(image)])
    return files.instances[1].path


@pytest.mark.parametrize("shape", [(3, 8, 8), (5, 5, 7), (7, 3, 3), (9, 1, 1), (1, 37, 53), (40, 31, 29)])
def test_frames_that_are_not_whole_bytes_come_back_as_written(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    frames = bits(shape)
    path = packed(tmp_path, frames)
    assert np.array_equal(np.stack(list(decode_file(path))), frames)
    assert np.array_equal(dcmread(path).pixel_array.reshape(shape), frames)


def test_frames_are_found_out_of_order(tmp_path: Path) -> None:
    frames = bits((11, 5, 3))
    found = list(decode_file(packed(tmp_path, frames), (11, 2, 2, 7)))
    assert [f.dtype for f in found] == [np.uint8] * 4
    assert np.array_equal(np.stack(found), frames[[10, 1, 1, 6]])


@pytest.mark.parametrize("name", ["liver_1frame.dcm", "liver_expb_1frame.dcm"])
def test_a_real_segmentation_is_decoded_as_pydicom_does(name: str) -> None:
    path = str(get_testdata_file(name, download=False))  # these two come with pydicom
    expected = dcmread(path).pixel_array
    assert np.array_equal(np.stack(list(decode_file(Path(path)))), expected[None])


def test_big_endian_words_are_turned(tmp_path: Path) -> None:
    frames = bits((3, 9, 7))
    files = Files(tmp_path)
    files.plain_seg([(1, f, {}) for f in frames], ["a"])
    ds = dcmread(files.instances[0].path)
    flat = np.frombuffer(ds.PixelData, np.uint8)
    turned = Dataset()
    turned.update(ds)
    turned.PixelData = flat.reshape(-1, 2)[:, ::-1].tobytes()
    turned["PixelData"].VR = "OW"
    turned.file_meta = ds.file_meta
    turned.file_meta.TransferSyntaxUID = uid.ExplicitVRBigEndian
    big = tmp_path / "big.dcm"
    turned.save_as(big, enforce_file_format=True)
    assert np.array_equal(np.stack(list(decode_file(big))), frames)


@pytest.mark.parametrize(
    ("syntax", "plugin"),
    [
        (uid.ExplicitVRLittleEndian, ""),
        (uid.RLELossless, "pydicom"),
        (uid.JPEG2000Lossless, "pylibjpeg"),
        (uid.JPEGLSLossless, "pyjpegls"),
    ],
)
def test_fractional_segmentations_keep_their_eight_bits(tmp_path: Path, syntax: str, plugin: str) -> None:
    files = Files(tmp_path)
    image = files.ultrasound(33, 47)
    share = np.random.default_rng(3).random((1, 33, 47)).astype(np.float32)
    ds = files.seg([image], share, [describe(1)], "FRACTIONAL", omit_empty_frames=False, add=False)
    if plugin:
        ds.compress(syntax, encoding_plugin=plugin, generate_instance_uid=False)
    (frame,) = decode_file(files.add(ds).path)
    assert ds.file_meta.TransferSyntaxUID == syntax
    assert np.array_equal(frame, np.around(share[0] * 255).astype(np.uint8))


def test_too_little_data_too_large_a_frame_and_other_photometry_are_refused(tmp_path: Path) -> None:
    path = packed(tmp_path, bits((4, 9, 9)))
    with pytest.raises(PixelsUndecodableError, match="larger"):
        list(decode_file(path, limits=Limits(frame_bytes=80)))
    with pytest.raises(PixelsUndecodableError, match="more frames"):
        list(decode_file(path, limits=Limits(frames=3)))
    ds = dcmread(path)
    ds.NumberOfFrames = 5
    ds.save_as(path)
    with pytest.raises(PixelsUndecodableError, match="shorter"):
        list(decode_file(path))
    ds.NumberOfFrames, ds.PhotometricInterpretation = 4, "MONOCHROME1"
    ds.save_as(path)
    with pytest.raises(PixelsUndecodableError, match="single-bit"):
        list(decode_file(path))
