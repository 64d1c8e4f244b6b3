"""What a compiled kernel touches before it has waited for the kernel ahead (griddepcontrol.wait)."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import tempfile
from pathlib import Path

_GLOBAL = re.compile(r"\b(?:LDG|STG|LD|ST|ATOM|ATOMG|RED|REDG|LDGSTS|UTMALDG|UTMASTG|UBLKCP)(?:\.[\w.]*)? [^;]*;")


def disassembler() -> Path | None:
    """Triton brings one along."""
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        return None
    found = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    return found if found.exists() else None


def spilled(cubin: bytes) -> int:
    """Bytes of local memory that a thread uses: registers that did not suffice."""
    listing = disassembler()
    assert listing is not None
    with tempfile.TemporaryDirectory() as folder:
        code = Path(folder) / "code.cubin"
        code.write_bytes(cubin)
        command = [listing.with_name("cuobjdump"), "-res-usage", code]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = [int(size) for size in re.findall(r"\b(?:STACK|LOCAL):(\d+)", usage)]
    assert found
    return sum(found)


def touched_before_the_wait(cubin: bytes) -> list[str]:
    """Accesses to global memory that stand before the wait, which is there once; local and shared memory are free."""
    with tempfile.TemporaryDirectory() as folder:
        code = Path(folder) / "code.cubin"
        code.write_bytes(cubin)
        listing = subprocess.run([disassembler(), "-c", code], capture_output=True, text=True, check=True).stdout
    before, wait, after = listing.partition("ACQBULK")
    assert wait
    assert "ACQBULK" not in after
    return _GLOBAL.findall(before)
