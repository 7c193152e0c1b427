"""Decoding: equal to pydicom's reference on real files, one phantom in every syntax, a clear refusal for the rest."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pydicom import dcmread, uid
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, encapsulate_extended
from pydicom.pixels import apply_color_lut
from pydicom.pixels.processing import convert_color_space

from dicom_node.errors import StoreError
from dicom_node.pixels.color import YbrToRgb
from dicom_node.pixels.decode import (
    COLOR_SPACE_CORRECTED,
    FRAME_COUNT_CORRECTED,
    PixelDecoder,
    PixelsUndecodableError,
    available_decoders,
    decode_file,
)
from dicom_node.pixels.framing import Limits
from dicom_node.result import RefusalCode
from dicom_node.study import Header, Instance

pytestmark = pytest.mark.filterwarnings("ignore")

LOSSY = {uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit}
REAL_US = [
    "JPGLosslessP14SV1_1s_1f_8b.dcm", "OBXXXX1A.dcm", "OBXXXX1A_2frame.dcm", "OBXXXX1A_rle_2frame.dcm", "US1_J2KI.dcm",
    "US1_J2KR.dcm", "US1_UNCR.dcm", "acuson_echo_65f_jpegbaseline.dcm", "clearvue_palette_implicit.dcm", "color-pl.dcm",
    "color-px.dcm", "esaote_ybr422_raw.dcm", "gdcm-US-ALOKA-16.dcm", "ge_logiqe_thyroidpreset_j2k.dcm",
    "hp_echo_34f_jpegbaseline.dcm", "mindray_ybrfull_rle.dcm", "palette_echo_10f_rle.dcm",
    "philips_echo_30f_rgb_colordoppler.dcm.zip", "philips_kidney_still_gray.dcm",
]  # fmt: skip
BUNDLED = [  # come with pydicom, so they run on every machine
    "CT_small.dcm", "MR_small.dcm", "MR_small_RLE.dcm", "MR_small_bigendian.dcm", "MR_small_implicit.dcm",
    "MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm", "MR_small_padded.dcm", "693_J2KI.dcm", "JPEG2000.dcm",
    "J2K_pixelrep_mismatch.dcm", "GDCMJ2K_TextGBR.dcm", "JPEGLSNearLossless_08.dcm", "JPEGLSNearLossless_16.dcm",
    "SC_rgb_jls_lossy_line.dcm", "SC_rgb_jls_lossy_sample.dcm", "SC_rgb_rle.dcm", "SC_rgb_rle_16bit_2frame.dcm",
    "SC_rgb_gdcm_KY.dcm", "SC_rgb_jpeg_gdcm.dcm", "SC_rgb_jpeg_dcmtk.dcm", "SC_rgb_jpeg_app14_dcmd.dcm",
    "SC_rgb_jpeg.dcm", "SC_rgb_small_odd_big_endian.dcm",
    "SC_jpeg_no_color_transform.dcm", "SC_jpeg_no_color_transform_2.dcm", "SC_rgb_dcmtk_+eb+cr.dcm",
    "SC_rgb_dcmtk_+eb+cy+s2.dcm", "SC_rgb_dcmtk_+eb+cy+s4.dcm", "SC_rgb_small_odd.dcm",
    "SC_ybr_full_422_uncompressed.dcm", "ExplVR_BigEnd.dcm", "examples_palette.dcm", "examples_ybr_color.dcm",
    "examples_overlay.dcm", "rtdose_rle.dcm",
]  # fmt: skip


def reference(path: Path) -> list[NDArray[Any]]:
    """pydicom's own frames, brought to our conventions: palettes applied at 8 bits, MONOCHROME1 inverted."""
    ds = dcmread(path)
    array = ds.pixel_array
    if ds.PhotometricInterpretation == "PALETTE COLOR":
        array = apply_color_lut(array, ds)
        array = (array >> 8).astype(np.uint8) if array.dtype == np.uint16 else array
    if ds.PhotometricInterpretation == "MONOCHROME1":
        array = (1 << ds.BitsStored) - 1 - array
    return list(array) if int(ds.get("NumberOfFrames") or 1) > 1 else [array]


