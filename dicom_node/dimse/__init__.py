"""DICOM over TCP, both roles: `server.py` is the Storage SCP, `sender.py` the SCU.

Both share the tables `contexts.py` and `status.py`; `tls.py` makes their contexts. Nothing here knows the ledger or the
stages: `receive.py` and `deliver.py` are the callers.
"""
