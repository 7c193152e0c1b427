"""The fuzz target: bytes of a peer, a real listener behind a real socket. `scripts/fuzz` runs it; see there.

    fuzz_transport.py fuzz FOLDER SECONDS   atheris (libFuzzer) over the node and the library's PDU decoders; ends
                                            with 1 where there are findings: FOLDER-findings has their inputs
    fuzz_transport.py keep FOLDER           of what libFuzzer kept: the shortest stream for each new behaviour

After each input: no thread of the listener has died of it, the connection is over, what was acknowledged is stored, and
what is stored was acknowledged. An honest C-ECHO every thousand inputs. Anything else is a finding.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import resource
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE)]

MAX_LEN = 8192
INSTRUMENTED = ["dicom_node", "pynetdicom.pdu", "pynetdicom.pdu_items", "pynetdicom.pdu_primitives", "pynetdicom.acse"]
PATIENCE = 0.002
"""The fuzzer does not wait for answers: it asks whether anything breaks, not what is said."""


class Target:
    """A listener in this process, and the judgement of one input."""

    def __init__(self, root: Path) -> None:
        from listener_process import listening

        warnings.simplefilter("ignore")
        self._stack = contextlib.ExitStack()
        self.node = self._stack.enter_context(
            listening(root, idle_timeout=0.3, max_associations_per_peer=64, max_instance_mb=1)
        )
        self.died: list[str] = []
        self.count = 0
        threading.excepthook = lambda args: self.died.append(f"{args.exc_type.__name__}: {args.exc_value}")

    def close(self) -> None:
        self._stack.close()

    def try_one(self, stream: bytes, patience: float = PATIENCE) -> Any:
        """Replays it; raises AssertionError where the listener did what it may not do."""
        from wire_replay import replay

        self.node.messages.all.clear()
        said = replay(self.node.port, stream, patience=patience, timeout=8.0)
        assert said.words[-1] == "closed", f"the connection stays open: {said}"
        settled = self._settled()
        assert not self.died, self.died
        stored = len(self.node.files(suffix=".dcm"))
        acknowledged = said.words.count("C-STORE=0000")
        # A peer that closes may miss an answer that was on its way; it never sees one for what is not there.
        assert acknowledged <= stored, f"{acknowledged} acknowledged, {stored} stored"
        assert stored <= len(self.node.messages.of("stored")), "stored, and nobody was told"
        assert settled, "something is left behind"
        self.clean()
        self.count += 1
        if self.count % 1000 == 0:
            self._honest()
        return said

    def _settled(self) -> bool:
        """Nothing half-written is left within two seconds."""
        deadline = time.monotonic() + 2
        while self.node.files(suffix=".part"):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.0005)
        return True

    def clean(self) -> None:
        for folder in ("incoming", "quarantine"):
            with contextlib.suppress(FileNotFoundError):
                for path in (self.node.root / folder).iterdir():
                    path.unlink(missing_ok=True)

    def _honest(self) -> None:
        from raw_scu import RawScu

        with RawScu(self.node.port, source="127.0.0.7", timeout=5) as scu:
            assert scu.associate().echo() == 0
            scu.release()

    def reasons(self) -> tuple[str, ...]:
        """Why associations were cut and instances refused, as counted."""
        self.node.listener._send_counts()
        found = set()
        for message in self.node.messages.of("metrics"):
            for kind, name, labels, *_ in message["deltas"]:
                if kind == "c" and ("rejected" in name or "refused" in name):
                    found.add(f"{name.removeprefix('dicom_node_').removesuffix('_total')}:{','.join(map(str, labels))}")
        return tuple(sorted(found))


def seed(folder: Path) -> None:
    """The cases that stand already."""
    import hostile_cases

    folder.mkdir(parents=True, exist_ok=True)
    for name, stream in (hostile_cases.named() | hostile_cases.found()).items():
        if len(stream) <= MAX_LEN:
            (folder / name).write_bytes(stream)


def fuzz(folder: Path, seconds: int) -> None:
    """Never returns: libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=INSTRUMENTED):
        import listener_process  # noqa: F401
    from pdu_mutator import mutated

    seed(folder)
    where = Path("/dev/shm") if Path("/dev/shm").is_dir() else None  # noqa: S108  no disk is waited for
    target = Target(Path(tempfile.mkdtemp(prefix="fuzz-", dir=where)))
    findings = Findings(folder.with_name(f"{folder.name}-findings"))
    began = time.monotonic()

    def custom(data: bytes, max_size: int, number: int) -> bytes:
        return mutated(data, atheris.Mutate, random.Random(number), max_size)

    def one(data: bytes) -> None:
        try:
            target.try_one(data)
        except AssertionError as e:
            findings.add(str(e), data)
            target.died.clear()
            target.clean()
        usage = resource.getrusage(resource.RUSAGE_SELF)
        spent = usage.ru_utime + usage.ru_stime
        if target.count % 500 == 0 or spent > seconds:
            kept = sum(1 for _ in folder.iterdir())
            wall = time.monotonic() - began
            print(f"{target.count} inputs, {spent:.0f} s of CPU, {wall:.0f} s, {kept} kept by coverage")
        if spent > seconds:
            target.close()
            print(f"findings: {len(findings.known)}", flush=True)
            os._exit(1 if findings.known else 0)

    atheris.Setup([sys.argv[0], str(folder), f"-max_len={MAX_LEN}", "-timeout=60"], one, custom_mutator=custom)
    atheris.Fuzz()


class Findings:
    """One input for each different complaint; the search goes on."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.known = folder, set[str]()

    def add(self, complaint: str, data: bytes) -> None:
        kind = re.sub(r"0x[0-9a-f]+|[0-9]+", "N", complaint)
        if kind in self.known:
            return
        self.known.add(kind)
        self._folder.mkdir(exist_ok=True)
        path = self._folder / f"{len(self.known)}.pdu"
        path.write_bytes(data)
        print(f"finding: {complaint}: {path}", flush=True)


def keep(folder: Path, corpus: Path) -> list[str]:
    """Adds to the committed corpus the shortest stream for each behaviour that no case of it shows."""
    import hashlib

    import hostile_cases

    known: set[tuple[Any, ...]] = set()
    kept = []
    with tempfile.TemporaryDirectory() as root:
        target = Target(Path(root))
        streams = [s for s in (hostile_cases.named() | hostile_cases.found()).values() if len(s) <= MAX_LEN]
        old = len(streams)
        streams += sorted((p.read_bytes() for p in folder.iterdir() if p.is_file()), key=len)
        for number, stream in enumerate(streams):
            try:
                said = target.try_one(stream, patience=0.1)
            except AssertionError as e:  # a finding; `fuzz` has told of it
                print(f"left out: {e}", file=sys.stderr)
                target.died.clear()
                target.clean()
                continue
            kinds = dict.fromkeys(re.sub(r"\(.*\)", "", word) for word in said.words)
            behaviour = (tuple(kinds), target.reasons())
            if behaviour in known:
                continue
            known.add(behaviour)
            if number >= old:
                path = corpus / f"found-{hashlib.sha256(stream).hexdigest()[:8]}.pdu"
                path.write_bytes(stream)
                kept.append(f"{path.name}: {said} {' '.join(behaviour[1])}")
        target.close()
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["fuzz", "keep"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("seconds", type=int, nargs="?", default=600, help="of CPU")
    arguments = parser.parse_args()
    if arguments.what == "fuzz":
        fuzz(arguments.folder, arguments.seconds)
    else:
        import hostile_cases

        print("\n".join(keep(arguments.folder, hostile_cases.CORPUS)))


if __name__ == "__main__":
    main()
