"""Write the golden tensors of every parity case from diffusers' model, in fp32, into tests/golden/.

    python -m tests.parity.make_goldens

from the repository's root; needs the `parity` extra. The versions it ran with are kept in each file's metadata.
"""

from tests.parity import goldens, ours, reference
from tests.parity.cases import CASES

import diffusers
import torch
from safetensors.numpy import save_file


def main() -> None:
    """Write one file a case and remove those of cases that no longer exist."""
    goldens.FOLDER.mkdir(exist_ok=True)
    for old in goldens.FOLDER.glob("*.safetensors"):
        old.unlink()
    for case in CASES:
        metadata = {
            "diffusers": diffusers.__version__,
            "torch": torch.__version__,
            "digest": goldens.digest(case, ours.shapes(case)),
        }
        save_file(goldens.subset(case, reference.stages(case)), goldens.path(case), metadata)
    size = sum(file.stat().st_size for file in goldens.FOLDER.iterdir())
    print(f"{len(CASES)} cases, {size / 1e6:.2f} MB in {goldens.FOLDER}")


if __name__ == "__main__":
    main()
