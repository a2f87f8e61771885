"""What packing one layer, one block, or one block in one step alone does to a model's output, and how that adds up.

A `Reference` is the unpacked model with trajectories that it drew. Damage is measured on them in two ways. *Velocity*:
the relative L2 error of the velocity at every point of those trajectories, |v' - v| / |v| over all of them; whatever
was packed, the inputs are the same. *End*: the relative L2 error of what a trajectory ends in, where every step builds
on the one before.

One layer or block is packed at a time, beside the one copy of the model. A velocity is computed from the packed block
on: what lies before it is the reference's own, kept from stage to stage.
"""

from zimage.sensitivity.adding import (
    OVER_STEPS,
    RANDOM,
    TOGETHER,
    WITHIN,
    Sum,
    choices,
    factor,
    random_mixes,
    sums,
)
from zimage.sensitivity.choosing import Found, block_bytes, compare, counted, within_bytes, within_error
from zimage.sensitivity.reference import Damage, Reference, block_of, linears, packed
from zimage.sensitivity.singles import Single, block_steps, blocks, items, layers, ranked

__all__ = [
    "OVER_STEPS",
    "RANDOM",
    "TOGETHER",
    "WITHIN",
    "Damage",
    "Found",
    "Reference",
    "Single",
    "Sum",
    "block_bytes",
    "block_of",
    "block_steps",
    "blocks",
    "choices",
    "compare",
    "counted",
    "factor",
    "items",
    "layers",
    "linears",
    "packed",
    "random_mixes",
    "ranked",
    "sums",
    "within_bytes",
    "within_error",
]
