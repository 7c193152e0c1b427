"""Tasks and model packages: read, check, find the active one.

A *task* is a folder `engines/<task>/` with `engine.yaml` and `engine.py`. A *model package* is an immutable folder with
`manifest.yaml` and the files it lists: `engines/<task>/model/` (the demonstration package) or
`<store.root>/models/<task>/<version>/` (a site's own). No pickle, no code and no compiled plan is ever read from one.

    schema    what the YAML files may say      load       from a folder to verified values
    listing   for operators                    install    copies below the store root, and which one is in use
"""

from dicom_node.packages.install import check_graphs
from dicom_node.packages.listing import engines_list
from dicom_node.packages.load import (
    ModelPackage,
    TaskFolder,
    active_package,
    find_tasks,
    load_package,
    load_task,
    package_for,
    task_of,
    wanted_of,
)
from dicom_node.packages.schema import (
    Categories,
    ClinicalEntry,
    CodeEntry,
    Decision,
    FusionSpec,
    FusionTermSpec,
    Manifest,
    Task,
)

__all__ = [
    "Categories",
    "ClinicalEntry",
    "CodeEntry",
    "Decision",
    "FusionSpec",
    "FusionTermSpec",
    "Manifest",
    "ModelPackage",
    "Task",
    "TaskFolder",
    "active_package",
    "check_graphs",
    "engines_list",
    "find_tasks",
    "load_package",
    "load_task",
    "package_for",
    "task_of",
    "wanted_of",
]
