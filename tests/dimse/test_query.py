"""C-FIND: what Orthanc says of series and of whose study it is; a PACS that fails is an error, not an empty answer."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from certificates import Authority
from e2e_node import free_port, storescu
from notes import image
from orthanc import Orthanc, orthanc
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid
from pynetdicom import AE, evt

from dicom_node.config import Query, Tls
from dicom_node.dimse.query import STUDY_ROOT_FIND, Finder, Identity
from dicom_node.dimse.tls import server_context
from dicom_node.errors import QueryError

STUDY = "1.2.826.0.1.3680043.8.498.1"


@pytest.fixture(scope="module")
def pacs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    folder = tmp_path_factory.mktemp("orthanc")
    with orthanc(folder) as running:
        files = [folder / f"{n}.dcm" for n in range(5)]
        for n, path in enumerate(files):
            image(path, STUDY, f"{STUDY}.{1 + n // 3}", n)
        image(folder / "other.dcm", generate_uid(), generate_uid(), PatientID="OTHER")
        assert storescu(running.port, *files, folder / "other.dcm", called="ORTHANC") == 0
        yield running


def finder(port: int, **changes: Any) -> Finder:
    return Finder(Query(ae_title="ORTHANC", host="127.0.0.1", port=port, **changes), "DICOM_NODE")


def test_orthanc_counts_the_instances_of_each_series_of_this_study_only(pacs):
    assert finder(pacs.port).series_counts(STUDY) == {f"{STUDY}.1": 3, f"{STUDY}.2": 2}


def test_orthanc_says_whose_study_it_is_or_that_it_has_none(pacs):
    assert finder(pacs.port).identities(STUDY) == {Identity("GATE-1", "ACC-1")}
    assert finder(pacs.port).identities("1.2.3.4.5") == frozenset()


def test_nobody_there_is_an_error(tmp_path):
    with pytest.raises(QueryError, match="no association"):
        finder(free_port(), timeout_seconds=1).series_counts(STUDY)


@contextlib.contextmanager
def scripted(*answers: tuple[int, Dataset | None], tls: ssl.SSLContext | None = None) -> Iterator[int]:
    """A Query SCP that gives these answers, whatever was asked."""

    def find(event: Any) -> Iterator[Any]:
        yield from answers

    ae = AE("ORTHANC")
    ae.add_supported_context(STUDY_ROOT_FIND)
    handlers = [(evt.EVT_C_FIND, find)]
    server = ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=handlers, ssl_context=tls)
    try:
        yield server.socket.getsockname()[1]
    finally:
        server.shutdown()


def answer(**keys: Any) -> Dataset:
    made = Dataset()
    made.QueryRetrieveLevel, made.StudyInstanceUID = "SERIES", STUDY
    for keyword, value in keys.items():
        setattr(made, keyword, value)
    return made


def test_a_pacs_that_does_not_fill_the_optional_key_says_nothing():
    with scripted((0xFF00, answer(SeriesInstanceUID="1.2"))) as port:
        assert finder(port).series_counts(STUDY) == {"1.2": None}


def test_a_failure_after_the_first_answer_is_an_error_and_not_half_an_answer():
    answers = ((0xFF00, answer(SeriesInstanceUID="1.2")), (0xA700, None))
    with scripted(*answers) as port, pytest.raises(QueryError, match="0xA700"):
        finder(port).series_counts(STUDY)


def test_answers_about_other_studies_do_not_count():
    other = answer(StudyInstanceUID="1.9", PatientID="X", AccessionNumber="Y")
    with scripted((0xFF00, other)) as port:
        assert finder(port).identities(STUDY) == frozenset()


def tls_of(authority: Authority, name: str, ca: Path | None = None) -> Tls:
    """A certificate of this authority; `ca`: whom its owner trusts, if not the same authority."""
    pem, key = authority.issue(name, f"{name}.hospital")
    return Tls(cert=pem, key=key, ca=ca or authority.pem)


def test_a_pacs_that_speaks_tls_is_asked_over_tls(tmp_path):
    hospital = Authority(tmp_path)
    node = tls_of(hospital, "node")
    holds = answer(SeriesInstanceUID="1.2", NumberOfSeriesRelatedInstances=7)
    with scripted((0xFF00, holds), tls=server_context(tls_of(hospital, "pacs"))) as port:
        assert finder(port, tls=node).series_counts(STUDY) == {"1.2": 7}
        with pytest.raises(QueryError, match="no association"):  # without TLS there is no answer, and no empty one
            finder(port, timeout_seconds=1).series_counts(STUDY)
        assert finder(port, tls=node).series_counts(STUDY) == {"1.2": 7}


def test_orthanc_answers_over_tls_and_to_nobody_else(tmp_path):
    """OpenSSL of DCMTK on the other side; an empty PACS knows no study, which is an answer."""
    hospital, other = Authority(tmp_path), Authority(tmp_path, "other")
    theirs = tls_of(hospital, "pacs")
    settings = {
        "DicomTlsEnabled": True,
        "DicomTlsCertificate": str(theirs.cert),
        "DicomTlsPrivateKey": str(theirs.key),
        "DicomTlsTrustedCertificates": str(theirs.ca),
    }
    with orthanc(tmp_path / "orthanc", **settings) as pacs:
        assert finder(pacs.port, tls=tls_of(hospital, "node")).identities(STUDY) == frozenset()
        for wrong in (None, tls_of(other, "stranger", ca=hospital.pem)):
            with pytest.raises(QueryError, match="no association"):
                finder(pacs.port, tls=wrong, timeout_seconds=2).identities(STUDY)


def test_a_pacs_whose_certificate_is_of_another_ca_is_an_error_that_says_so(tmp_path):
    hospital, other = Authority(tmp_path), Authority(tmp_path, "other")
    impostor = finder_of(tls_of(other, "impostor", ca=hospital.pem), tls_of(hospital, "node"))
    said = r"TLS handshake fails \(CERTIFICATE_VERIFY_FAILED\): certificates and CA on both sides"
    with impostor as pacs, pytest.raises(QueryError, match=said):
        pacs.series_counts(STUDY)


def test_a_pacs_that_refuses_our_certificate_is_an_error(tmp_path):
    hospital, other = Authority(tmp_path), Authority(tmp_path, "other")
    strict = finder_of(tls_of(hospital, "pacs"), tls_of(other, "stranger", ca=hospital.pem))
    with strict as pacs, pytest.raises(QueryError, match="no association"):
        pacs.series_counts(STUDY)


@contextlib.contextmanager
def finder_of(theirs: Tls, ours: Tls) -> Iterator[Finder]:
    """Ours, of a PACS that would answer."""
    with scripted((0xFF00, answer(SeriesInstanceUID="1.2")), tls=server_context(theirs)) as port:
        yield finder(port, tls=ours, timeout_seconds=2)


def test_a_certificate_file_that_is_gone_is_an_error_that_names_the_key(tmp_path):
    node = tls_of(Authority(tmp_path), "node")
    node.cert.unlink()
    with pytest.raises(QueryError, match=r"tls\.cert"):
        finder(free_port(), tls=node).series_counts(STUDY)
