"""The lab: experiment files, runs, sweeps, the store and its pages. In a notebook: `record` and `record_picture`."""

from zimage.lab.recording import record, record_picture

__all__ = ["record", "record_picture"]
