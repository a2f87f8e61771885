"""Checkpoints on the Hugging Face hub: found in the hub's local cache, and downloaded into it. Needs no MLX."""

from zimage.hub.cache import Plan, RemoteFile, cached, split
from zimage.hub.fetching import download, fetch, plan

__all__ = ["Plan", "RemoteFile", "cached", "download", "fetch", "plan", "split"]
