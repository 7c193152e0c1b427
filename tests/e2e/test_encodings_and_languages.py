"""Routing through the network: each task as vendors send it, in three languages, without Body Part Examined."""

from __future__ import annotations

import io
import itertools
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydicom
import pytest
import sqlalchemy as sa
import vendors
from e2e_node import peer, wait_for
from pydicom.dataset import Dataset

from dicom_node.store import inspect
from dicom_node.store.ledger import open_read_only
from dicom_node.store.schema import instance
from engines.training.__main__ import main as training

WORDS = {
    "renal_ceus": ("CEUS kidney, renal mass", "CEUS Niere, Nierentumor", "肾脏超声造影 肾肿瘤"),
    "thyroid_cine": ("US thyroid, calcified nodule", "Sono Schilddrüse, verkalkter Knoten", "甲状腺超声 结节伴钙化"),
    "liver_dce": ("MRI liver dynamic, HCC", "MRT Leber dyn., hepatozelluläres Karzinom", "肝脏动态增强 肝癌"),
    "testis_tumour": ("US scrotum, testicular mass", "Sono Hoden, V.a. Hodentumor", "阴囊超声 睾丸肿瘤"),
    "testis_noa": ("US scrotum, infertility", "Sono Hoden, Infertilität", "睾丸超声 不育"),
}
"""English, German, Chinese."""
CHARSETS = ("ISO_IR 100", "ISO_IR 192", "GB18030", "ISO 2022 IR 58", "absent")
PLACE = "Z" * 60


def raw(text: str, charset: str) -> bytes:
    """The bytes a device writes; with IR 58 every run of Chinese begins with the escape sequence."""
    if charset == "ISO 2022 IR 58":
        runs = ("".join(run) for _, run in itertools.groupby(text, str.isascii))
        return b"".join(run.encode() if run.isascii() else b"\x1b$)A" + run.encode("gb2312") for run in runs)
    codec = {"ISO_IR 100": "latin-1", "ISO_IR 192": "utf-8", "GB18030": "gb18030", "absent": "gb18030"}
    return text.encode(codec[charset])


def described(path: Path, text: str, charset: str, study_uid: str, number: int) -> None:
    """The same file as a study of its own with this description, byte for byte as that character set has it."""
    ds = pydicom.dcmread(path)
    for keyword in ("BodyPartExamined", "SpecificCharacterSet", "RequestedProcedureDescription", "ProtocolName"):
        if keyword in ds:
            del ds[keyword]
    silence(ds)
    if charset != "absent":
        ds.SpecificCharacterSet = ["", charset] if "2022" in charset else charset
    ds.StudyInstanceUID, ds.StudyDescription, ds.SeriesDescription = study_uid, PLACE, "1"
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f"{study_uid}.{number}"
    ds.save_as(path)
    data = path.read_bytes()
    assert data.count(PLACE.encode()) == 1
    path.write_bytes(data.replace(PLACE.encode(), raw(text, charset).ljust(len(PLACE))))


def silence(ds: Dataset) -> None:
    """Nothing but the description names the organ."""
    for keyword in ("AnatomicRegionSequence", "ProcedureCodeSequence", "PerformedProcedureStepDescription"):
        if keyword in ds:
            del ds[keyword]
    if ds.Modality == "US":
        ds.ImageType = ["ORIGINAL", "PRIMARY", "", "0001"]


def cases(task: str) -> Iterator[tuple[str, str, str]]:
    """(form, description, character set): every form in every language, and every way to write each language."""
    english, german, chinese = WORDS[task]
    latin = itertools.cycle(("ISO_IR 100", "ISO_IR 192"))
    umlauts = itertools.cycle(("ISO_IR 192", "ISO_IR 100"))
    han = itertools.cycle(("GB18030", "ISO 2022 IR 58", "absent", "ISO_IR 192"))
    for form in forms_of(task):
        yield from ((form, english, next(latin)), (form, german, next(umlauts)), (form, chinese, next(han)))


def forms_of(task: str) -> tuple[str, ...]:
    """How scanners tell the phases apart; for ultrasound it is the pixels."""
    return vendors.LIVER if task == "liver_dce" else vendors.ULTRASOUND


