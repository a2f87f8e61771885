"""Timings and how they are judged. Knows callables, not models; nothing else in the project takes a timing."""