def luma(frame: NDArray[Any]) -> NDArray[np.float64]:
    return frame @ np.array([0.299, 0.587, 0.114]) if frame.ndim == 3 else frame.astype(np.float64)


def assert_equal_to_reference(path: Path) -> None:
    own, ref = list(decode_file(path)), reference(path)
    assert len(own) == len(ref)
    lossy = dcmread(path, stop_before_pixels=True).file_meta.TransferSyntaxUID in LOSSY
    for mine, theirs in zip(own, ref, strict=True):
        assert mine.shape == theirs.shape
        if lossy:  # libjpeg converts YCbCr in integers, pydicom in floats
            assert np.abs(luma(mine) - luma(theirs)).max() <= 1
        else:
            assert np.array_equal(mine, theirs)


@pytest.mark.parametrize("name", REAL_US)
def test_real_ultrasound_decodes_as_pydicom_does(name: str, shared_data: Path, tmp_path: Path) -> None:
    path = shared_data / "us" / name
    if not path.exists():
        pytest.skip(f"needs {name}")
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            path = Path(archive.extract(archive.namelist()[0], tmp_path))
    assert_equal_to_reference(path)


def test_every_real_ultrasound_file_is_in_the_list(shared_data: Path) -> None:
    assert {p.name for p in (shared_data / "us").iterdir()} == {*REAL_US, "OBXXXX1A_expb.dcm"}


def test_a_big_endian_palette_equals_its_little_endian_twin(shared_data: Path) -> None:
    # pydicom reads the 16-bit entries of this palette in the wrong order, so it is no reference here.
    (big,) = decode_file(shared_data / "us" / "OBXXXX1A_expb.dcm")
    (little,) = decode_file(shared_data / "us" / "OBXXXX1A.dcm")
    assert np.array_equal(big, little)


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_files_decode_as_pydicom_does(name: str) -> None:
    path = get_testdata_file(name)
    assert isinstance(path, str)
    assert_equal_to_reference(Path(path))


def test_twelve_bit_extended_jpeg_is_decoded() -> None:
    path = get_testdata_file("JPGExtended.dcm")
    assert isinstance(path, str)
    (frame,) = decode_file(Path(path))
    assert frame.dtype == np.uint16
    assert (frame.max(), round(float(frame.mean()), 1)) == (264, 14.4)


# --- one phantom, every encoding -------------------------------------------------------------------------------------


def grey_clip(frames: int = 3, rows: int = 32, columns: int = 48) -> NDArray[np.uint8]:
    rng = np.random.default_rng(5)
    clip = np.zeros((frames, rows, columns), np.uint8)
    clip[:, 6:-6, 6:-6] = rng.rayleigh(40, (frames, rows - 12, columns - 12)).clip(0, 255)
    return clip


def color_clip(frames: int = 3) -> NDArray[np.uint8]:
    clip = np.stack([grey_clip(frames)] * 3, axis=-1)
    clip[:, 10:16, 10:20] = (200, 40, 30)
    return clip


