"""moealign, its peers, the torch formulation and the floors, side by side in one process; see docs/performance.md.

    moealign bench                        # everything, on the GPU if there is one; under eight minutes
    moealign bench --quick                # a few sizes
    moealign bench --bench eager-host     # one part
    python -m moealign.bench              # the same without typer and rich

Every candidate is verified against a numpy oracle before it is timed, and those with preallocated buffers once more
after the timed replays.  GPU time is that of CUDA graphs of 40 calls; the calls use 20 sets of inputs and outputs in
turn.  Events around a replay give its time; the median of 50 replays counts, and the candidates take turns, so that
clock drift affects all alike.  ``eager-host`` is the host time of an eager call that does not wait for the device.

Peers come from a folder of libraries, or from the installed packages.  A peer that cannot be loaded is left out, with
the reason.
"""

from __future__ import annotations

import contextlib
import gc
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from ..calls.dispatch import backends
from ..errors import InvalidInput, how_to_install
from ..testing import expected_layout
from .benches import BENCHES, ON_GPU, bench_cpu
from .candidates import POISON, Candidate, bins_difference, by_name, exact_difference, moealign_candidate
from .cases import Case, Size, case_name, make_ids
from .figure import draw, line_of
from .floors import Floors, copy_bandwidth
from .names import SGLANG, VLLM, gpu_slug, in_order, is_peer
from .peers import argument_count, installed_peers, load_peers, max_routes_of_sglang, vllm_candidate
from .progress import first_line, log
from .rows import COLUMNS, cases_of, row_of, write_csv
from .session import REPLAYS, SLOTS, Session, log_capture_failure, time_graphs, time_host
from .tables import microseconds, print_tables

__all__ = [
    "BENCHES",
    "COLUMNS",
    "POISON",
    "SGLANG",
    "VLLM",
    "Candidate",
    "Case",
    "Session",
    "Size",
    "argument_count",
    "bins_difference",
    "by_name",
    "case_name",
    "cases_of",
    "copy_bandwidth",
    "draw",
    "exact_difference",
    "expected_layout",
    "first_line",
    "gpu_slug",
    "in_order",
    "installed_peers",
    "is_peer",
    "line_of",
    "load_peers",
    "log",
    "log_capture_failure",
    "make_ids",
    "measure",
    "microseconds",
    "moealign_candidate",
    "publish",
    "row_of",
    "time_graphs",
    "time_host",
    "vllm_candidate",
    "write_csv",
]


def measure(
    *,
    device: str | None = None,
    benches: Sequence[str] = (),
    quick: bool = False,
    names: Sequence[str] = (),
    peers: Path | None = None,
    budget: float = 200.0,
) -> Session:
    """Run the benchmark and return what it measured, even if it was interrupted; :func:`publish` shows and writes it.

    Args:
        device: ``cuda`` or ``cpu``; by default ``cuda`` if torch can use a GPU.
        benches: a selection of :data:`BENCHES`, by default all; on a CPU there is only ``align``.
        quick: a few sizes, fewer replays.
        names: backends of moealign; by default all that run on the device.
        peers: folder of the peers' libraries; None takes the installed packages.
        budget: seconds after which only the fast implementations are timed.

    Raises:
        InvalidInput: `device` is ``cuda`` and torch can use no GPU.
    """
    on_gpu = torch.cuda.is_available() if device is None else device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise InvalidInput("expected a GPU that torch can use, found none")
    target = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    slug = gpu_slug(torch.cuda.get_device_name()) if on_gpu else "cpu"
    names = names or (["cuda", "triton", "reference"] if on_gpu else ["cpu", "reference"])
    session = Session(target, slug, list(_available(names)), quick=quick, budget=budget)
    session.replays = 20 if quick else REPLAYS
    session.slots = SLOTS if on_gpu else 5
    selection = [bench for bench in BENCHES if not benches or bench in benches] if on_gpu else ["align"]

    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        if on_gpu:
            session.peers, library = installed_peers() if peers is None else load_peers(peers, Path(scratch))
            session.sglang_max_routes = max_routes_of_sglang(library)
            stack.enter_context(torch.cuda.stream(torch.cuda.Stream()))
            try:
                session.floors = Floors()
                log(f"copy bandwidth: {session.floors.bytes_per_us / 1e6:.2f} TB/s read and written")
            except Exception as error:
                log(f"floors: left out, {first_line(error)}")
        gc.freeze()  # spares the collections before each case the objects that exist by now
        try:
            for bench in selection:
                started = time.perf_counter()
                (ON_GPU[bench] if on_gpu else bench_cpu)(session)
                log(f"{bench}: {time.perf_counter() - started:.1f} s")
        except BaseException as error:
            session.ended = error  # the caller publishes the rows so far, then raises it
        finally:
            gc.unfreeze()
    return session


def _available(names: Sequence[str]) -> Iterator[str]:
    """The backends in `names` that run on this machine; logs why the others do not."""
    for name in names:
        try:
            reason = backends()[name]
        except Exception as error:
            reason = first_line(error)
        if reason is None:
            yield name
        else:
            log(f"moealign-{name}: left out, {reason}")


def publish(session: Session, out: Path | None, figure: Path | None = None) -> int:
    """Print the tables; write the CSV to `out` and the figure to `figure` unless None.

    Returns:
        1 if an implementation was wrong, else 0.
    """
    print_tables(session.rows)
    seconds = time.perf_counter() - session.started
    log(f"{session.gpu}, torch {torch.__version__}, {seconds:.0f} s; microseconds per call")
    if out is not None:
        write_csv(session.rows, out)
    if figure is not None and session.rows:
        try:
            draw(session.rows, figure)
            log(f"{figure}: drawn")
        except ImportError as error:
            log(f"{figure}: not drawn, {error.name} is not installed: {how_to_install('report')}")
    if session.failures:
        log(f"{len(session.failures)} WRONG, the first of them:")
    for line in session.failures[:10]:
        log(line)
    return 1 if session.failures else 0
