"""The listener as a process: real senders, real files, hostile peers, and an honest one beside them."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from pathlib import Path

import psutil
import pytest
from certificates import Authority
from listener_process import ListenerProcess, wait_for
from raw_scu import (
    EXPLICIT,
    IMPLICIT,
    SC,
    AbortedError,
    RawScu,
    RejectedError,
    association_request,
    pdata,
    small_data_set,
    store_command,
)

from dicom_node.config import Tls
from dicom_node.dimse.contexts import SOP_CLASSES
from dicom_node.dimse.tls import client_context
from dicom_node.errors import CannotUnderstandError
from dicom_node.store.header import read_header
from dicom_node.store.part10 import read_meta

UID = "1.2.826.0.1.3680043.9.1"
CT = "1.2.840.10008.5.1.4.1.1.2"
CONTEXTS = [(1, SC, (EXPLICIT,)), (3, SC, (IMPLICIT,))]
STORESCU_PROPOSES = {
    "1.2.840.10008.1.2": "-xi",
    "1.2.840.10008.1.2.1": "-xe",
    "1.2.840.10008.1.2.2": "-xb",
    "1.2.840.10008.1.2.4.50": "-xy",
    "1.2.840.10008.1.2.4.51": "-xx",
    "1.2.840.10008.1.2.4.70": "-xs",
    "1.2.840.10008.1.2.4.80": "-xt",
    "1.2.840.10008.1.2.4.81": "-xu",
    "1.2.840.10008.1.2.4.90": "-xv",
    "1.2.840.10008.1.2.4.91": "-xw",
    "1.2.840.10008.1.2.5": "-xr",
}
DCMTK_CANNOT_READ = {"acuson_echo_65f_jpegbaseline.dcm"}  # closes its fragments twice


@pytest.fixture
def node(tmp_path):
    with ListenerProcess(tmp_path / "root") as node:
        yield node


def peer(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"peer {name} is not installed")
    return found


@pytest.fixture
def real_files(shared_data, tmp_path) -> list[Path]:
    """Every real ultrasound and MR file; archives unpacked."""
    files = [*sorted(shared_data.glob("us/*.dcm")), *sorted(shared_data.glob("mr/**/*.dcm"))]
    for archive in shared_data.glob("us/*.zip"):
        with zipfile.ZipFile(archive) as z:
            z.extractall(tmp_path / "unpacked")
    return files + sorted(p for p in (tmp_path / "unpacked").rglob("*") if p.is_file())


def data_set(path: Path) -> bytes:
    return path.read_bytes()[read_meta(path).dataset_offset :]


def digests(paths) -> Counter[str]:
    return Counter(hashlib.sha256(data_set(p)).hexdigest() for p in paths)


def uids_of(path: Path) -> tuple[str, str]:
    """SOP Class and Instance as a sender takes them: from the data set, for the meta group may say something else."""
    header = read_header(path)
    return header.text("SOPClassUID"), header.text("SOPInstanceUID")


def by_syntax(files: list[Path]) -> dict[str, list[Path]]:
    groups: dict[str, list[Path]] = {}
    for path in files:
        groups.setdefault(read_meta(path).transfer_syntax_uid, []).append(path)
    return groups


def echo(port: int, source: str = "127.0.0.7", **parameters) -> float:
    """Seconds of an honest C-ECHO with its association."""
    began = time.monotonic()
    with RawScu(port, source=source, timeout=5, **parameters) as scu:
        assert scu.associate().echo() == 0
        scu.release()
    return time.monotonic() - began


class Reference:
    """DCMTK's storescp, writing what it receives bit by bit: what the sender really sent."""

    def __init__(self, folder: Path) -> None:
        program = peer("storescp")
        self.folder = folder
        folder.mkdir()
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        # +xa accepts every transfer syntax, +B writes as received, +uf keeps duplicates.
        self.process = subprocess.Popen(
            [program, "+B", "+uf", "+xa", "-aet", "DICOM_NODE", "-od", folder, str(self.port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_for(self._answers)

    def _answers(self) -> bool:
        with socket.socket() as s:
            return s.connect_ex(("127.0.0.1", self.port)) == 0

    def __enter__(self) -> Reference:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


def send_by_storescu(port: int, files: list[Path]) -> None:
    for syntax, group in by_syntax(files).items():
        command = [peer("storescu"), "-R", "-aec", "DICOM_NODE", STORESCU_PROPOSES[syntax], "127.0.0.1", str(port)]
        run = subprocess.run([*command, *map(str, group)], capture_output=True, text=True, timeout=120)
        assert run.returncode == 0, (syntax, run.stderr[-600:])


def test_every_real_file_is_stored_byte_for_byte(node, real_files):
    for path in real_files:
        sop_class, uid = uids_of(path)
        with RawScu(node.port) as scu:
            scu.associate([(1, sop_class, (read_meta(path).transfer_syntax_uid,))])
            assert scu.accepted, path.name
            response = scu.store(data_set(path), sop_class, uid)
            assert response.status == 0, (path.name, response)
            scu.release()
    assert len(real_files) > 90
    assert digests(node.files()) == digests(real_files)


def test_storescu_of_every_real_file(node, real_files, tmp_path):
    files = [p for p in real_files if p.name not in DCMTK_CANNOT_READ]
    send_by_storescu(node.port, files)
    with Reference(tmp_path / "reference") as reference:
        send_by_storescu(reference.port, files)
        sent = digests(reference.folder.iterdir())
    assert sum(sent.values()) == len(files)
    assert digests(node.files()) == sent


def test_odil_of_real_files(node, real_files, tmp_path):
    # odil writes data sets anew, and proposes only what it can write: compare with what it sends to another SCP.
    files = [p for syntax in (EXPLICIT, IMPLICIT) for p in by_syntax(real_files)[syntax][:8]]
    program = peer("odil")
    with Reference(tmp_path / "reference") as reference:
        sent = []
        for path in files:
            command = [program, "store", "127.0.0.1"]
            first = subprocess.run(
                [*command, str(reference.port), "ODIL", "DICOM_NODE", path], capture_output=True, timeout=60
            )
            if first.returncode:
                continue  # odil itself cannot read or write this file
            run = subprocess.run(
                [*command, str(node.port), "ODIL", "DICOM_NODE", path], capture_output=True, timeout=60
            )
            assert run.returncode == 0, (path.name, run.stderr[-400:])
            sent.append(path)
        assert len(sent) > len(files) // 2
        assert digests(node.files()) == digests(reference.folder.iterdir())


DCMJS = """
const {Client, requests, constants} = require('dcmjs-dimse');
const [port, ...files] = process.argv.slice(2);
const failed = [];
const client = new Client();
for (const file of files) {
  const request = new requests.CStoreRequest(file);
  request.on('response', r => { if (r.getStatus() !== constants.Status.Success) failed.push([file, r.getStatus()]); });
  client.addRequest(request);
}
client.on('networkError', e => { console.error(String(e)); process.exit(2); });
client.on('closed', () => { console.error(JSON.stringify(failed)); process.exit(failed.length ? 1 : 0); });
client.send('127.0.0.1', Number(port), 'DCMJS', 'DICOM_NODE');
"""


@pytest.mark.long
def test_dcmjs_dimse_of_real_files(node, real_files, tmp_path):
    folder = tmp_path / "js"
    folder.mkdir()
    (folder / "send.js").write_text(DCMJS)
    install = subprocess.run(
        [peer("npm"), "install", "--silent", "--no-audit", "--no-fund", "--ignore-scripts", "dcmjs-dimse@0.3.3"],
        cwd=folder, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    if install.returncode:
        pytest.skip("npm package dcmjs-dimse cannot be installed here")
    with Reference(tmp_path / "reference") as reference:
        sent = 0
        for path in real_files:
            command = [peer("node"), "send.js"]
            first = subprocess.run([*command, str(reference.port), path], cwd=folder, capture_output=True, timeout=120)
            if first.returncode:
                continue  # dcmjs cannot read or write this file
            run = subprocess.run([*command, str(node.port), path], cwd=folder, capture_output=True, timeout=120)
            assert run.returncode == 0, (path.name, run.stderr[-400:])
            sent += 1
        assert sent > 40
        assert digests(node.files()) == digests(reference.folder.iterdir())


def test_every_malformed_file_leaves_the_listener_alive_and_unconfused(node, shared_data):
    """Sent as it is, whatever it claims to be. 0x0000 only for what can be read again, byte for byte."""
    answers: Counter[str] = Counter()
    acknowledged: list[Path] = []
    known = {c.uid for c in SOP_CLASSES}
    for path in sorted((shared_data / "malformed").rglob("*.dcm")):
        try:
            meta = read_meta(path)
            sop_class, uid, syntax = meta.sop_class_uid, meta.sop_instance_uid, meta.transfer_syntax_uid
            data = data_set(path)
        except CannotUnderstandError:
            sop_class, uid, syntax, data = CT, UID, EXPLICIT, path.read_bytes()
        with RawScu(node.port) as scu:
            scu.associate(
                [(1, sop_class if sop_class in known else CT, (syntax if syntax[:4] == "1.2." else EXPLICIT, EXPLICIT))]
            )
            if not scu.accepted:
                answers["not negotiated"] += 1
                continue
            response = scu.store(data, sop_class or CT, uid or UID)
            answers[f"{response.status:04X}"] += 1
            if response.status == 0:
                acknowledged.append(path)
            assert scu.store(small_data_set(CT), CT, UID).status == 0, path.name
    assert set(answers) <= {"0000", "A900", "C000", "0117", "not negotiated"}
    assert answers["C000"] >= 10
    assert answers["0117"] >= 5
    assert node.process.poll() is None
    mine = hashlib.sha256(small_data_set(CT)).hexdigest()
    stored = digests(node.files())
    del stored[mine]
    assert stored == digests(acknowledged)
    assert echo(node.port) < 1


def test_kill_9_of_the_sender_leaves_no_orphan(node):
    code = (
        "import sys; sys.path.insert(0, sys.argv[2]); from raw_scu import *\n"
        "scu = RawScu(int(sys.argv[1])).associate([(1, SC, (EXPLICIT,))])\n"
        "scu.send(pdata(1, 3, store_command(SC, '1.2.3')))\n"
        "while True: scu.send_data(bytes(100_000), last=False)"
    )
    support = str(Path(__file__).parent.parent / "support")
    sender = subprocess.Popen([sys.executable, "-c", code, str(node.port), support])
    wait_for(lambda: any(p.stat().st_size > 1_000_000 for p in node.files(suffix=".part")))
    sender.send_signal(signal.SIGKILL)
    sender.wait()
    wait_for(lambda: node.files() == [])
    wait_for(lambda: node.messages.of("association_closed"))


def test_kill_9_of_the_listener_keeps_what_was_acknowledged_and_sweeps_the_rest(tmp_path):
    root = tmp_path / "root"
    acknowledged: list[str] = []
    for round_ in range(2):
        with ListenerProcess(root) as node:
            scu = RawScu(node.port).associate(CONTEXTS)
            threading.Timer(0.15 + 0.05 * round_, node.process.kill).start()
            try:
                for i in range(100_000):
                    uid = f"{UID}.{round_}.{i}"
                    assert scu.store(small_data_set(sop_instance=uid, pixels=60_000), SC, uid).status == 0
                    acknowledged.append(uid)
            except (AbortedError, OSError):
                pass
            node.process.wait()
    assert len(acknowledged) > 20
    with ListenerProcess(root) as node:
        assert node.files(suffix=".part") == []
        stored = {read_meta(p).sop_instance_uid for p in node.files()}
    assert set(acknowledged) <= stored
    assert len(stored) <= len(acknowledged) + 2  # stored, but the answer did not leave any more


def test_sigterm_ends_it_in_order(node):
    RawScu(node.port).associate(CONTEXTS)
    began = time.monotonic()
    assert node.stop() == 0
    assert time.monotonic() - began < 5
    assert node.messages.of("association_closed")


def rss_mb(node: ListenerProcess) -> float:
    return psutil.Process(node.process.pid).memory_info().rss / 2**20


def push(scu: RawScu | socket.socket, megabytes: int) -> None:
    """As much as the other side takes."""
    sock = scu.socket if isinstance(scu, RawScu) else scu
    block = bytes(1 << 20)
    try:
        for _ in range(megabytes):
            sock.sendall(block)
    except OSError:
        pass


def connected(node: ListenerProcess, source: str = "127.0.0.1") -> socket.socket:
    return socket.create_connection(("127.0.0.1", node.port), 5, source_address=(source, 0))


def endless_requests(node):
    """Five sockets, each with 50 MB of one A-ASSOCIATE-RQ."""
    for _ in range(5):
        with connected(node) as s:
            s.sendall(b"\x01\x00\xff\xff\xff\xff")
            push(s, 50)
        yield


def endless_pdata(node):
    """A P-DATA-TF far over the negotiated length."""
    with RawScu(node.port) as scu:
        scu.associate(CONTEXTS)
        scu.send(b"\x04\x00\xff\xff\xff\xff")
        push(scu, 100)
        yield


def half_open(node):
    """Two hundred sockets that say nothing."""
    held = [connected(node) for _ in range(200)]
    yield
    for s in held:
        s.close()


def slow_request(node):
    """A request byte by byte."""
    with connected(node) as s:
        request = association_request([(1, SC, (EXPLICIT,))])
        for i in range(12):
            s.sendall(request[i : i + 1])
            time.sleep(0.05)
            yield


def idle_associations(node):
    """All the places one address gets."""
    held = []
    for _ in range(20):
        scu = RawScu(node.port)
        held.append(scu)
        try:
            scu.associate(CONTEXTS)
        except RejectedError as e:
            assert e.args == (2, 3, 2)
    yield
    for scu in held:
        scu.socket.close()


def endless_message(node):
    """Data fragments without a last one, beyond max_instance_mb."""
    with RawScu(node.port) as scu:
        scu.associate(CONTEXTS)
        scu.send(pdata(1, 3, store_command(SC, UID)))
        try:
            for _ in range(3000):
                scu.send(pdata(1, 0, bytes(120_000)))
        except OSError:
            pass
        yield


def towers(node):
    """Sequences in sequences, and items without number."""
    with RawScu(node.port) as scu:
        scu.associate(CONTEXTS)
        for depth in (500, 100_000):
            tower = (
                struct.pack("<HHL", 8, 0x1140, 0xFFFFFFFF) + struct.pack("<HHL", 0xFFFE, 0xE000, 0xFFFFFFFF)
            ) * depth
            assert scu.store(tower, SC, UID, context_id=3).status == 0xC000
            yield
        items = struct.pack("<HHL", 0xFFFE, 0xE000, 0) * 200_000
        assert scu.store(struct.pack("<HHL", 8, 0x1140, len(items)) + items, SC, UID, context_id=3).status == 0xC000
        yield


def resets(node):
    """RST at every point of an association."""
    request = association_request(CONTEXTS)
    whole = request + pdata(1, 3, store_command(SC, UID)) + pdata(1, 2, small_data_set())
    for at in range(1, len(whole), 97):
        scu = RawScu(node.port)
        scu.send(whole[:at])
        scu.reset()
        yield


def garbage(node):
    """Random bytes, and another protocol's."""
    for _ in range(10):
        with connected(node) as s:
            s.sendall(os.urandom(2048))
            yield
    with connected(node) as s:
        s.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        yield


ATTACKS = [
    endless_requests, endless_pdata, half_open, slow_request, idle_associations,
    endless_message, towers, resets, garbage,
]  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: a.__name__)
def test_under_attack_an_honest_peer_is_served_and_memory_is_bounded(tmp_path, attack):
    with ListenerProcess(tmp_path / "root", max_instance_mb=100) as node:
        process = psutil.Process(node.process.pid)
        echo(node.port)
        before = (rss_mb(node), process.num_fds())
        slowest = 0.0
        for _ in attack(node):
            slowest = max(slowest, echo(node.port))
            assert rss_mb(node) < 150
        assert slowest < 1.0
        wait_for(lambda: process.num_fds() <= before[1] + 2, 15)
        wait_for(lambda: process.num_threads() <= 6, 15)
        assert node.files() == []
        assert node.process.poll() is None
        assert echo(node.port) < 1.0


@pytest.mark.long
def test_slow_loris_is_cut_after_its_deadline(node):
    with connected(node) as s:
        began = time.monotonic()
        request = association_request([(1, SC, (EXPLICIT,))])
        with pytest.raises(OSError):
            for i in range(len(request)):
                s.sendall(request[i : i + 1])
                time.sleep(0.3)
        assert time.monotonic() - began < 15


def test_silent_tls_clients_delay_nobody(tmp_path):
    folder = tmp_path / "pki"
    folder.mkdir()
    authority = Authority(folder)
    sections = {}
    for name in ("node", "scanner"):
        cert, key = authority.issue(name, f"{name}.hospital")
        sections[name] = Tls(cert=cert, key=key, ca=authority.pem)
    with ListenerProcess(tmp_path / "root", tls=sections["node"].model_dump(mode="json")) as node:
        silent = [connected(node) for _ in range(20)]
        assert echo(node.port, tls=client_context(sections["scanner"])) < 1.0
        for s in silent:
            s.close()


def test_four_clips_of_55_mb_in_bounded_memory(node):
    """The size of an uncompressed ultrasound clip, four at once."""

    def send(i: int) -> None:
        with RawScu(node.port, timeout=60) as scu:
            scu.associate(CONTEXTS)
            data = small_data_set(sop_instance=f"{UID}.{i}", pixels=55_000_000)
            statuses.append(scu.store(data, SC, f"{UID}.{i}").status)

    statuses: list[int] = []
    threads = [threading.Thread(target=send, args=(i,)) for i in range(4)]
    highest = 0.0
    for thread in threads:
        thread.start()
    while any(t.is_alive() for t in threads):
        highest = max(highest, rss_mb(node))
        time.sleep(0.02)
    assert statuses == [0, 0, 0, 0]
    assert highest < 150
    assert sum(p.stat().st_size for p in node.files()) > 220_000_000


def test_an_idle_association_costs_nothing(node):
    held = [RawScu(node.port).associate(CONTEXTS) for _ in range(8)]
    process = psutil.Process(node.process.pid)
    before = sum(process.cpu_times()[:2])
    time.sleep(2.0)
    used = sum(process.cpu_times()[:2]) - before
    assert used / 2.0 / len(held) < 0.01  # of a core; the stock library polls 4.7 % away
    for scu in held:
        scu.release()


def test_a_node_that_only_knows_files_imports_no_database(tmp_path):
    code = (
        "import sys, dicom_node.receive, dicom_node.log\n"
        "heavy = ('sqlalchemy', 'torch', 'highdicom', 'onnxruntime', 'scipy', 'prometheus_client')\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    repository = Path(__file__).parent.parent.parent
    run = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_no_log_line_of_a_real_study_names_the_patient(node, real_files):
    from pydicom import dcmread

    words = set()
    for path in real_files[:12]:
        header = dcmread(path, stop_before_pixels=True)
        for keyword in (
            "PatientName",
            "PatientID",
            "PatientBirthDate",
            "AccessionNumber",
            "StudyDescription",
            "StudyInstanceUID",
        ):
            if len(str(header.get(keyword) or "").strip()) >= 5:
                words.add(str(header[keyword].value).strip())
        sop_class, uid = uids_of(path)
        for data in (data_set(path), data_set(path)[:-7]):
            with RawScu(node.port) as scu:
                scu.associate([(1, sop_class, (read_meta(path).transfer_syntax_uid,))])
                scu.store(data, sop_class, uid)
                scu.release()
    node.stop()
    text = "".join(node.log_lines)
    assert "association_closed" in text
    assert len(words) >= 10
    assert [w for w in words if w in text] == []
