"""The tasks. The node loads `engines/<task>/engine.py` by path and never imports this package; the training side does."""
