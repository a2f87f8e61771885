"""Timings and how they are judged. Knows callables, not models; nothing else reports a timing."""
