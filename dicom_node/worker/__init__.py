"""The engine worker: a child process that decodes pixels and runs engines. Job in, Result out, one at a time.

Its death (crash of a native decoder, out of memory, a hang) costs one attempt and nothing else. It has no ledger, no
network of its own and a limit on its address space. It speaks JSON lines over an inherited socket; arrays go through
the spool as `.npy` files.

    client    the parent's side: start, ask, kill at the deadline, start again      wire     JSON lines with deadlines
    child     the child's side: load, then one job after the other                  engines  one engine, resident

    parent → setup                     child → loading {task} …, ready {engines}
    parent → job {id, route, …}        child → metrics {deltas}?, done {id, outcome, result | refusal | error}
    parent → load {task, candidate}    child → loaded {engine}: another package, between two jobs
"""

from dicom_node.worker.client import Reply, WorkerClient

__all__ = ["Reply", "WorkerClient"]
