"""The log: joinable lines about studies, and no patient in any of them."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pydicom.valuerep import PersonName

from dicom_node.log import Log, load_secret, make_log, place_of, pseudonym, quiet_libraries
from dicom_node.result import RefusalCode

STUDY = "1.2.826.0.1.3680043.8.498.12714725698140337137334606354172323212"
PATIENT = ("Mustermann^Erika", "MRN-4711", "19640812", "ACC-0815", "Verdacht auf Nierentumor")


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def log(stream: io.StringIO) -> Log:
    return Log.open(level="debug", secret=b"secret", stream=stream)


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


@pytest.fixture
def restored_libraries() -> Iterator[None]:
    """`quiet_libraries` changes the process; a test must leave it as it found it."""
    names = ("pydicom", "pynetdicom", "highdicom")
    before = [(logging.getLogger(n), logging.getLogger(n).level, logging.getLogger(n).handlers[:]) for n in names]
    show, hook = warnings.showwarning, threading.excepthook
    yield
    warnings.showwarning, threading.excepthook = show, hook
    for logger, level, handlers in before:
        logger.setLevel(level)
        logger.handlers[:] = handlers
        logger.propagate = True


def test_a_line_is_one_json_object_with_its_bound_fields(log: Log, stream: io.StringIO) -> None:
    log.bind(association="a7").bind(job=3).info("study_assembled", study=log.uid(STUDY), seconds=0.5)
    (line,) = lines(stream)
    assert line.pop("at").endswith("Z")
    assert line == {
        "event": "study_assembled",
        "level": "info",
        "association": "a7",
        "job": 3,
        "study": pseudonym(b"secret", STUDY),
        "seconds": 0.5,
    }


def test_binding_leaves_the_first_log_as_it_was(log: Log, stream: io.StringIO) -> None:
    log.bind(job=1)
    log.info("x")
    assert "job" not in lines(stream)[0]


def test_lines_below_the_level_are_not_written(stream: io.StringIO) -> None:
    log = Log.open(level="warning", secret=b"s", stream=stream)
    log.info("no")
    log.debug("no")
    log.warning("yes")
    log.error("yes")
    assert [line["level"] for line in lines(stream)] == ["warning", "error"]


@pytest.mark.parametrize(
    "field",
    ["patient_name", "PatientName", "PatientID", "patient_birth_date", "AccessionNumber", "StudyDescription",
     "series_description", "ReferringPhysicianName", "IssuerOfPatientID", "InstitutionName", "OperatorsName",
     "AdditionalPatientHistory", "mrn", "dataset"],
)  # fmt: skip
def test_fields_that_name_a_patient_are_dropped_and_said_so(log: Log, stream: io.StringIO, field: str) -> None:
    log.info("x", **{field: "Mustermann"}, nested={field: "Mustermann", "kept": 1})
    (line,) = lines(stream)
    assert "Mustermann" not in stream.getvalue()
    assert line["scrubbed"] == [field, field]
    assert line["nested"] == {"kept": 1}


def test_ordinary_fields_are_not_mistaken_for_a_patient(log: Log, stream: io.StringIO) -> None:
    log.info(
        "x", association="a", session=1, address="10.0.0.1", reason="ldap", classname="y", place="a.py:3", peer="z"
    )
    assert "scrubbed" not in lines(stream)[0]


def test_objects_that_hold_a_patient_are_shown_as_their_type(log: Log, stream: io.StringIO) -> None:
    dataset = pydicom.Dataset()
    dataset.PatientName = PATIENT[0]
    log.info("x", a=dataset, b=PersonName(PATIENT[0]), c=ValueError(PATIENT[0]), d=PATIENT[0].encode(), e=[dataset])
    line = lines(stream)[0]
    assert PATIENT[0] not in stream.getvalue()
    assert (line["a"], line["c"], line["d"], line["e"]) == ("<Dataset>", "<ValueError>", "<bytes>", ["<Dataset>"])
    assert line["b"] == "<PersonName>"


def test_instance_uids_in_text_become_pseudonyms_and_the_standards_stay_readable(log: Log, stream: io.StringIO) -> None:
    log.info(
        "x", text=f"no room for {STUDY}.", derived="2.25.329800735698586629295641978511506172918",
        syntax="1.2.840.10008.1.2.4.90", ip="10.11.12.13", version="3.0.2", code=RefusalCode.NO_ROUTE,
        uid=pydicom.uid.UID(STUDY),
    )  # fmt: skip
    line = lines(stream)[0]
    assert line["text"] == f"no room for uid:{log.uid(STUDY)}."
    assert line["derived"] == "uid:" + log.uid("2.25.329800735698586629295641978511506172918")
    assert line["uid"] == "uid:" + log.uid(STUDY)
    assert (line["syntax"], line["ip"], line["version"], line["code"]) == (
        "1.2.840.10008.1.2.4.90", "10.11.12.13", "3.0.2", "NO_ROUTE",
    )  # fmt: skip


@pytest.mark.parametrize("style", ["json", "console"])
def test_a_value_cannot_forge_a_line(stream: io.StringIO, style: Any) -> None:
    Log.open(format=style, secret=b"s", stream=stream).warning(
        "rejected", calling_ae='X\n{"event":"forged"}\x1b[2J\u2028'
    )
    text = stream.getvalue()
    assert text.count("\n") == 1
    assert "\x1b[2J" not in text
    assert "\u2028" not in text


def test_a_long_value_is_cut(log: Log, stream: io.StringIO) -> None:
    log.info("x", text="a" * 100_000, many=list(range(1000)))
    assert len(stream.getvalue()) < 2000


def test_a_closed_stream_does_not_stop_the_line(log: Log, stream: io.StringIO) -> None:
    stream.close()
    log.error("x")


def test_the_null_log_writes_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    Log.null().error("x", a=1)
    assert capfd.readouterr() == ("", "")


def test_the_secret_is_made_once_and_only_the_owner_reads_it(tmp_path: Path) -> None:
    barrier = threading.Barrier(8)
    secrets: list[bytes] = []

    def read() -> None:
        barrier.wait()
        secrets.append(load_secret(tmp_path))

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(secrets)) == 1
    assert len(secrets[0]) == 32
    key = tmp_path / "run" / "hmac.key"
    assert key.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in key.parent.iterdir()] == ["hmac.key"]


def test_the_pseudonym_depends_on_the_secret_and_not_on_padding() -> None:
    assert pseudonym(b"a", STUDY) != pseudonym(b"b", STUDY)
    assert pseudonym(b"a", STUDY + "\0") == pseudonym(b"a", STUDY)  # PS3.5 6.2: a UID is padded with a NULL
    assert len(pseudonym(b"a", STUDY)) == 16


@pytest.mark.usefixtures("restored_libraries")
def test_libraries_speak_without_their_text(log: Log, stream: io.StringIO) -> None:
    quiet_libraries(log)
    logging.getLogger("pynetdicom.acse").error("value %s", PATIENT[0])
    logging.getLogger("pynetdicom").debug(PATIENT[1])
    try:
        raise ValueError(PATIENT[0])
    except ValueError:
        logging.getLogger("pydicom").exception("cannot read %s", PATIENT[0])
    warnings.warn(f"Invalid value for VR DA: '{PATIENT[2]}'", stacklevel=1)
    thread = threading.Thread(target=lambda: {}[PATIENT[0]], name="t1")
    thread.start()
    thread.join()

    assert not any(text in stream.getvalue() for text in PATIENT)
    said = [(line["event"], line.get("error")) for line in lines(stream)]
    assert said == [
        ("library_message", ""),
        ("library_message", "ValueError"),
        ("library_warning", "UserWarning"),
        ("thread_died", "KeyError"),
    ]
    assert all(line["place"].startswith("test_log.py:") for line in lines(stream))


def test_a_process_that_parses_a_bad_file_writes_no_patient_to_stderr(tmp_path: Path) -> None:
    """The whole arrangement in a fresh interpreter: pydicom complains about every one of these values."""
    script = (
        "import sys, types, pathlib\n"
        "from dicom_node.log import make_log\n"
        "log = make_log(types.SimpleNamespace(level='debug', format='json'), pathlib.Path(sys.argv[1]))\n"
        "import pydicom, pydicom.config\n"
        "pydicom.config.settings.reading_validation_mode = pydicom.config.WARN\n"
        "ds = pydicom.Dataset()\n"
        "ds.PatientBirthDate = 'Mustermann^Erika'\n"
        "ds.StudyInstanceUID = 'MRN-4711'\n"
        "ds.PatientID = 'x' * 80\n"
        "log.info('parsed', PatientID='MRN-4711', ds=ds)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert not any(text in done.stderr + done.stdout for text in PATIENT)
    assert "library_warning" in done.stderr


def test_make_log_opens_what_the_configuration_says(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], restored_libraries: None
) -> None:
    class Section:
        level = "error"
        format: Any = "console"

    make_log(Section(), tmp_path).error("node_stopped", code=75)
    assert "node_stopped" in capfd.readouterr().err
    assert (tmp_path / "run" / "hmac.key").exists()


def test_place_of_names_file_and_line_only() -> None:
    try:
        raise ValueError(PATIENT[0])
    except ValueError as error:
        assert place_of(error.__traceback__).startswith("test_log.py:")
    assert place_of(None) == ""
