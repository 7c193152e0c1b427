"""The tables behind negotiation and the conformance statement."""

from __future__ import annotations

from pydicom.uid import UID

from dicom_node.dimse import contexts
from dicom_node.dimse.contexts import SOP_CLASSES, TRANSFER_SYNTAXES, accepted


def test_uids_are_unique_and_named_as_the_standard_names_them():
    assert len({c.uid for c in SOP_CLASSES}) == len(SOP_CLASSES)
    assert len({t.uid for t in TRANSFER_SYNTAXES}) == len(TRANSFER_SYNTAXES)
    for sop_class in SOP_CLASSES:
        official = UID(sop_class.uid).name
        assert official != sop_class.uid, f"{sop_class.name}: no such UID in PS3.6"
        assert sop_class.name.split(" (")[0].removesuffix(" Storage") in official
    assert all(UID(t.uid).is_transfer_syntax for t in TRANSFER_SYNTAXES)


def test_order_is_uncompressed_lossless_lossy():
    kinds = [t.kind for t in TRANSFER_SYNTAXES]
    assert kinds == sorted(kinds, key=("uncompressed", "lossless", "lossy").index)
    assert contexts.ALL[:2] == (contexts.EXPLICIT_VR_LITTLE_ENDIAN, contexts.IMPLICIT_VR_LITTLE_ENDIAN)


def test_nothing_that_inflates_or_that_nobody_here_decodes_is_offered():
    assert not any(
        UID(t.uid).is_deflated or "MPEG" in UID(t.uid).name or "JPIP" in UID(t.uid).name for t in TRANSFER_SYNTAXES
    )


def test_an_operators_class_is_added_once_and_never_routed():
    extra = accepted(["1.2.3", SOP_CLASSES[1].uid], availability=True)
    assert len(extra) == len(SOP_CLASSES) + 1
    assert (extra[-1].uid, extra[-1].use) == ("1.2.3", "stored")
