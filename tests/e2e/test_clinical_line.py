"""FSH, testicular volume and velocity from outside DICOM, through the network, to the nomogram and back to the PACS."""

from __future__ import annotations

import ipaddress
import json
from pathlib import Path
from typing import Any

import fhir_server
import jsonschema
import pydicom
import pytest
from certificates import Authority
from e2e_node import REPOSITORY, Node, storescu, wait_for
from fhir_server import EDV, FSH, LEFT, RIGHT, SYSTEM, TESTIS, VOLUME, FhirServer, observation, patient, send
from notes import rejection_note
from pydicom.uid import generate_uid

from engines.testis_noa import dicom, phantom

SR = "1.2.840.10008.5.1.4.1.1.88.34"
SIDES = {"R": RIGHT, "L": LEFT}


def study(folder: Path, seed: int = 930_001, **labels: Any) -> tuple[list[Path], Any, pydicom.Dataset]:
    """A phantom without a laboratory report: its files, the patient, and a header."""
    made = phantom.make(seed, 1)
    settings = dicom.Labels(values=labels.pop("values", ()), uid_seed=seed, patient_id="PID1", **labels)
    paths = dicom.write(made, folder, labels=settings, roi=True)
    return paths, made, pydicom.dcmread(paths[0], stop_before_pixels=True)


def values_of(made: Any) -> list[tuple[tuple[str, str], float, str, str]]:
    """Code, value, UCUM unit, side."""
    found = [(FSH, made.fsh, "[IU]/L", "")]
    for still in made.stills:
        found += [(VOLUME, still.volume_ml, "mL", still.side), (EDV, still.edv_cm_s / 100, "m/s", still.side)]
    return found


def observations(made: Any, time: str) -> list[dict[str, Any]]:
    return [
        observation(code, value, unit, time=time, site=(TESTIS, SIDES[side]) if side else ())
        for code, value, unit, side in values_of(made)
    ]


def sidecar(made: Any, header: pydicom.Dataset, time: str, only: str = "") -> dict[str, Any]:
    schemes = {fhir_server.LOINC: "LN", fhir_server.SCT: "SCT"}
    values = []
    for (system, code), value, unit, side in values_of(made):
        entry = {"code": {"value": code, "scheme": schemes[system]}, "value": value, "unit": unit, "time": time}
        if side:
            entry |= {"laterality": side, "site": {"value": TESTIS[1], "scheme": "SCT"}}
        values += [entry | {"source": "LIS"}] if not only or code == only else []
    return {"schema": 1, "study_instance_uid": str(header.StudyInstanceUID), "patient_id": "PID1", "values": values}


def noa_node(make_node: Any, port: int, **clinical: Any) -> Node:
    node = make_node(port)
    node.settings["routes"] = [r for r in node.settings["routes"] if r["engine"] == "testis_noa"]
    node.settings["clinical"] = {"wait_seconds": 60} | clinical
    node.write_config()
    return node


def fhir_section(server: FhirServer, **more: Any) -> dict[str, Any]:
    return {"base_url": server.url, "identifier_systems": {"": SYSTEM, "LAB": SYSTEM}} | more


def texts(report: pydicom.Dataset) -> str:
    """Every text of the tree."""
    found: list[str] = []

    def walk(item: Any) -> None:
        for child in item.get("ContentSequence", []):
            found.append(str(child.get("TextValue", "")))
            walk(child)

    walk(report)
    return "\n".join(found)


def inputs(report: pydicom.Dataset) -> dict[str, tuple[str, str, str, str]]:
    """Clinical value groups of the SR: tracking identifier to value, unit, time, comment."""
    found = {}
    for group in report.ContentSequence[-1].ContentSequence:
        said = {i.ConceptNameCodeSequence[0].CodeValue: i for i in group.ContentSequence}
        name = str(said["112039"].TextValue)
        numbers = [i for i in group.ContentSequence if i.ValueType == "NUM"]
        if name.startswith("Clinical value "):
            measured = numbers[0].MeasuredValueSequence[0]
            found[name.removeprefix("Clinical value ")] = (
                str(measured.NumericValue),
                str(measured.MeasurementUnitsCodeSequence[0].CodeValue),
                str(numbers[0].get("ObservationDateTime", "")),
                "\n".join(str(i.TextValue) for i in group.ContentSequence if i.ValueType == "TEXT"),
            )
    return found


