"""The running node: `node.py` composes the stages, `listening.py` keeps the listener, `operate.py` serves operators."""
