"""The ledger's tables and the states of their rows, each with a sentence. SQLAlchemy Core; SQLite by default."""

from __future__ import annotations

import enum

import sqlalchemy as sa

SCHEMA_VERSION = 1


class JobState(enum.StrEnum):
    """Where a job stands."""

    READY = "READY"  #: waits for its time and a free hand
    RUNNING = "RUNNING"  #: claimed under a lease; comes back by itself when the lease runs out
    DONE = "DONE"  #: ended with an outcome; a refusal is an answer, not a fault
    DEAD = "DEAD"  #: a fault that repetition did not cure; a person must look (`dicom-node retry`)


class Outcome(enum.StrEnum):
    """What a finished job concluded."""

    ROUTED = "ROUTED"  #: at least one route took the study
    UNROUTED = "UNROUTED"  #: no route took it; the code says why
    RESULT = "RESULT"  #: the engine gave a result
    REFUSED = "REFUSED"  #: no number; the code says why
    SHADOW = "SHADOW"  #: a result that is recorded but not sent; the code says why
    SUPERSEDED = "SUPERSEDED"  #: a newer revision of the study took over before it ended
    GATHERED = "GATHERED"  #: the sources of clinical values were asked; the study is routed again with what they said
    BUILT = "BUILT"  #: the objects are written and queued for their destinations


class Stage(enum.StrEnum):
    """The stages that work on jobs."""

    ROUTE = "route"
    COMPLETE = "complete"
    INFER = "infer"
    REPORT = "report"
    CLINICAL = "clinical"


class DeliveryState(enum.StrEnum):
    """Where one object stands on its way to one destination."""

    PENDING = "PENDING"  #: will be sent when its time comes, or when the destination is no longer paused
    DELIVERED = "DELIVERED"  #: the destination answered success, a warning, or "duplicate"
    HELD = "HELD"  #: kept back: the PACS knows another patient or order (`dicom-node complete`, or `retry`)
    WITHDRAWN = "WITHDRAWN"  #: never sent: its images were rejected, or a corrected revision took its place
    DEAD = "DEAD"  #: refused for good or given up; a person must look (`dicom-node retry`)


class StudyState(enum.StrEnum):
    """Where a study stands, as `explain` and `status` print it; derived from its rows, never stored."""

    RECEIVING = "RECEIVING"  #: instances may still come
    HELD = "HELD"  #: something waits for more instances or for an operator (`dicom-node complete`)
    PROCESSING = "PROCESSING"  #: jobs are waiting or running
    DELIVERING = "DELIVERING"  #: objects are on their way
    DONE = "DONE"  #: nothing is left to do
    DEAD = "DEAD"  #: a job or a delivery needs a person
    IGNORED = "IGNORED"  #: holds nothing but our own objects


metadata = sa.MetaData()

meta = sa.Table(
    "meta", metadata, sa.Column("key", sa.String(32), primary_key=True), sa.Column("value", sa.Text, nullable=False)
)

instance = sa.Table(
    "instance",
    metadata,
    sa.Column("id", sa.String(32), primary_key=True),
    sa.Column("study_uid", sa.String(64), nullable=False),
    sa.Column("sop_uid", sa.String(64), nullable=False),
    sa.Column("transfer_syntax_uid", sa.String(64), nullable=False),
    sa.Column("digest", sa.String(64), nullable=False),
    sa.Column("association", sa.String(32), nullable=False),
    sa.Column("calling_ae", sa.String(16), nullable=False),
    sa.Column("called_ae", sa.String(16), nullable=False),
    sa.Column("peer", sa.String(64), nullable=False),
    sa.Column("received_at", sa.Float, nullable=False),
    sa.Column(
        "patient", sa.String(64), nullable=False
    ),  # digest of Patient ID, issuer and birth date: compared, never shown
    sa.Column("current", sa.Boolean, nullable=False),  # newest content of its SOP Instance UID
    sa.Column("own", sa.Boolean, nullable=False),  # one of our own objects that came back
    sa.Column("header", sa.Text, nullable=False),  # Header.to_json
    sa.Index("ix_instance_study", "study_uid"),
    sa.Index("ix_instance_sop", "sop_uid"),
)

study = sa.Table(
    "study",
    metadata,
    sa.Column("uid", sa.String(64), primary_key=True),
    sa.Column("revision", sa.Integer, nullable=False),  # 0 = not yet assembled
    sa.Column("armed_at", sa.Float),  # first instance since the last assembly
    sa.Column("last_received", sa.Float, nullable=False),
    sa.Column("due_at", sa.Float),  # when it counts as complete; null = the timer is not armed
    sa.Column("hold", sa.String(32)),  # reason code; nothing moves while set
    sa.Column("accepted_conflict", sa.Boolean, nullable=False),
    sa.Column("priority", sa.Integer, nullable=False),
    sa.Column("expired", sa.Boolean, nullable=False),  # its files were removed after keep_days
    sa.Index("ix_study_due", "due_at"),
    sa.Index("ix_study_last", "last_received"),
)

