"""A trial of kernels in a process of its own: `python -m zimage.kernels.trial`.

Requests come as JSON on standard input; a line of JSON with the request's key and a reason, "" where its kernel gives
the right answers, goes to standard output as soon as it is known.
"""

import json
import sys

from zimage import trust
from zimage.kernels.catalogue import KERNELS


def main() -> int:
    """Answer all requests; what one of them does to this process is for whoever started it to find out."""
    for request in json.loads(sys.stdin.read()):
        kernel = KERNELS.get(request["kernel"])
        reason = "there is no such kernel" if kernel is None else kernel.verify(request)
        print(json.dumps({"request": trust.key(request), "reason": reason}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
