"""What a timed value is, before anything is drawn from it. Needs no MLX."""

from collections.abc import Callable

Timed = Callable[[], float]  # performs one call and returns its seconds
