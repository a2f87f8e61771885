"""The tests. Importing zimage here prepares MLX before a test module imports it: afterwards would be too late."""

import zimage  # noqa: F401
