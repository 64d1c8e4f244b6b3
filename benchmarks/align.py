#!/usr/bin/env python3
"""moealign, its peers, the torch formulation and the floors, side by side in one process; see docs/performance.md.

    python benchmarks/align.py                    # everything, on the GPU; needs under four minutes
    python benchmarks/align.py --quick            # a few sizes
    python benchmarks/align.py --bench eager-host # one part
    python benchmarks/align.py --device cpu       # a trial without a GPU; the CPU's own is align_cpu.py

The benchmark is `moealign.bench`, which the package brings as `moealign bench`; here are the repository's defaults: the
peers' libraries in .peers (shared/peers/get_peers.py makes them), and the tracked CSV of a whole run.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from moealign import bench  # noqa: E402
from moealign.bench import *  # noqa: E402, F403  for the benchmarks beside this one

main = functools.partial(
    bench.main,
    peers=ROOT / ".peers",
    device="cuda",
    tracked=ROOT / "benchmarks" / "results",
    program="benchmarks/align.py",
)

if __name__ == "__main__":
    sys.exit(main())
