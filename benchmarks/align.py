#!/usr/bin/env python3
"""`moealign bench` with the repository's defaults: the peers in .peers, and the tracked CSV for a complete run.

    python benchmarks/align.py                    # everything, on the GPU; under eight minutes
    python benchmarks/align.py --quick            # a few sizes
    python benchmarks/align.py --bench eager-host # one part
    python benchmarks/align.py --device cpu       # a trial without a GPU; align_cpu.py is the benchmark of the CPU

shared/peers/get_peers.py makes .peers.
"""

from __future__ import annotations

import functools
import sys

from common import PEERS, RESULTS

from moealign.bench.command import main as bench_main

main = functools.partial(bench_main, peers=PEERS, device="cuda", tracked=RESULTS, program="benchmarks/align.py")

if __name__ == "__main__":
    sys.exit(main())
