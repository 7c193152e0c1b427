"""Clinical values of a study: laboratory and measurement results and age, each with unit, time and source.

    reports    NUM items of Structured Reports in the study; Patient's Age
    fhir       Observations of a FHIR R4 server (http: the connection)
    sidecar    JSON files in a folder
    judge      which of them a task may use: unit, range, side, age, agreement, priority
    values     what the stages ask;  stage: asks the sources outside the study

A value counts only with a code the task declares, a UCUM unit that converts to the task's, a plausible size, an age
within the task's limit and, for one of paired organs, a side. Everything else is a stated problem, never a guess; two
values that disagree are one. No PHI in what it says.
"""

from dicom_node.clinical.codes import CodeMap
from dicom_node.clinical.judge import collect
from dicom_node.clinical.model import ClinicalCode, Collected, Gathered, Observation, Wanted
from dicom_node.clinical.units import Ucum
from dicom_node.clinical.values import ClinicalValues

__all__ = [
    "ClinicalCode",
    "ClinicalValues",
    "CodeMap",
    "Collected",
    "Gathered",
    "Observation",
    "Ucum",
    "Wanted",
    "collect",
]