def make(clip: NDArray[Any], syntax: str = uid.ExplicitVRLittleEndian, **values: Any) -> Dataset:
    """An ultrasound instance around `clip` (frames, rows, columns[, 3]); the pixel data is native until encoded."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.SOPClassUID, ds.SOPInstanceUID = uid.UltrasoundMultiFrameImageStorage, "1.2.3"
    ds.PatientName, ds.PatientID = "SECRET^NAME", "SECRET-ID"
    ds.NumberOfFrames = len(clip)
    ds.Rows, ds.Columns = clip.shape[1:3]
    ds.SamplesPerPixel = 3 if clip.ndim == 4 else 1
    ds.PhotometricInterpretation = "RGB" if clip.ndim == 4 else "MONOCHROME2"
    if clip.ndim == 4:
        ds.PlanarConfiguration = 0
    ds.BitsAllocated = ds.BitsStored = 8 * clip.dtype.itemsize
    ds.HighBit = ds.BitsStored - 1
    ds.PixelRepresentation = int(clip.dtype.kind == "i")
    ds.PixelData = clip.tobytes() + b"\0" * (clip.nbytes % 2)
    ds["PixelData"].VR = "OB" if clip.dtype.itemsize == 1 else "OW"
    for keyword, value in values.items():
        setattr(ds, keyword, value)
    return ds


def save(ds: Dataset, path: Path, **encoding: bool) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ds.save_as(path, enforce_file_format=True, **encoding)
    return path


def with_frames(ds: Dataset, syntax: str, frames: list[bytes], **how: Any) -> Dataset:
    ds.file_meta.TransferSyntaxUID = syntax
    ds.PixelData = encapsulate(frames, **how)
    ds["PixelData"].VR = "OB"
    ds["PixelData"].is_undefined_length = True
    return ds


def compress(ds: Dataset, syntax: str) -> Dataset:
    """With the encoder named: left to itself pydicom takes GDCM, whose RLE encoder aborts the process on odd sizes."""
    plugin = {uid.RLELossless: "pylibjpeg", uid.JPEG2000Lossless: "pylibjpeg", uid.JPEGLSLossless: "pyjpegls"}[syntax]
    ds.compress(syntax, generate_instance_uid=False, encoding_plugin=plugin)
    return ds


def jpegs(clip: NDArray[np.uint8], **how: Any) -> list[bytes]:
    out = []
    for frame in clip:
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, "JPEG", quality=95, **how)
        out.append(buffer.getvalue())
    return out


def gdcm_lossless(path: Path, out: Path) -> Path:
    gdcm = pytest.importorskip("gdcm")
    reader = gdcm.ImageReader()
    reader.SetFileName(str(path))
    assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEGLosslessProcess14_1))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer = gdcm.ImageWriter()
    writer.SetFileName(str(out))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()
    return out


LOSSLESS = [
    uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian, uid.RLELossless,
    uid.JPEGLSLossless, uid.JPEG2000Lossless, uid.JPEGLosslessSV1,
]  # fmt: skip
CLIPS: dict[str, Callable[[], NDArray[Any]]] = {
    "grey8": grey_clip,
    "colour": color_clip,
    "grey16": lambda: grey_clip().astype(np.uint16) * 17,
    "signed16": lambda: grey_clip().astype(np.int16) * 9 - 700,
    "odd size": lambda: grey_clip(3, 35, 45),
}


@pytest.mark.parametrize("syntax", LOSSLESS, ids=lambda s: uid.UID(s).name[:28])
@pytest.mark.parametrize("kind", CLIPS)
def test_every_lossless_syntax_gives_back_the_same_pixels(syntax: str, kind: str, tmp_path: Path) -> None:
    clip = CLIPS[kind]()
    ds = make(clip)
    if syntax == uid.JPEGLosslessSV1:
        path = gdcm_lossless(save(ds, tmp_path / "native.dcm"), tmp_path / "a.dcm")
    else:
        if syntax == uid.ExplicitVRBigEndian:
            words = clip.tobytes() + b"\0" * (clip.nbytes % 2)
            ds.PixelData = np.frombuffer(words, np.uint16).byteswap().tobytes()  # OW: also 8-bit samples are swapped
            ds["PixelData"].VR = "OW"
            ds.file_meta.TransferSyntaxUID = syntax
        elif syntax == uid.ImplicitVRLittleEndian:
            ds.file_meta.TransferSyntaxUID = syntax
        elif syntax != uid.ExplicitVRLittleEndian:
            compress(ds, syntax)
        path = save(ds, tmp_path / "a.dcm")
    own = list(decode_file(path))
    assert np.array_equal(np.stack(own), clip)
    assert own[0].dtype == clip.dtype


def test_planar_configuration_1_and_ybr_full_and_raw_422(tmp_path: Path) -> None:
    clip = color_clip()
    planes = make(clip, PlanarConfiguration=1)
    planes.PixelData = clip.transpose(0, 3, 1, 2).tobytes()
    assert np.array_equal(np.stack(list(decode_file(save(planes, tmp_path / "p.dcm")))), clip)

    ybr = np.stack([convert_color_space(f.copy(), "RGB", "YBR_FULL") for f in clip])
    expected = np.stack([convert_color_space(f.copy(), "YBR_FULL", "RGB") for f in ybr])
    full = make(ybr, PhotometricInterpretation="YBR_FULL")
    assert np.array_equal(np.stack(list(decode_file(save(full, tmp_path / "f.dcm")))), expected)

    halved = ybr.copy()
    halved[:, :, 1::2, 1:] = halved[:, :, ::2, 1:]
    raw = np.stack([halved[:, :, ::2, 0], halved[:, :, 1::2, 0], halved[:, :, ::2, 1], halved[:, :, ::2, 2]], axis=-1)
    sub = make(clip, PhotometricInterpretation="YBR_FULL_422")
    sub.PixelData = raw.tobytes()
    expected = np.stack([convert_color_space(f.copy(), "YBR_FULL", "RGB") for f in halved])
    assert np.array_equal(np.stack(list(decode_file(save(sub, tmp_path / "s.dcm")))), expected)


def test_ybr_conversion_is_exact_over_all_chroma() -> None:
    cb, cr = (a.astype(np.uint8) for a in np.meshgrid(np.arange(256), np.arange(256), indexing="ij"))
    convert = YbrToRgb()
    for y in (0, 1, 100, 254, 255):
        own = convert(np.full_like(cb, y), cb, cr).astype(int)
        exact = np.stack(
            [
                y + 1.402 * (cr - 128.0),
                y - (0.114 * 1.772 * (cb - 128.0) + 0.299 * 1.402 * (cr - 128.0)) / 0.587,
                y + 1.772 * (cb - 128.0),
            ],
            axis=-1,
        )
        assert np.abs(own - np.clip(exact, 0, 255)).max() <= 0.5 + 1e-9


def test_monochrome1_is_turned_and_unused_high_bits_are_cut(tmp_path: Path) -> None:
    clip = grey_clip()
    turned = make(255 - clip, PhotometricInterpretation="MONOCHROME1")
    assert np.array_equal(np.stack(list(decode_file(save(turned, tmp_path / "m.dcm")))), clip)
    deep = grey_clip().astype(np.uint16) * 16
    overlay = make(deep | 0x8000, BitsStored=12, HighBit=11)  # an old overlay in the high bits
    assert np.array_equal(np.stack(list(decode_file(save(overlay, tmp_path / "o.dcm")))), deep)
    signed = grey_clip().astype(np.int16) * 8 - 900
    cut = make(signed & 0x0FFF, BitsStored=12, HighBit=11)
    assert np.array_equal(np.stack(list(decode_file(save(cut, tmp_path / "s.dcm")))), signed)


@pytest.mark.parametrize("bits", [8, 16])
def test_palette_color(bits: int, tmp_path: Path) -> None:
    clip = grey_clip()
    red, green, blue = (np.roll(np.arange(256), k).astype(np.uint16) for k in (1, 50, 99))
    ds = make(clip, PhotometricInterpretation="PALETTE COLOR")
    for name, table in (("Red", red), ("Green", green), ("Blue", blue)):
        setattr(ds, f"{name}PaletteColorLookupTableDescriptor", [256, 0, bits])
        entries = table.astype(np.uint8) if bits == 8 else table << 8
        setattr(ds, f"{name}PaletteColorLookupTableData", entries.tobytes())
    frames = np.stack(list(decode_file(save(ds, tmp_path / "p.dcm"))))
    assert frames.dtype == np.uint8
    assert np.array_equal(frames, np.stack([red[clip], green[clip], blue[clip]], axis=-1))


# --- colour space that the tags get wrong ----------------------------------------------------------------------------


def bare(data: bytes) -> bytes:
    """A JPEG without JFIF and Adobe markers and with components 1, 2, 3: nothing in it states the colour space."""
    out, at = b"\xff\xd8", 2
    while True:
        marker, length = data[at + 1], struct.unpack_from(">H", data, at + 2)[0]
        segment = bytearray(data[at : at + 2 + length])
        if marker in (0xC0, 0xC2):
            segment[10:19:3] = bytes((1, 2, 3))
        if marker == 0xDA:
            segment[5:11:2] = bytes((1, 2, 3))
            return out + bytes(segment) + data[at + 2 + length :]
        if marker not in (0xE0, 0xEE):
            out += segment
        at += 2 + length


@pytest.mark.parametrize("stored_rgb", [False, True], ids=["stored YCbCr", "stored RGB"])
@pytest.mark.parametrize("tag", ["RGB", "YBR_FULL_422", "YBR_FULL"])
@pytest.mark.parametrize("markers", [False, True], ids=["bare", "with markers"])
def test_the_pixels_are_believed_over_a_wrong_colour_tag(
    stored_rgb: bool, tag: str, markers: bool, tmp_path: Path
) -> None:
    clip = color_clip(2)
    frames = jpegs(clip, subsampling=0, **({"keep_rgb": True} if stored_rgb else {}))
    expected = np.stack([np.asarray(Image.open(io.BytesIO(f))) for f in frames])
    frames = frames if markers else [bare(f) for f in frames]
    path = save(
        with_frames(make(clip, PhotometricInterpretation=tag), uid.JPEGBaseline8Bit, frames), tmp_path / "c.dcm"
    )
    notes: set[str] = set()
    own = np.stack(list(decode_file(path, notes=notes)))
    assert np.array_equal(own, expected)
    assert (COLOR_SPACE_CORRECTED in notes) is (not markers and stored_rgb != (tag == "RGB"))


def test_native_ycbcr_tagged_rgb_is_corrected(tmp_path: Path) -> None:
    clip = color_clip(2)
    ybr = np.stack([convert_color_space(f.copy(), "RGB", "YBR_FULL") for f in clip])
    notes: set[str] = set()
    own = np.stack(list(decode_file(save(make(ybr), tmp_path / "n.dcm"), notes=notes)))
    assert np.abs(own.astype(int) - clip).max() <= 2
    assert notes == {COLOR_SPACE_CORRECTED}


def test_a_picture_that_is_really_colourful_is_left_alone(tmp_path: Path) -> None:
    clip = np.zeros((1, 32, 48, 3), np.uint8)
    clip[..., 2] = 250
    notes: set[str] = set()
    assert np.array_equal(next(decode_file(save(make(clip), tmp_path / "b.dcm"), notes=notes)), clip[0])
    assert not notes


# --- frames: which, how many, in how many pieces ---------------------------------------------------------------------


def instance(path: Path, **values: Any) -> Instance:
    header = Header.from_json(values)
    return Instance("0" * 32, header, "", "", path, "A", "B", "127.0.0.1", "x", 0.0)


@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.RLELossless])
def test_frames_are_chosen_by_number_in_the_order_asked_for(syntax: str, tmp_path: Path) -> None:
    clip = grey_clip(7)
    ds = make(clip)
    if syntax == uid.RLELossless:
        compress(ds, syntax)
    stored = instance(save(ds, tmp_path / "a.dcm"))
    decoder = PixelDecoder()
    assert np.array_equal(np.stack(list(decoder.frames(stored, (2, 7, 1)))), clip[[1, 6, 0]])
    assert len(list(decoder.frames(stored))) == 7
    assert list(decoder.frames(stored, ())) == []
    assert decoder.notes(stored) == ()
    for wrong in ((0,), (8,), (1, -1)):
        with pytest.raises(PixelsUndecodableError):
            list(decoder.frames(stored, wrong))


@pytest.mark.parametrize(
    ("claimed", "present", "given"),
    [(1, 3.0, 3), (5, 3.0, 3), (3, 3.0, 3), (3, 3.5, 3), (2, 3.5, 2), (5, 3.5, None), (1, 0.5, None), (0, 2.0, 2)],
)
def test_the_pixel_data_is_believed_over_number_of_frames_if_it_holds_whole_frames(
    claimed: int, present: float, given: int | None, tmp_path: Path
) -> None:
    clip = grey_clip(4)
    ds = make(clip, NumberOfFrames=claimed)
    ds.PixelData = clip.tobytes()[: int(present * clip[0].nbytes)]
    stored = instance(save(ds, tmp_path / "a.dcm"))
    decoder = PixelDecoder()
    if given is None:
        with pytest.raises(PixelsUndecodableError, match="shorter"):
            list(decoder.frames(stored))
        return
    assert np.array_equal(np.stack(list(decoder.frames(stored))), clip[:given])
    assert (decoder.notes(stored) == (FRAME_COUNT_CORRECTED,)) is (max(claimed, 1) != given)


@pytest.mark.parametrize("claimed", [1, 4, 9])
@pytest.mark.parametrize("table", ["basic", "none", "extended", "wrong"])
@pytest.mark.parametrize("pieces", [1, 3])
def test_fragments_are_joined_into_frames_with_any_offset_table(
    claimed: int, table: str, pieces: int, tmp_path: Path
) -> None:
    clip = grey_clip(4)
    frames = jpegs(clip)
    ds = make(clip, NumberOfFrames=claimed)
    if table == "extended":
        pieces = 1  # PS3.3 C.7.6.3.1.8 allows one fragment a frame
    with_frames(ds, uid.JPEGBaseline8Bit, frames, fragments_per_frame=pieces, has_bot=table in ("basic", "wrong"))
    if table == "extended":
        data, ds.ExtendedOffsetTable, ds.ExtendedOffsetTableLengths = encapsulate_extended(frames)
        ds.PixelData = data
        ds["PixelData"].is_undefined_length = True
    if table == "wrong":
        raw = bytearray(ds.PixelData)
        raw[12:16] = struct.pack("<L", 7)
        ds.PixelData = bytes(raw)
        ds["PixelData"].is_undefined_length = True
    own = list(decode_file(save(ds, tmp_path / "a.dcm")))
    assert len(own) == 4
    for mine, data in zip(own, frames, strict=True):
        assert np.array_equal(mine, np.asarray(Image.open(io.BytesIO(data))))


# --- refusals --------------------------------------------------------------------------------------------------------


def refusal_of(path: Path, **how: Any) -> str:
    with pytest.raises(PixelsUndecodableError) as caught:
        list(decode_file(path, **how))
    assert "SECRET" not in str(caught.value)
    assert caught.value.refusal().code is RefusalCode.PIXELS_UNDECODABLE
    return str(caught.value)


COMPRESSED = [uid.RLELossless, uid.JPEGLSLossless, uid.JPEG2000Lossless, uid.JPEGBaseline8Bit, uid.JPEGLosslessSV1]


def encoded(syntax: str, tmp_path: Path) -> Dataset:
    clip = color_clip(1)
    ds = make(clip)
    if syntax == uid.JPEGBaseline8Bit:
        return with_frames(ds, syntax, jpegs(clip), has_bot=False)
    if syntax == uid.JPEGLosslessSV1:
        return dcmread(gdcm_lossless(save(ds, tmp_path / "native.dcm"), tmp_path / "j.dcm"))
    compress(ds, syntax)
    return ds


@pytest.mark.parametrize("syntax", COMPRESSED, ids=lambda s: uid.UID(s).name[:28])
@pytest.mark.parametrize("damage", ["rubbish", "cut", "other size"])
def test_a_broken_codestream_is_refused_and_the_syntax_is_named(syntax: str, damage: str, tmp_path: Path) -> None:
    ds = encoded(syntax, tmp_path)
    if damage == "other size":
        ds.Rows = 31 if syntax != uid.RLELossless else 64
    else:
        whole = bytes(ds.PixelData)
        start = 8 + struct.unpack_from("<L", whole, 4)[0] + 8
        body = whole[start : start + struct.unpack_from("<L", whole, start - 4)[0]]
        broken = b"SECRET rubbish!!" * 20 if damage == "rubbish" else body[: len(body) // 3 // 2 * 2]
        with_frames(ds, syntax, [broken])
    assert syntax in refusal_of(save(ds, tmp_path / "x.dcm"))


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"Rows": 0}, "Rows or Columns"),
        ({"BitsAllocated": 12}, "Bits Allocated"),
        ({"BitsStored": 9}, "Bits Stored"),
        ({"SamplesPerPixel": 3}, "Samples per Pixel"),
        ({"PhotometricInterpretation": "SECRET"}, "Photometric Interpretation"),
        (
            {"PhotometricInterpretation": "YBR_PARTIAL_420", "SamplesPerPixel": 3, "Rows": 16, "Columns": 32},
            "photometric",
        ),
        ({"Rows": 65535, "Columns": 65535}, "larger than this node decodes"),
        ({"Rows": 4000, "Columns": 4000}, "shorter than its attributes"),
        ({"NumberOfFrames": 2_000_000_000, "Rows": 33}, "shorter than its attributes"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "broken"),
    ],
)
def test_attributes_that_cannot_be_true_are_refused(values: dict[str, Any], why: str, tmp_path: Path) -> None:
    assert why in refusal_of(save(make(grey_clip(), **values), tmp_path / "x.dcm"))


def test_a_codestream_may_not_be_larger_than_its_attributes(tmp_path: Path) -> None:
    (data,) = jpegs(grey_clip(1))
    at = data.index(b"\xff\xc0")
    bomb = data[: at + 5] + struct.pack(">HH", 60000, 60000) + data[at + 9 :]
    assert "size of the codestream" in refusal_of(
        save(with_frames(make(grey_clip(1)), uid.JPEGBaseline8Bit, [bomb]), tmp_path / "j.dcm")
    )
    ds = make(grey_clip(1))
    compress(ds, uid.JPEG2000Lossless)
    raw = bytearray(ds.PixelData)
    at = raw.index(b"\xff\x4f\xff\x51")
    raw[at + 8 : at + 16] = struct.pack(">LL", 60000, 60000)
    ds.PixelData = bytes(raw)
    ds["PixelData"].is_undefined_length = True
    assert "size of the codestream" in refusal_of(save(ds, tmp_path / "k.dcm"))


def test_what_has_no_decoder_is_refused_by_name(tmp_path: Path) -> None:
    deflated = make(grey_clip())
    deflated.file_meta.TransferSyntaxUID = uid.DeflatedExplicitVRLittleEndian
    assert "Deflated" in refusal_of(save(deflated, tmp_path / "d.dcm"))
    video = with_frames(make(color_clip(1)), uid.MPEG4HP41, [b"\0\0\0\1" * 8])
    assert uid.MPEG4HP41 in refusal_of(save(video, tmp_path / "v.dcm"))
    private = with_frames(make(grey_clip(1)), "1.2.3.4.5", [b"\0" * 8])
    assert "private transfer syntax 1.2.3.4.5" in refusal_of(
        save(private, tmp_path / "q.dcm", implicit_vr=False, little_endian=True)
    )


def test_limits_hold_and_a_missing_file_is_a_fault_not_a_refusal(tmp_path: Path) -> None:
    path = save(make(grey_clip(5)), tmp_path / "a.dcm")
    assert "more frames" in refusal_of(path, limits=Limits(frames=4))
    assert "larger" in refusal_of(path, limits=Limits(frame_bytes=1000))
    with pytest.raises(StoreError):
        list(decode_file(tmp_path / "gone.dcm"))


def test_all_codecs_of_the_node_are_installed() -> None:
    found = available_decoders()
    assert len(found) == 12
    for plugin in ("pillow", "python-gdcm", "pyjpegls", "pylibjpeg-openjpeg", "pylibjpeg-rle"):
        assert any(value.startswith(plugin + " ") for value in found.values())


# --- memory, in a process of its own ---------------------------------------------------------------------------------

MEASURE = """
import logging, resource, sys, warnings
from pathlib import Path
from dicom_node.pixels.decode import PixelsUndecodableError, decode_file
warnings.simplefilter("ignore"); logging.disable(logging.CRITICAL)
def peak_mb(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
paths = [Path(p) for p in sys.stdin.read().split("\\n") if p]
next(decode_file(paths.pop(0)))
before, frames, refused = peak_mb(), 0, 0
for path in paths:
    try:
        for frame in decode_file(path):
            frames += 1
    except PixelsUndecodableError as e:
        assert "SECRET" not in str(e)
        refused += 1
print(frames, refused, round(peak_mb() - before))
"""


def measure(warm_up: Path, paths: Iterator[Path] | list[Path]) -> tuple[int, int, int]:
    """(frames decoded, files refused, growth of the peak memory in MB)."""
    lines = "\n".join(str(p) for p in (warm_up, *paths))
    done = subprocess.run([sys.executable, "-c", MEASURE], input=lines, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    frames, refused, grown = map(int, done.stdout.split())
    return frames, refused, grown


def test_a_long_clip_is_streamed(tmp_path: Path) -> None:
    warm_up = save(make(color_clip(1)), tmp_path / "w.dcm")
    clip = np.zeros((1, 768, 1024, 3), np.uint8)
    native = save(make(clip, NumberOfFrames=300), tmp_path / "native.dcm")
    raw = native.read_bytes()
    at = raw.index(b"\xe0\x7f\x10\x00OB\0\0") + 8
    with native.open("r+b") as file:  # 700 MB, sparse
        file.seek(at)
        file.write(struct.pack("<L", 300 * clip.nbytes))
        file.truncate(at + 4 + 300 * clip.nbytes)
    ds = with_frames(make(clip, NumberOfFrames=60), uid.JPEGBaseline8Bit, jpegs(clip) * 60)
    frames, refused, grown = measure(warm_up, [native, save(ds, tmp_path / "jpeg.dcm")])
    assert (frames, refused) == (360, 0)
    assert grown < 40, "megabytes"


def test_malformed_files_are_decoded_or_refused_within_bounded_memory(shared_data: Path, tmp_path: Path) -> None:
    warm_up = save(make(grey_clip(1)), tmp_path / "w.dcm")
    paths = sorted(p for p in (shared_data / "malformed").rglob("*") if p.is_file())
    claims = []
    for number, values in enumerate(
        [
            {"Rows": 65535, "Columns": 65535}, {"NumberOfFrames": 2_147_483_647}, {"Rows": 11000, "Columns": 11000},
            {"Rows": 46341, "Columns": 46341, "BitsAllocated": 16, "BitsStored": 16},
        ]
    ):  # fmt: skip
        claims.append(save(make(grey_clip(1, 33, 33), **values), tmp_path / f"claim{number}.dcm"))
        ds = with_frames(make(grey_clip(1, 33, 33), **values), uid.RLELossless, [b"\x01" + b"\0" * 199])
        claims.append(save(ds, tmp_path / f"rle{number}.dcm"))
    frames, refused, grown = measure(warm_up, [*paths, *claims])
    assert frames > 80
    assert refused > len(claims)
    assert grown < 40, "megabytes"


FUZZ = """
import logging, random, resource, sys, warnings
from pathlib import Path
from dicom_node.pixels.decode import PixelsUndecodableError, decode_file
warnings.simplefilter("ignore"); logging.disable(logging.CRITICAL)
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
rng, target, refused = random.Random(7), Path(sys.argv[1]), 0
for path in map(Path, sys.argv[2:]):
    for _ in range(40):
        data = bytearray(path.read_bytes())
        for _ in range(rng.choice([1, 2, 5, 30])):
            at = rng.randrange(132, min(len(data), rng.choice([2500, 1 << 20])))
            if rng.random() < 0.8:
                data[at] = rng.choice([0, 255, rng.randrange(256)])
            else:
                del data[at : at + rng.randrange(1, 50)]
        target.write_bytes(data)
        try:
            for _ in decode_file(target):
                pass
        except PixelsUndecodableError:
            refused += 1
print(refused)
"""


def test_damaged_files_raise_nothing_but_the_one_error(tmp_path: Path) -> None:
    names = [
        "MR_small_RLE.dcm", "MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm", "SC_rgb_jpeg_gdcm.dcm",
        "SC_rgb_jpeg_dcmtk.dcm", "JPGExtended.dcm", "SC_rgb_rle_2frame.dcm", "MR_small_expb.dcm",
        "examples_palette.dcm",
    ]  # fmt: skip
    paths = [str(get_testdata_file(name)) for name in names]
    done = subprocess.run(
        [sys.executable, "-c", FUZZ, str(tmp_path / "f.dcm"), *paths], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 100
