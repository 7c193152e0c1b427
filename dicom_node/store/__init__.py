"""Durable files (`files.py`) and the ledger that indexes them (`schema.py`, `ledger.py`; queries: `studies.py`,
`jobs.py`, `deliveries.py`)."""