def made_in(task: str, form: str, folder: Path) -> list[bytes]:
    """A phantom study's first files."""
    if form in vendors.RULES:
        images = vendors.liver(vendors.exam(77, 1), form)[:12]
    else:
        own = form in ("jpeg", "raw", "rle") or task == "liver_dce"
        command = ["phantom", task, "--seed", "77", "--label", "1", "--encoding", form if own else "raw"]
        assert training([*command, "--out", str(folder)]) == 0
        found = [pydicom.dcmread(p) for p in sorted(folder.rglob("*.dcm"))][:12]
        images = found if own else [vendors.ultrasound(ds, form) if ds.Modality == "US" else ds for ds in found]
    return [bytes_of(ds) for ds in images]


def bytes_of(ds: Dataset) -> bytes:
    file = io.BytesIO()
    ds.save_as(file, enforce_file_format=True)
    return file.getvalue()


PROPOSED = {
    "-xy": {"1.2.840.10008.1.2.4.50"},
    "-xr": {"1.2.840.10008.1.2.5"},
    "-xv": {"1.2.840.10008.1.2.4.90"},
    "-xb": {"1.2.840.10008.1.2.2"},
    "-xe": {"1.2.840.10008.1.2.1", "1.2.840.10008.1.2"},
}
"""storescu's proposals: with each the encoding in a presentation context of its own."""


def send(port: int, folder: Path) -> set[str]:
    """An association for each encoding, every file proposed as it is encoded. The transfer syntaxes."""
    syntax = {p: str(pydicom.filereader.read_file_meta_info(p).TransferSyntaxUID) for p in sorted(folder.iterdir())}
    for flag, syntaxes in PROPOSED.items():
        files = [p for p, own in syntax.items() if own in syntaxes]
        if files:
            command = [peer("storescu"), "-R", flag, "-aet", "MODALITY", "-aec", "DICOM_NODE", "127.0.0.1", str(port)]
            done = subprocess.run(
                [*command, *map(str, files)],
                capture_output=True, text=True, timeout=120, env=os.environ | {"TCP_NODELAY": "1"},
            )  # fmt: skip
            assert done.returncode == 0, done.stderr[-2000:]
    return set(syntax.values())


def stored_as(root: Path, uid: str) -> set[str]:
    """The transfer syntaxes in which the node holds a study."""
    with open_read_only(root).connect() as tx:
        query = sa.select(instance.c.transfer_syntax_uid).where(instance.c.study_uid == uid)
        return set(tx.execute(query).scalars())


def routed(root: Path, uids: list[str]) -> dict[str, tuple[list[str], bool]]:
    """Study to the routes that run and whether its text was guessed; {} until all are judged."""
    with open_read_only(root).connect() as tx:
        found = {uid: inspect.explain(tx, uid) or {"evidence": [], "events": []} for uid in uids}
    if not all(answer["evidence"] for answer in found.values()):
        return {}
    return {
        uid: (
            [v["route"] for v in a["evidence"] if v["runs"]],
            any(e["code"] == "CHARSET_GUESSED" for e in a["events"]),
        )
        for uid, a in found.items()
    }


@pytest.mark.timeout(300)
@pytest.mark.long
@pytest.mark.parametrize("task", sorted(WORDS))
def test_every_encoding_and_language_gives_the_right_route(task: str, make_node: Any, tmp_path: Path) -> None:
    """All routes are live; exactly the task's own takes the study, and no other number is asked for."""
    node = make_node(infer={"timeout_seconds": 1}, store={"fallback_charset": "GB18030"})
    for route in node.settings["routes"]:
        route["mode"] = "shadow"
        route["assemble"] = {"quiet_seconds": 3000}  # the route is what is asked for; no need to run the engine
    node.write_config()
    node.start()
    own = next(r["name"] for r in node.settings["routes"] if r["engine"] == task)
    sent, encoded = {}, {}
    made: dict[str, list[bytes]] = {}
    for number, (form, text, charset) in enumerate(cases(task)):
        if form not in made:
            folder = tmp_path / "made" / form
            made[form] = made_in(task, form, folder)
        folder, uid = tmp_path / "sent" / str(number), f"1.2.826.0.1.3680043.10.1.{number + 1}"
        folder.mkdir(parents=True)
        for index, data in enumerate(made[form]):
            path = folder / f"{index}.dcm"
            path.write_bytes(data)
            described(path, text, charset, uid, index + 1)
        encoded[uid] = send(node.port, folder)
        sent[uid] = (form, text, charset)
    for uid, (runs, guessed) in wait_for(lambda: routed(node.root, list(sent)), 90, every=0.5).items():
        assert runs == [own], sent[uid]
        assert guessed == (sent[uid][2] == "absent"), sent[uid]
        assert stored_as(node.root, uid) == encoded[uid], sent[uid]
    assert node.stop() == 0


