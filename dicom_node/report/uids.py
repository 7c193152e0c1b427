"""UIDs of what we create: derived, never random, so that one UID never names two different byte strings.

A UID is `2.25.` + the integer of a UUIDv5 (PS3.5 B.2), or the same integer under the site's registered root, cut to
64 characters. The UUID's name is a JSON list of the key parts below, its namespace the node's own:

    series      study · content digest · kind · variant · index of the finding
    instance    the same · number of the instance
    tracking    study · task · tracking identifier               (not the model: the same lesion keeps its UID)
    device      nothing but the node

The *content digest* covers everything the bytes depend on: the result (package digest, parameters, clinical inputs,
scores, digests of the arrays), the sources' UIDs and digests, the time of the job, the report section of the
configuration, this software's version, predecessors and regions. So a retry gives the same UID and the same bytes,
and any change gives another UID, as PS3.4 B.4.1.2 and every archive expect.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dicom_node import __version__
from dicom_node.report.context import ReportContext
from dicom_node.study import Instance

MAX_LENGTH = 64


def derive(root: str | None, namespace: str, *parts: str) -> str:
    """The UID of a key. Equal arguments give an equal UID, on every machine."""
    name = json.dumps(parts, ensure_ascii=True, separators=(",", ":"))
    number = uuid.uuid5(uuid.uuid5(uuid.NAMESPACE_OID, namespace), name).int
    if root is None:
        return f"2.25.{number}"
    return f"{root}.{number % 10 ** (MAX_LENGTH - 1 - len(root))}"


def content_digest(content: Any, sources: Iterable[Instance], context: ReportContext) -> str:
    """SHA-256 over everything the bytes depend on; `content` is the JSON form of what is reported."""
    about = [
        content,
        sorted((i.sop_instance_uid, i.digest) for i in sources),
        context.created.isoformat(),
        context.config.model_dump(mode="json"),
        __version__,
        [[p.sop_instance_uid, p.variant] for p in context.predecessors],
        {name: [r.frame.sop_instance_uid, r.frame.frame_number, r.points] for name, r in context.regions.items()},
    ]
    text = json.dumps(about, ensure_ascii=True, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Uids:
    """The UIDs of one report."""

    root: str | None
    namespace: str
    study_instance_uid: str
    digest: str

    @classmethod
    def of(cls, context: ReportContext, digest: str) -> Uids:
        return cls(context.config.uid_root, context.namespace, context.study_instance_uid, digest)

    def device(self) -> str:
        return derive(self.root, self.namespace, "device")

    def device_serial_number(self) -> str:
        return uuid.uuid5(uuid.NAMESPACE_OID, self.namespace).hex[:16]

    def series(self, kind: str, variant: str, index: int = 0) -> str:
        return self._derive("series", self.digest, kind, variant, str(index))

    def instance(self, kind: str, variant: str, index: int = 0, number: int = 1) -> str:
        return self._derive("instance", self.digest, kind, variant, str(index), str(number))

    def tracking(self, task: str, tracking_identifier: str) -> str:
        return self._derive("tracking", task, tracking_identifier)

    def _derive(self, *parts: str) -> str:
        return derive(self.root, self.namespace, self.study_instance_uid, *parts)
