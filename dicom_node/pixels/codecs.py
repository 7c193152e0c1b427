"""One adapter per codec: the bytes of one frame in, its samples out. One decoder per transfer syntax, chosen here.

Called by `decode.py` in the worker process only. The native libraries are imported when first needed. Before any of
them sees a frame its codestream's own size is compared with the attributes: a decoder allocates by the codestream.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray
from pydicom import uid

from dicom_node.pixels.framing import ImagePixel, UndecodableError

Samples = NDArray[np.unsignedinteger | np.signedinteger]


class Decoded(NamedTuple):
    """(rows, columns[, 3]) and the colour space it is in now: a codec may have transformed it."""

    samples: Samples
    photometric: str


class Codestream(NamedTuple):
    """What a codestream says of itself."""

    rows: int
    columns: int
    components: int
    precision: int
    signed: bool
    says_rgb: bool | None
    """True or False where the codestream states it (JFIF, Adobe marker, component identifiers), else None."""


def jpeg_info(data: bytes) -> Codestream:
    """The frame header: JPEG (ISO 10918-1 B.2) and JPEG-LS (SOF55, ISO 14495-1 C.2).

    Walks all marker segments up to the first scan, because GDCM aborts the process where one of them is broken.
    """
    jfif, adobe, frame = False, None, b""
    for marker, body in _segments(data):
        if marker == 0xE0 and body[:4] == b"JFIF":
            jfif = True
        elif marker == 0xEE and body[:5] == b"Adobe" and len(body) >= 12:
            adobe = body[11]
        elif (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)) or marker == 0xF7:
            if frame or len(body) < 6 or len(body) != 6 + 3 * body[5]:
                raise UndecodableError("the JPEG frame header is broken")
            frame = bytes((marker,)) + body
    if not frame:
        raise UndecodableError("the JPEG codestream has no frame header")
    precision, rows, columns, components = struct.unpack_from(">BHHB", frame, 1)
    named_rgb = frame[7::3] in (b"RGB", b"rgb")
    says_rgb = False if jfif else (adobe == 0 if adobe is not None else (True if named_rgb else None))
    return Codestream(rows, columns, components, precision, False, says_rgb)


def _segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(marker, content) of each marker segment before the first start of scan."""
    at = 2
    while data[:2] == b"\xff\xd8" and at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        length = struct.unpack_from(">H", data, at + 2)[0]
        if marker == 0xDA:
            return
        if marker < 0xC0 or length < 2:
            break
        yield marker, data[at + 4 : at + 2 + length]
        at += 2 + length
    raise UndecodableError("the frame is not a JPEG codestream")


def j2k_info(data: bytes) -> Codestream:
    """The SIZ segment (ISO 15444-1 A.5.1), also inside a JP2 file."""
    at = data.find(b"\xff\x4f\xff\x51", 0, 65536)
    if at < 0 or len(data) < at + 43:
        raise UndecodableError("the frame is not a JPEG 2000 codestream")
    x1, y1, x0, y0 = struct.unpack_from(">4L", data, at + 8)
    components, depth = struct.unpack_from(">HB", data, at + 40)
    return Codestream(y1 - y0, x1 - x0, components, (depth & 0x7F) + 1, bool(depth & 0x80), None)


def _check(info: Codestream, image: ImagePixel) -> None:
    if (info.rows, info.columns, info.components) != (image.rows, image.columns, image.samples):
        raise UndecodableError("the size of the codestream is not that of the attributes")
    if info.precision > image.bits_allocated:
        raise UndecodableError("the codestream is deeper than Bits Allocated")


def _shape(data: bytes | bytearray, dtype: str, image: ImagePixel, planar: bool = False) -> Samples:
    if len(data) < image.rows * image.columns * image.samples * np.dtype(dtype).itemsize:
        raise UndecodableError("the decoder returned too few samples")
    flat = np.frombuffer(data, dtype=dtype, count=image.rows * image.columns * image.samples)
    if image.samples == 1:
        return flat.reshape(image.rows, image.columns)
    if planar:
        return flat.reshape(image.samples, image.rows, image.columns).transpose(1, 2, 0)
    return flat.reshape(image.rows, image.columns, image.samples)


