"""The tasks. The node loads `engines/<task>/engine.py` by path; only the training side imports this package."""