SR = "1.2.840.10008.5.1.4.1.1.88.34"


def parameters(report: pydicom.Dataset) -> str:
    """Every Algorithm Parameters (111002, DCM) of the tree."""
    found: list[str] = []

    def look(item: Any) -> None:
        for child in item.get("ContentSequence", []):
            names = child.get("ConceptNameCodeSequence")
            if names and names[0].CodeValue == "111002":
                found.append(str(child.TextValue))
            look(child)

    look(report)
    return "\n".join(found)


@pytest.mark.timeout(300)
@pytest.mark.long
def test_each_vendors_liver_goes_through_the_engine_and_the_report_names_the_rule(
    make_node: Any, pacs: Any, tmp_path: Path
) -> None:
    """One patient, five scanners, one answer: the phases are the same, however they were told apart."""
    node = make_node(pacs.port, assemble={"quiet_seconds": 5})  # images and region come one after the other
    node.settings["routes"] = [r for r in node.settings["routes"] if r["engine"] == "liver_dce"]
    node.write_config()
    node.start()
    made, sent = vendors.exam(870_002, 1), {}
    for form in ("temporal", *vendors.RULES):
        images = vendors.liver(made, form)
        folder = tmp_path / form
        folder.mkdir()
        for number, ds in enumerate([*images, vendors.outline(made, images)]):
            (folder / f"{number}.dcm").write_bytes(bytes_of(ds))
        sent[str(images[0].StudyInstanceUID)] = form
        send(node.port, folder)
    answers = {form: node.wait_state(uid, "DONE", seconds=120) for uid, form in sent.items()}
    assert node.stop() == 0
    for form, answer in answers.items():
        (outcome,) = answer["outcomes"]
        assert outcome["outcome"] == "RESULT", (form, outcome)
    reports = {sent[str(o.StudyInstanceUID)]: o for o in pacs.objects() if o.SOPClassUID == SR}
    assert set(reports) == set(answers)
    for form, rule in vendors.RULES.items():
        said = parameters(reports[form])
        assert f"phase encoding: {rule}" in said, said
        assert "phases: pre, arterial, portal venous, delayed" in said
    probabilities = {form: probability(report) for form, report in reports.items()}
    assert max(probabilities.values()) - min(probabilities.values()) <= 1e-3, probabilities


@pytest.mark.timeout(300)
@pytest.mark.long
def test_each_encoding_of_a_still_goes_through_the_engine_to_the_same_number(
    make_node: Any, pacs: Any, tmp_path: Path
) -> None:
    """Without loss the same number; YBR_FULL is within the rounding of its colours, JPEG within its loss."""
    node = make_node(pacs.port, assemble={"quiet_seconds": 5})  # images and region come one after the other
    node.settings["routes"] = [r for r in node.settings["routes"] if r["engine"] == "testis_tumour"]
    node.write_config()
    node.start()
    sent = {}
    for form in vendors.ULTRASOUND:
        own = form in ("jpeg", "raw", "rle")
        folder, command = tmp_path / form, ["phantom", "testis_tumour", "--seed", "870016", "--label", "1", "--roi"]
        assert training([*command, "--encoding", form if own else "raw", "--out", str(folder)]) == 0
        for path in folder.glob("*.dcm"):
            ds = pydicom.dcmread(path)
            if ds.Modality == "US":
                sent[str(ds.StudyInstanceUID)] = form
                path.write_bytes(bytes_of(ds if own else vendors.ultrasound(ds, form)))
        send(node.port, folder)
    answers = {form: node.wait_state(uid, "DONE", seconds=120) for uid, form in sent.items()}
    assert node.stop() == 0
    assert {a["outcomes"][0]["outcome"] for a in answers.values()} == {"RESULT"}
    found = {sent[str(o.StudyInstanceUID)]: probability(o) for o in pacs.objects() if o.SOPClassUID == SR}
    assert found["raw"] == found["rle"] == found["palette"] == found["j2k"], found
    assert found["ybr"] == pytest.approx(found["raw"], abs=0.01), found
    assert found["jpeg"] == pytest.approx(found["raw"], abs=0.02), found


def probability(report: pydicom.Dataset) -> float:
    """The task's outcome: the first number whose name is a probability."""
    stack = [report]
    while stack:
        item = stack.pop(0)
        if item.get("ValueType") == "NUM" and item.ConceptNameCodeSequence[0].CodeValue.startswith("PROB-"):
            return float(item.MeasuredValueSequence[0].NumericValue)
        stack += item.get("ContentSequence", [])
    raise AssertionError("no probability")
