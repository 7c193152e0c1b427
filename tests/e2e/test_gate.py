"""Completeness, identity and rejection through the network: Orthanc is the PACS that is asked, storescu sends."""

from __future__ import annotations

from pathlib import Path

import pydicom
import pytest
from e2e_node import make_phantom, storescu, study_uid, wait_for
from notes import rejection_note
from orthanc import orthanc
from pydicom.uid import generate_uid

from dicom_node.config import Query
from dicom_node.dimse.query import Finder


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_phantom(tmp_path_factory.mktemp("phantom"))


def events(answer: dict) -> list[str]:
    return [e["code"] for e in answer["events"]]


def test_a_rejection_note_lists_what_was_delivered_and_no_new_result_comes(make_node, pacs, phantom, tmp_path):
    node = make_node(pacs.port).start()
    uid = study_uid(phantom)
    assert storescu(node.port, phantom) == 0
    sent = {d["sop_instance_uid"] for d in node.wait_state(uid, "DONE")["deliveries"]}
    assert len(sent) == 2
    note = tmp_path / "note.dcm"
    rejection_note(note, [pydicom.dcmread(phantom)], "113037", "Rejected for Patient Safety Reasons")
    assert storescu(node.port, note) == 0

    def judged_again() -> bool:
        return node.explain(uid)["revision"] == 2 and node.explain(uid)["state"] == "DONE"

    wait_for(judged_again)
    answer = node.explain(uid)
    assert {w["sop_instance_uid"] for w in answer["withdrawals"]} == sent
    assert (answer["outcomes"][-1]["outcome"], answer["outcomes"][-1]["code"]) == ("REFUSED", "IMAGE_REJECTED")
    said = node.cli("explain", uid).stdout
    assert f"WITHDRAW from pacs: {min(sent)}" in said and "113037 Rejected for Patient Safety Reasons" in said


@pytest.mark.long
def test_orthanc_is_asked_how_many_there_are_and_whose_study_it_is(make_node, phantom, tmp_path):
    second = pydicom.dcmread(phantom)
    second.SOPInstanceUID = second.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    second.InstanceNumber = 99
    second.save_as(tmp_path / "second.dcm")
    uid = study_uid(phantom)
    with orthanc(tmp_path / "orthanc") as archive:
        for name, path in (("a", phantom), ("b", tmp_path / "second.dcm")):
            filed = pydicom.dcmread(path)
            filed.PatientID = "RECONCILED-7"
            filed.save_as(tmp_path / f"{name}.dcm")
            assert storescu(archive.port, tmp_path / f"{name}.dcm", called="ORTHANC") == 0
        query = {"ae_title": "ORTHANC", "host": "127.0.0.1", "port": archive.port, "attempts": 1, "retry_seconds": 1}
        node = make_node(archive.port, query=query)
        node.settings["deliver"]["destinations"]["pacs"] |= {"ae_title": "ORTHANC", "check_identity": True}
        node.settings["routes"][0] |= {"require": {"series_count": True}, "if_incomplete": "hold"}
        node.write_config()
        node.start()
        assert storescu(node.port, phantom) == 0
        held = node.wait_state(uid, "HELD")
        assert "2 instances in the PACS, 1 here" in held["outcomes"][-1]["detail"]
        assert storescu(node.port, tmp_path / "second.dcm") == 0
        wait_for(lambda: "DELIVERY_HELD" in events(node.explain(uid)), 60)
        answer = node.explain(uid)
        assert answer["state"] == "HELD" and {d["state"] for d in answer["deliveries"]} == {"HELD"}
        assert "another Patient ID" in answer["deliveries"][0]["reason"] and "RECONCILED-7" not in str(answer)
        finder = Finder(Query(**query), "TEST")
        assert len(finder.series_counts(uid)) == 1
        assert "held objects are sent" in node.cli("complete", uid).stdout
        node.wait_state(uid, "DONE")
        assert finder.series_counts(uid).keys() > {str(second.SeriesInstanceUID)}
        assert "RECONCILED-7" not in node.log.read_text()
