"""The training side, shared by all tasks: phantom physics, cohorts, fit, evaluate, export, package."""