def run(node: Node, pacs: Any, paths: list[Path], header: pydicom.Dataset) -> tuple[dict[str, Any], pydicom.Dataset]:
    assert storescu(node.port, *paths) == 0
    answer = node.wait_state(str(header.StudyInstanceUID), "DONE", seconds=90)
    schema = json.loads((REPOSITORY / "docs/schemas/explain.v1.schema.json").read_text())
    jsonschema.validate(answer, schema)
    (report,) = [o for o in pacs.objects() if o.SOPClassUID == SR]
    return answer, report


def day_of(header: pydicom.Dataset) -> str:
    date = str(header.StudyDate)
    return f"{date[:4]}-{date[4:6]}-{date[6:]}"


@pytest.mark.parametrize("where", ["fhir", "sidecar"])
def test_values_from_outside_reach_the_nomogram_with_their_source(
    where: str, make_node: Any, pacs: Any, tmp_path: Path
) -> None:
    paths, made, header = study(tmp_path / "sent")
    hospital = Authority(tmp_path)
    tls = hospital.issue("server", "fhir", addresses=[ipaddress.ip_address("127.0.0.1")])
    token = tmp_path / "token"
    token.write_text("s3cret\n")
    token.chmod(0o600)
    folder = tmp_path / "sidecars"
    folder.mkdir()
    time = f"{day_of(header)}T08:30:00+02:00"
    born = str(header.PatientBirthDate)
    person = patient(birthDate=f"{born[:4]}-{born[4:6]}-{born[6:]}" if born else "1990-01-01")
    with FhirServer(person, tls=tls) as server:
        server.token = "s3cret"  # noqa: S105
        if where == "fhir":
            server.resources += observations(made, time)
        else:
            (folder / "export.json").write_text(json.dumps(sidecar(made, header, time)))
        section = fhir_section(server, token_file=str(token), ca=str(hospital.pem))
        node = noa_node(make_node, pacs.port, fhir=section, sidecar=str(folder))
        said = json.loads(node.cli("check", "--json", check=False).stdout)["findings"]
        assert [f["level"] for f in said if f["about"].startswith("clinical")] == ["ok", "ok"]
        node.start()
        answer, report = run(node, pacs, paths, header)
        assert node.stop() == 0
        log = node.log.read_text()
    assert "PID1" not in log and "s3cret" not in log
    source = {"fhir": "FHIR", "sidecar": "sidecar (LIS)"}[where]
    stamp = f"{header.StudyDate}083000+0200"
    (outcome,) = answer["outcomes"]
    used = {f"{c['name']} {c['laterality']}".strip(): c for c in outcome["clinical"]["used"]}
    assert set(used) == {"FSH", "EDV R", "EDV L", "TESTICULAR_VOLUME R", "TESTICULAR_VOLUME L"}
    assert all((c["source"], c["time"]) == (source, time) for c in used.values())
    assert used["EDV R"]["value"] == pytest.approx(made.stills[0].edv_cm_s) and used["EDV R"]["unit"] == "cm/s"
    assert f"{source}" in node.cli("explain", str(header.StudyInstanceUID)).stdout
    text = texts(report)
    assert f"clinical input FSH: {made.fsh:g} [IU]/L, of {time}, source {source}" in text
    assert "fusion not computed" not in text
    for name, (_, unit, when, comment) in inputs(report).items():
        assert (unit, when) == (used[name]["unit"], stamp) and f"Source: {source}" in comment
    captures = [o for o in pacs.objects() if "NOMOGRAM" in str(o.get("ImageType", ""))]
    assert captures, "the nomogram is drawn"


