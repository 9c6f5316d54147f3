"""What growth can do with each architecture of the zoo; prints a JSON line for each.

    python -m loadtests.compatibility              # all of them: some minutes
    python -m loadtests.compatibility bert swin    # some of them

On random weights and random batches: is the wrapped network the unwrapped one bit for bit over three optimizer steps,
all of them sampled? Can every site that is listed hold a seed? Can seeds be germinated, trained, saved, loaded,
exported with `torch.export`, and taken out again?
"""

import json
import os
import sys
import warnings
from dataclasses import asdict

import torch

from loadtests._compatibility import judge
from loadtests.zoo import HOSTS


def main() -> None:
    """Judge what was asked for."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    wanted = sys.argv[1:] or list(HOSTS)
    if unknown := sorted(set(wanted) - set(HOSTS)):
        sys.exit(f"compatibility: expected some of {', '.join(HOSTS)}, found {', '.join(unknown)}")
    for name in wanted:
        verdict = judge(HOSTS[name])
        print(json.dumps({**asdict(verdict), "problems": verdict.problems}), flush=True)


if __name__ == "__main__":
    main()