def _container(precision: int) -> str:
    return "u1" if precision <= 8 else "<u2" if precision <= 16 else "<u4"


def jpeg(data: bytes, image: ImagePixel) -> Decoded:
    """Baseline and extended. libjpeg itself turns YCbCr into RGB: three times as fast as doing it afterwards."""
    info = jpeg_info(data)
    _check(info, image)
    if info.precision != 8:
        return jpeg_lossless(data, image, syntax=uid.JPEGExtended12Bit)
    untransformed = info.says_rgb is None and image.photometric == "RGB"
    samples = None if untransformed else _sound_jpeg(data, image)
    if samples is None:
        samples = _any_jpeg(data, untransformed)
    if samples.shape != ((image.rows, image.columns) if image.samples == 1 else (image.rows, image.columns, 3)):
        raise UndecodableError("the decoder returned another shape")
    return Decoded(samples, image.photometric if image.samples == 1 else "RGB")


def _sound_jpeg(data: bytes, image: ImagePixel) -> Samples | None:
    """libjpeg-turbo without Pillow's copies: the same samples in two thirds of the time. None = it had a remark."""
    from simplejpeg import decode_jpeg

    try:
        samples: Samples = decode_jpeg(data, "GRAY" if image.samples == 1 else "RGB", strict=True)
    except ValueError:
        return None
    return samples[..., 0] if image.samples == 1 else samples


def _any_jpeg(data: bytes, untransformed: bool) -> Samples:
    """Pillow, which says what of a damaged codestream is still a picture, and can leave the colours as stored."""
    from PIL import Image

    try:
        picture = Image.open(io.BytesIO(data), formats=("JPEG",))
        if untransformed:
            picture.draft("YCbCr", picture.size)  # the output of this mode is what was stored
        return np.asarray(picture)
    except Image.DecompressionBombError:
        raise UndecodableError("one frame is larger than this node decodes") from None


def jpeg_lossless(data: bytes, image: ImagePixel, syntax: str = uid.JPEGLosslessSV1) -> Decoded:
    """Processes 14 and 4 (12 bit): GDCM, the one permissively licensed decoder on PyPI."""
    info = jpeg_info(data)
    _check(info, image)
    import gdcm

    for off in (gdcm.Trace.DebugOff, gdcm.Trace.WarningOff, gdcm.Trace.ErrorOff):
        off()  # its messages go to the terminal and name nothing that helps
    fragment = gdcm.Fragment()
    fragment.SetByteStringValue(data)
    fragments = gdcm.SequenceOfFragments.New()
    fragments.AddFragment(fragment)
    element = gdcm.DataElement(gdcm.Tag(0x7FE0, 0x0010))
    element.SetValue(fragments.__ref__())
    picture = gdcm.Image()
    picture.SetNumberOfDimensions(2)
    picture.SetDimensions((image.columns, image.rows, 1))
    picture.SetDataElement(element)
    picture.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(str(syntax))))
    kind = gdcm.PhotometricInterpretation.GetPIType("RGB" if image.samples == 3 else "MONOCHROME2")
    picture.SetPhotometricInterpretation(gdcm.PhotometricInterpretation(kind))
    if image.samples == 3:
        picture.SetPlanarConfiguration(0)
    depth = (image.samples, image.bits_allocated, image.bits_stored, image.bits_stored - 1, int(image.signed))
    picture.SetPixelFormat(gdcm.PixelFormat(*depth))
    buffer = picture.GetBuffer()
    if buffer is None:
        raise UndecodableError("the JPEG codestream is broken")
    # The binding hands the bytes over as text with surrogates.
    raw = buffer.encode("utf-8", "surrogateescape")
    return Decoded(_shape(raw, f"<u{image.bits_allocated // 8}", image), _says(info, image))