job = sa.Table(
    "job",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("study_uid", sa.String(64), nullable=False),
    sa.Column("revision", sa.Integer, nullable=False),
    sa.Column("stage", sa.String(8), nullable=False),
    sa.Column("route", sa.String(48), nullable=False),  # "" for the route stage
    sa.Column("state", sa.String(8), nullable=False),
    sa.Column("outcome", sa.String(12)),
    sa.Column("code", sa.String(48)),
    sa.Column("detail", sa.Text, nullable=False, default=""),
    sa.Column("engine", sa.String(48), nullable=False, default=""),
    sa.Column("package", sa.String(32), nullable=False, default=""),
    sa.Column("digest", sa.String(64), nullable=False, default=""),
    sa.Column("input_digest", sa.String(64), nullable=False, default=""),
    sa.Column("payload", sa.Text, nullable=False, default="{}"),  # JSON: what the stage is given
    sa.Column("output", sa.Text, nullable=False, default="{}"),  # JSON: what the stage concluded
    sa.Column("priority", sa.Integer, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("run_at", sa.Float, nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("fence", sa.Integer, nullable=False),
    sa.Column("lease", sa.Float),
    sa.Column("done_at", sa.Float),
    sa.UniqueConstraint("study_uid", "revision", "stage", "route"),
    sa.Index("ix_job_pick", "stage", "state", "run_at"),
)

output = sa.Table(
    "output",
    metadata,
    sa.Column("sop_uid", sa.String(64), primary_key=True),
    sa.Column("study_uid", sa.String(64), nullable=False),
    sa.Column("revision", sa.Integer, nullable=False),
    sa.Column("route", sa.String(48), nullable=False),
    sa.Column("kind", sa.String(8), nullable=False),  # sr | capture
    sa.Column("variant", sa.String(32), nullable=False),
    sa.Column("sop_class_uid", sa.String(64), nullable=False),
    sa.Column("transfer_syntax_uid", sa.String(64), nullable=False),
    sa.Column("series_uid", sa.String(64), nullable=False),
    sa.Column("file", sa.String(40), nullable=False),  # name under <root>/outputs
    sa.Column("sha256", sa.String(64), nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Index("ix_output_study", "study_uid"),
)

delivery = sa.Table(
    "delivery",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("destination", sa.String(32), nullable=False),
    sa.Column("sop_uid", sa.String(64), sa.ForeignKey("output.sop_uid"), nullable=False),
    sa.Column("study_uid", sa.String(64), nullable=False),
    sa.Column("state", sa.String(10), nullable=False),
    sa.Column("status", sa.Integer),  # last C-STORE status
    sa.Column("reason", sa.Text, nullable=False, default=""),
    sa.Column("priority", sa.Integer, nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("next_at", sa.Float, nullable=False),
    sa.Column("done_at", sa.Float),
    sa.UniqueConstraint("destination", "sop_uid"),
    sa.Index("ix_delivery_pick", "destination", "state", "next_at"),
    sa.Index("ix_delivery_study", "study_uid"),
)

destination = sa.Table(
    "destination",
    metadata,
    sa.Column("name", sa.String(32), primary_key=True),
    sa.Column("paused_since", sa.Float),  # null = not paused
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("probe_at", sa.Float, nullable=False),  # one probe at this time while paused
)

event = sa.Table(
    "event",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("at", sa.Float, nullable=False),
    sa.Column("study_uid", sa.String(64)),
    sa.Column("code", sa.String(48), nullable=False),
    sa.Column("text", sa.Text, nullable=False),
    sa.Index("ix_event_study", "study_uid"),
)

rejection = sa.Table(
    "rejection",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("sop_uid", sa.String(64), nullable=False),  # the instance that shall not be used; perhaps not received
    sa.Column("note_uid", sa.String(64), nullable=False),  # the Key Object Selection document that says so
    sa.Column("code", sa.String(16), nullable=False),  # its title, CID 7011
    sa.Column("at", sa.Float, nullable=False),
    sa.UniqueConstraint("sop_uid", "note_uid"),
    sa.Index("ix_rejection_note", "note_uid"),
)

withdrawal = sa.Table(
    "withdrawal",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("study_uid", sa.String(64), nullable=False),
    sa.Column("sop_uid", sa.String(64), nullable=False),  # one of our objects that a destination holds
    sa.Column("destination", sa.String(32), nullable=False),
    sa.Column("code", sa.String(16), nullable=False),  # title of the note that rejected its images
    sa.Column("at", sa.Float, nullable=False),
    sa.Column("done_at", sa.Float),  # a note rejected our object too
    sa.UniqueConstraint("sop_uid", "destination"),
    sa.Index("ix_withdrawal_study", "study_uid"),
)

identity = sa.Table(
    "identity",
    metadata,
    sa.Column("study_uid", sa.String(64), primary_key=True),
    sa.Column("destination", sa.String(32), primary_key=True),
    sa.Column("digest", sa.String(64), primary_key=True),  # of Patient ID and Accession Number: compared, never shown
    sa.Column("state", sa.String(10), nullable=False),  # AGREED | DIFFERS | ACCEPTED (by an operator)
    sa.Column("at", sa.Float, nullable=False),
)

availability = sa.Table(
    "availability",
    metadata,
    sa.Column("study_uid", sa.String(64), primary_key=True),
    sa.Column("sop_uids", sa.Text, nullable=False),  # JSON: what the last notification said is to be had
    sa.Column("at", sa.Float, nullable=False),
)
