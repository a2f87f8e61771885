"""The lab: experiment files, runs, sweeps, the store and its pages. In a notebook: `record` and its neighbours."""

from zimage.lab.recording import record, record_picture, record_recipe

__all__ = ["record", "record_picture", "record_recipe"]
