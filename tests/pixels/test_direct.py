"""Plain grey files are read without being parsed again, to the same pixels; everything else is parsed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import dce
import numpy as np
import pytest
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

from dicom_node.pixels.decode import PixelDecoder, PixelsUndecodableError, decode_file
from dicom_node.pixels.direct import locate
from dicom_node.pixels.framing import Limits
from dicom_node.study import Instance


def written(folder: Path, syntax: str, **values: object) -> Instance:
    """An enhanced instance of 80 frames of random bits."""
    d = dce.Dce(values=np.random.default_rng(4).integers(0, 65536, (4, 20, 12, 10)).astype(np.uint16))
    ds = d.enhanced(lambda ds, group, p, s: None)
    ds.file_meta.TransferSyntaxUID = syntax if syntax != "big" else ExplicitVRLittleEndian
    for key, value in values.items():
        setattr(ds, key, value)
    return dce.study(folder, dce.big_endian([ds]) if syntax == "big" else [ds]).instances[0]


def is_direct(instance: Instance) -> bool:
    with instance.path.open("rb") as file:
        return locate(file, instance.header, instance.transfer_syntax_uid, Limits()) is not None


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, "big"])
@pytest.mark.parametrize(("bits", "sign"), [(16, 0), (16, 1), (12, 0), (12, 1)])
def test_the_pixels_are_those_of_the_parsed_file(tmp_path: Path, syntax: str, bits: int, sign: int) -> None:
    instance = written(tmp_path, syntax, BitsStored=bits, HighBit=bits - 1, PixelRepresentation=sign)
    assert is_direct(instance)
    parsed = list(decode_file(instance.path, [80, 1, 17]))
    direct = list(PixelDecoder().frames(instance, (80, 1, 17)))
    assert [f.dtype for f in direct] == [f.dtype for f in parsed]
    assert np.array_equal(direct, parsed)


def test_a_file_that_goes_on_after_its_pixels_is_parsed(tmp_path: Path) -> None:
    instance = written(tmp_path, ExplicitVRLittleEndian, DataSetTrailingPadding=b"\0" * 64)
    assert not is_direct(instance)
    assert np.array_equal(list(PixelDecoder().frames(instance)), list(decode_file(instance.path)))


def test_headers_that_do_not_fit_the_file_are_not_believed(tmp_path: Path) -> None:
    instance = written(tmp_path, ExplicitVRLittleEndian)
    fewer = {**instance.header.values_, "NumberOfFrames": 79}
    other = dataclasses.replace(instance, header=type(instance.header)(fewer))
    assert not is_direct(other) and len(list(PixelDecoder().frames(other))) == 80
    wrong = dataclasses.replace(instance, transfer_syntax_uid=ImplicitVRLittleEndian)
    assert not is_direct(wrong) and len(list(PixelDecoder().frames(wrong))) == 80


def test_a_file_cut_short_is_undecodable_and_a_frame_too_many_is_refused(tmp_path: Path) -> None:
    instance = written(tmp_path, ExplicitVRLittleEndian)
    with pytest.raises(PixelsUndecodableError):
        next(PixelDecoder().frames(instance, (81,)))
    instance.path.write_bytes(instance.path.read_bytes()[:-100])
    with pytest.raises(PixelsUndecodableError):
        next(PixelDecoder().frames(instance))
