"""Tests of where weights come from."""
