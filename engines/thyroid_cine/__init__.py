"""Malignancy of a calcified thyroid nodule from a cine clip."""
