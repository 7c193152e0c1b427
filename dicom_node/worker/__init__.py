"""The engine worker: a child process that decodes pixels and runs engines. Job in, Result out, one at a time.

Its death (crash of a native decoder, out of memory, a hang) costs one attempt and nothing else. It has no ledger, no
network of its own and a limit on its address space. It speaks JSON lines over an inherited socket; arrays go through
the spool as `.npy` files.

    client    the parent's side: start, ask, kill at the deadline, start again
    process   one child, as its parent sees it                wire     JSON lines with deadlines
    standing  what each engine runs on, which backends are left out, who is told
    child     the child's side: load, then one job after the other
    engines   one engine, resident                            guard    catches what foreign code raises
    answers   what a model answers; in doubt the reference is the judge

    parent → setup                     child → loading {task}, through {task} …, ready {engines}
    parent → job {id, route, …}        child → metrics {deltas}?, done {id, outcome, result | refusal | error}
    parent → load {task, candidate}    child → loaded {engine}: another package, between two jobs
    parent → replay {task}             child → replayed {text}: why the golden answers no longer come, or ""
    before any answer                  at {task, backend}: inside a backend's library; "" = out of it
                                       left {task, backend, reason, text, engine}: a backend was dropped
"""

from dicom_node.worker.client import Reply, WorkerClient
from dicom_node.worker.standing import Standing

__all__ = ["Reply", "Standing", "WorkerClient"]