def _says(info: Codestream, image: ImagePixel) -> str:
    if image.samples == 3 and info.says_rgb is not None:
        return "RGB" if info.says_rgb else "YBR_FULL"
    return image.photometric


def jpeg_ls(data: bytes, image: ImagePixel) -> Decoded:
    """CharLS. JPEG-LS cannot state a sign; the caller extends it from Bits Stored."""
    info = jpeg_info(data)
    _check(info, image)
    import jpeg_ls as charls

    raw, header = charls.decode_buffer(data)
    planar = image.samples > 1 and header["interleave_mode"] == 0
    return Decoded(_shape(raw, _container(info.precision), image, planar), _says(info, image))


def jpeg_2000(data: bytes, image: ImagePixel) -> Decoded:
    """OpenJPEG, also HTJ2K. It inverts the component transform, so RCT and ICT come out as RGB (PS3.5 8.2.4)."""
    info = j2k_info(data)
    _check(info, image)
    from openjpeg.utils import decode_pixel_data

    raw = cast(bytearray, decode_pixel_data(data, version=2))
    samples = _shape(raw, _container(info.precision), image)
    if info.signed and image.signed and info.precision < 8 * samples.dtype.itemsize:
        return Decoded(samples.view(samples.dtype.str.replace("u", "i")), image.photometric)
    return Decoded(samples, "RGB" if image.photometric in ("YBR_ICT", "YBR_RCT") else image.photometric)


def rle(data: bytes, image: ImagePixel) -> Decoded:
    """PS3.5 annex G: always one plane per sample."""
    from rle.utils import decode_pixel_data

    if len(data) < 64 or struct.unpack_from("<L", data)[0] != image.samples * image.bits_allocated // 8:
        raise UndecodableError("the RLE header does not fit the attributes")
    try:
        raw = decode_pixel_data(
            data, version=2, rows=image.rows, columns=image.columns, bits_allocated=image.bits_allocated
        )
    except BaseException as panic:  # a Rust panic comes as a BaseException (pyo3) and would end the worker
        if type(panic).__module__ != "pyo3_runtime":
            raise
        raise UndecodableError("the RLE segments are broken") from None
    return Decoded(
        _shape(cast(bytearray, raw), f"<u{image.bits_allocated // 8}", image, planar=True), image.photometric
    )


class Codec(NamedTuple):
    """Which distribution decodes a transfer syntax, through which module."""

    distribution: str
    module: str
    decode: Callable[[bytes, ImagePixel], Decoded]


_TURBO = Codec("simplejpeg", "simplejpeg", jpeg)
_PILLOW = Codec("pillow", "PIL", jpeg)
_GDCM = Codec("python-gdcm", "gdcm", jpeg_lossless)
_CHARLS = Codec("pyjpegls", "jpeg_ls", jpeg_ls)
_OPENJPEG = Codec("pylibjpeg-openjpeg", "openjpeg", jpeg_2000)
_RLE = Codec("pylibjpeg-rle", "rle", rle)

CODECS: dict[str, Codec] = {
    uid.JPEGBaseline8Bit: _TURBO,
    uid.JPEGExtended12Bit: _PILLOW,
    uid.JPEGLossless: _GDCM,
    uid.JPEGLosslessSV1: _GDCM,
    uid.JPEGLSLossless: _CHARLS,
    uid.JPEGLSNearLossless: _CHARLS,
    uid.JPEG2000Lossless: _OPENJPEG,
    uid.JPEG2000: _OPENJPEG,
    uid.HTJ2KLossless: _OPENJPEG,
    uid.HTJ2KLosslessRPCL: _OPENJPEG,
    uid.HTJ2K: _OPENJPEG,
    uid.RLELossless: _RLE,
}


def installed() -> dict[str, str]:
    """Transfer syntax UID → "distribution version", for the codecs that are installed. Imports none of them."""
    return {
        syntax: f"{codec.distribution} {importlib.metadata.version(codec.distribution)}"
        for syntax, codec in CODECS.items()
        if importlib.util.find_spec(codec.module) is not None
    }
