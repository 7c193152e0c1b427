"""DICOM over TCP, both roles: `server.py` is the Storage SCP's port, `association.py` one association on it (with the
states of `upper_layer.py`, the answers of `negotiation.py` and the commands of `command.py`), `sender.py` the SCU.

Both roles share the tables `contexts.py` and `status.py`; `tls.py` makes their contexts. Nothing here knows the ledger
or the stages: `receive.py` and `deliver.py` are the callers.
"""