def test_a_required_value_that_comes_late_and_a_rejected_image_in_one_study(
    make_node: Any, pacs: Any, tmp_path: Path
) -> None:
    """The route requires FSH: the study waits for it, then goes on, without the image that was rejected."""
    paths, made, header = study(tmp_path / "sent")
    bad = pydicom.dcmread(paths[0])
    bad.SOPInstanceUID = bad.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    bad.InstanceNumber = 99
    bad.save_as(tmp_path / "bad.dcm")
    rejection_note(tmp_path / "note.dcm", [bad])
    uid = str(header.StudyInstanceUID)
    born = str(header.PatientBirthDate)
    person = patient(birthDate=f"{born[:4]}-{born[4:6]}-{born[6:]}" if born else "1990-01-01")
    with FhirServer(person, *observations(made, f"{day_of(header)}T08:30:00+02:00")) as server:
        server.answer = lambda handler: send(handler, {"resourceType": "OperationOutcome"}, 503)
        node = noa_node(make_node, pacs.port, fhir=fhir_section(server), wait_seconds=600)
        node.settings["routes"][0] |= {"require": {"clinical": ["FSH"]}, "if_incomplete": "hold"}
        node.write_config()
        node.start()
        assert storescu(node.port, *paths, tmp_path / "bad.dcm", tmp_path / "note.dcm") == 0

        def waits() -> bool:
            return server.asked != [] and "CLINICAL_WAITING" in [o["code"] for o in node.explain(uid)["outcomes"]]

        wait_for(waits, 60, every=0.5)
        assert "CLINICAL_WAITING" in node.cli("explain", uid).stdout and pacs.objects() == []
        server.answer = lambda _handler: False
        answer = node.wait_state(uid, "DONE", seconds=90)
        assert node.stop() == 0
    schema = json.loads((REPOSITORY / "docs/schemas/explain.v1.schema.json").read_text())
    jsonschema.validate(answer, schema)
    codes = [e["code"] for e in answer["events"]]
    assert {"IMAGES_REJECTED", "CLINICAL_WAITING", "CLINICAL_GATHERED"} <= set(codes)
    (outcome,) = answer["outcomes"]
    assert outcome["outcome"] == "RESULT"
    assert {c["name"] for c in outcome["clinical"]["used"]} >= {"FSH"}
    (report,) = [o for o in pacs.objects() if o.SOPClassUID == SR]
    assert "source FHIR" in texts(report) and "fusion not computed" not in texts(report)
    assert str(bad.SOPInstanceUID) not in str(report)


@pytest.mark.long
def test_sources_that_disagree_give_the_image_alone_and_say_so(make_node: Any, pacs: Any, tmp_path: Path) -> None:
    """FSH by report and by sidecar, of one day and different."""
    paths, made, header = study(tmp_path / "sent", values=("FSH", "TESTICULAR_VOLUME", "EDV"))
    folder = tmp_path / "sidecars"
    folder.mkdir()
    wrong = sidecar(made, header, day_of(header), only=FSH[1])
    wrong["values"][0]["value"] = made.fsh * 1.5
    (folder / "export.json").write_text(json.dumps(wrong))
    node = noa_node(make_node, pacs.port, sidecar=str(folder)).start()
    answer, report = run(node, pacs, paths, header)
    said = "CLINICAL_INPUT_CONFLICT(FSH): DICOM SR and sidecar disagree"
    assert said in answer["outcomes"][0]["clinical"]["not_used"] and said in texts(report)
    assert "fusion not computed: FSH missing" in texts(report)


@pytest.mark.long
def test_a_server_that_is_away_delays_to_the_bound_and_loses_nothing(make_node: Any, pacs: Any, tmp_path: Path) -> None:
    paths, _, header = study(tmp_path / "sent")
    with FhirServer(patient()) as server:
        section = fhir_section(server, timeout_seconds=1)
    node = noa_node(make_node, pacs.port, fhir=section, wait_seconds=4)
    checked = node.cli("check", "--json", check=False)
    said = [f["text"] for f in json.loads(checked.stdout)["findings"] if f["about"] == "clinical.fhir"]
    assert checked.returncode == 1 and said == ["CLINICAL_SOURCE_UNREACHABLE: no connection"]
    node.start()
    answer, report = run(node, pacs, paths, header)
    events = {e["code"]: e for e in answer["events"]}
    waited = events["CLINICAL_GATHERED"]["at"] - events["ASSEMBLED"]["at"]
    assert 4 <= waited < 12
    assert "CLINICAL_SOURCE_UNREACHABLE(FHIR): no connection" in texts(report)
    assert "fusion not computed" in texts(report) and answer["outcomes"][0]["outcome"] == "RESULT"
