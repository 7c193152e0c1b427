"""Routing through the network: each task as vendors send it, in three languages, without Body Part Examined."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydicom
import pytest
from e2e_node import peer, wait_for
from pydicom.dataset import Dataset

from dicom_node.store import inspect
from dicom_node.store.ledger import open_read_only
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
FORMS = {"liver_dce": ("series", "times", "temporal", "acquisition")}
"""How scanners tell the phases apart; for ultrasound it is the pixels: JPEG, raw, RLE."""
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
    """(form, description, character set): every language, three forms and more, every way to write Chinese."""
    english, german, chinese = WORDS[task]
    forms = itertools.cycle(FORMS.get(task, ("jpeg", "raw", "rle")))
    for text, charset in (
        *((english, "ISO_IR 100"), (german, "ISO_IR 100"), (chinese, "GB18030")),
        *((english, "ISO_IR 192"), (german, "ISO_IR 192"), (chinese, "ISO 2022 IR 58")),
        *((chinese, "absent"), (chinese, "ISO_IR 192")),
    ):
        yield next(forms), text, charset


def send(port: int, folder: Path) -> None:
    """One association, every file proposed as it is encoded."""
    for flag, syntaxes in (
        ("-xy", {"1.2.840.10008.1.2.4.50"}),
        ("-xr", {"1.2.840.10008.1.2.5"}),
        ("-xe", {"1.2.840.10008.1.2.1", "1.2.840.10008.1.2", "1.2.840.10008.1.2.2"}),
    ):
        files = [
            p
            for p in sorted(folder.iterdir())
            if pydicom.filereader.read_file_meta_info(p).TransferSyntaxUID in syntaxes
        ]
        if files:
            command = [peer("storescu"), "-R", flag, "-aet", "MODALITY", "-aec", "DICOM_NODE", "127.0.0.1", str(port)]
            done = subprocess.run([*command, *map(str, files)], capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, done.stderr[-2000:]


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
    sent = {}
    made: dict[str, list[bytes]] = {}
    for number, (form, text, charset) in enumerate(cases(task)):
        if form not in made:
            folder = tmp_path / "made" / form
            assert (
                training(["phantom", task, "--seed", "77", "--label", "1", "--encoding", form, "--out", str(folder)])
                == 0
            )
            made[form] = [p.read_bytes() for p in sorted(folder.rglob("*.dcm"))][:12]
        folder, uid = tmp_path / "sent" / str(number), f"1.2.826.0.1.3680043.10.1.{number + 1}"
        folder.mkdir(parents=True)
        for index, data in enumerate(made[form]):
            path = folder / f"{index}.dcm"
            path.write_bytes(data)
            described(path, text, charset, uid, index + 1)
        send(node.port, folder)
        sent[uid] = (form, text, charset)
    for uid, (runs, guessed) in wait_for(lambda: routed(node.root, list(sent)), 60).items():
        assert runs == [own], sent[uid]
        assert guessed == (sent[uid][2] == "absent"), sent[uid]
    assert node.stop() == 0
