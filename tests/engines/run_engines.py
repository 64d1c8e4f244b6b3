#!/usr/bin/env python3
"""The drop-ins on the released engines: fetches vLLM's and SGLang's Python files, then runs engine_checks.py on them.

    python tests/engines/run_engines.py   # fetch what is missing, then test, on this machine
    ... --calls 0.31.0 0.32.0             # only compare these releases' calls with the ones we replace
    ... --release 0.31.0                  # only the tests of whole layers, in another release of vLLM
    ... --pack                            # make .real/pack.tar.xz for a machine without a network (Python 3.12)
    ... --unpacked DIR                    # there: test what was unpacked into DIR, on its GPU
    ... --own FILE...                     # run these tests of vLLM's own with our functions in place, instead

On a GPU, MOEALIGN_VLLM_LIBRARY names vLLM's compiled _moe_C library, as benchmarks/align.py unpacks it.  vLLM's own
tests come with its source distribution, not with its wheels; --pack takes those in .real/vllm_tests along.

Needs pip and the package index, about 150 MB of downloads and no GPU.  Of the engines' wheels only the Python files
are downloaded (13 of vLLM's 321 MB), by range requests; nothing is compiled and no second torch is installed: the
environment in .real/venv sees the packages of the Python that runs this.
"""

from __future__ import annotations

import argparse
import ast
import importlib.metadata
import inspect
import io
import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import urllib.request
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
REAL = ROOT / ".real"
VLLM, SGLANG = "0.33.0", "0.5.23"
PLATFORMS = ("manylinux2014_x86_64", *(f"manylinux_2_{minor}_x86_64" for minor in (17, 24, 27, 28, 31, 34, 35)))
#: What the modules with a MoE layer import, besides torch, transformers, triton and numba.
NEEDS = [
    "psutil", "pyzmq", "cbor2", "aiohttp", "openai", "openai-harmony", "sniffio", "pillow", "pybase64", "cachetools",
    "msgspec", "cloudpickle", "uvloop", "py-cpuinfo", "prometheus-client", "xgrammar", "apache-tvm-ffi", "fastapi",
    "starlette", "opentelemetry-api", "opentelemetry-sdk", "partial-json-parser", "llguidance", "einops", "regex",
    "pydantic", "transformers", "orjson", "ipython", "hypothesis", "pytest", "dill", "sentencepiece", "gguf", "scipy",
    "compressed-tensors",
]  # fmt: skip
#: What only SGLang's modules bring, and what the base environment has that a machine for --pack may not.
ONLY_SGLANG = {
    "asttokens", "executing", "ipython", "ipython_pygments_lexers", "jedi", "matplotlib-inline", "orjson", "parso",
    "pexpect", "prompt_toolkit", "ptyprocess", "pure_eval", "stack-data", "traitlets", "wcwidth", "dill", "gguf",
    "scipy", "sentencepiece",
}  # fmt: skip
OF_BASE = (
    "annotated-doc", "annotated-types", "anyio", "attrs", "certifi", "h11", "httpcore2", "httpx2", "idna", "pydantic",
    "pydantic-core", "sniffio", "truststore", "typing-extensions", "typing-inspection",
)  # fmt: skip
#: What is put where vLLM's compiled libraries would be; its Python files import them on a GPU.
STAND_INS = {
    "_C_stable_libtorch.py": "import vllm_parts  # of moealign's tests\n",
    "vllm_flash_attn/_vllm_fa2_C.py": "",
}
#: Of vLLM, what --pack leaves out: whole models, and kernels of other libraries.
LEFT_OUT = ("__pycache__", "vllm/models/", "vllm_flash_attn/cute", "third_party/fmha", "third_party/tml")
TUNED = [f"device_name={gpu}{form}.json" for gpu in ("NVIDIA_H100_80GB_HBM3", "NVIDIA_H200") for form in (
    "", ",dtype=fp8_w8a8,block_shape=[128,128]")]  # fmt: skip
FILES = (".py", *TUNED)  # the sources, and the tuned configurations of the GPUs we test on
NEAR = 1 << 20  # bytes between two wanted files for which a second request does not pay


def pip(*arguments: str, python: str = sys.executable) -> None:
    subprocess.run([python, "-m", "pip", "--disable-pip-version-check", "-q", *arguments], check=True)


def foreign(*tags: str) -> list[str]:
    """Options of pip for wheels of another Python than this one."""
    options = ["--only-binary=:all:", "--implementation", "cp", "--python-version", "3.12"]
    return options + [part for tag in PLATFORMS for part in ("--platform", tag)]


def wheel_url(requirement: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        resolve = ["--dry-run", "--ignore-installed", "--no-deps", "--target", folder, "--report", str(report)]
        pip("install", *resolve, *foreign(), requirement)
        return json.loads(report.read_text())["install"][0]["download_info"]["url"]


class Remote(io.RawIOBase):
    """A file behind a URL, read by ranges; what `hold` fetched is read from memory."""

    def __init__(self, url: str) -> None:
        self.url, self.at, self.held = url, 0, {}
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD")) as answer:
            self.size = int(answer.headers["Content-Length"])

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = offset + (0, self.at, self.size)[whence]
        return self.at

    def fetch(self, start: int, end: int) -> bytes:
        asked = urllib.request.Request(self.url, headers={"Range": f"bytes={start}-{end - 1}"})
        with urllib.request.urlopen(asked) as answer:
            if answer.status != 206:
                sys.exit(f"{self.url}: expected an answer to a range request, got status {answer.status}")
            return answer.read()

    def hold(self, start: int, end: int) -> None:
        self.held[start, end] = self.fetch(start, end)

    def read(self, size: int = -1) -> bytes:
        end = self.size if size < 0 else min(self.at + size, self.size)
        start, self.at = self.at, end
        for (first, last), content in self.held.items():
            if first <= start and end <= last:
                return content[start - first : end - first]
        return self.fetch(start, end) if end > start else b""


def fetch_python(requirement: str, target: Path, suffix: str | tuple[str, ...] = FILES) -> None:
    """Members of a wheel that end in `suffix`, and its metadata, into `target`."""
    remote = Remote(wheel_url(requirement))
    remote.hold(max(0, remote.size - (4 << 20)), remote.size)
    with zipfile.ZipFile(remote) as archive:
        members = sorted(archive.infolist(), key=lambda member: member.header_offset)
        ends = [member.header_offset for member in members[1:]] + [archive.start_dir]
        spans: list[list[int]] = []
        wanted = []
        for member, end in zip(members, ends, strict=True):
            if not member.filename.endswith(suffix) and ".dist-info/" not in member.filename:
                continue
            wanted.append(member)
            if spans and member.header_offset - spans[-1][1] < NEAR:
                spans[-1][1] = end
            else:
                spans.append([member.header_offset, end])
        for span in spans:
            remote.hold(*span)
        for member in wanted:
            archive.extract(member, target)
    took = sum(end - start for start, end in spans) / 2**20
    print(f"{requirement}: {len(wanted)} files, {took:.1f} of {remote.size / 2**20:.0f} MiB fetched", flush=True)


def fetched(name: str, version: str) -> Path:
    target = REAL / f"{name}-{version}"
    if not (target / ".complete").exists():
        fetch_python(f"{name}=={version}", target)
        (target / ".complete").touch()
    for stand_in, text in STAND_INS.items() if name == "vllm" else ():
        (target / "vllm" / stand_in).write_text(text)
    for folder in ("csrc", "include") if name == "sglang" else ():  # of its kernels' sources, which it looks for
        (target / "sglang/kernels/jit" / folder).mkdir(exist_ok=True)
    return target


def environment() -> Path:
    """The Python of .real/venv: what the engines need, layered on the packages of the Python that runs this."""
    python, ready = REAL / "venv/bin/python", REAL / "venv/.ready"
    if not ready.exists():
        subprocess.run([sys.executable, "-m", "venv", str(REAL / "venv")], check=True)
        site = next((REAL / "venv/lib").glob("python*/site-packages"))
        (site / "base.pth").write_text(sysconfig.get_path("purelib") + "\n")
        kept = [f"torch=={importlib.metadata.version('torch').partition('+')[0]}"]
        pip("install", *kept, *NEEDS, python=str(python))
        ready.touch()
    # Installed, not on a path alone: the entry points are part of what is tested.
    pip("install", "--no-deps", "--force-reinstall", str(ROOT), python=str(python))
    return python


def compare_calls(versions: list[str]) -> int:
    """Read the calls we stand in for out of other releases of vLLM, without running them."""
    sys.path.insert(0, str(ROOT / "src"))
    from moealign.integrations import vllm

    different = 0
    for version in versions:
        found = {}
        for module in sorted({module for module, _, _ in vllm._TARGETS}):
            path = module.replace(".", "/") + ".py"
            with tempfile.TemporaryDirectory() as folder:
                fetch_python(f"vllm=={version}", Path(folder), path)
                for node in ast.parse(Path(folder, path).read_text()).body:
                    if isinstance(node, ast.FunctionDef):
                        found[module, node.name] = [a.arg for a in (*node.args.args, *node.args.kwonlyargs)]
        for module, name, ours in vllm._TARGETS:
            known, theirs = list(inspect.signature(ours).parameters), found.get((module, name))
            same = theirs is not None and theirs == known[: len(theirs)]
            different += not same
            said = "same" if theirs == known else "same, shorter" if same else "absent" if theirs is None else theirs
            print(f"vllm {version} {module.rpartition('.')[2]}.{name}: {said}")
    return different


def pack() -> None:
    """vLLM's files and what they need for Python 3.12 without torch, in one archive; moealign by its metadata alone."""
    environment()
    site = REAL / "site312"
    venv_site = next((REAL / "venv/lib").glob("python*/site-packages"))
    if not site.exists():
        listed = [sys.executable, "-m", "pip", "list", "--format=json", "--path"]
        found = json.loads(subprocess.run([*listed, str(venv_site)], check=True, capture_output=True).stdout)
        found = [each for each in found if each["name"] not in {"pip", "setuptools", "moealign"} | ONLY_SGLANG]
        names = [f"{each['name']}=={each['version']}" for each in found]
        names += [f"{name}=={importlib.metadata.version(name)}" for name in OF_BASE]
        pip("install", "--no-deps", "--target", str(site), *foreign(), *names)
        subprocess.run(["strip", "--strip-unneeded", *map(str, site.rglob("*.so"))], check=True)

    def kept(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        return None if any(part in member.name for part in LEFT_OUT) else member

    with tarfile.open(REAL / "pack.tar.xz", "w:xz", preset=9) as archive:
        for folder in (fetched("vllm", VLLM), site, REAL / "vllm_tests"):
            if folder.exists():
                archive.add(folder, folder.name, filter=kept)
        for folder in venv_site.glob("moealign-*.dist-info"):  # the entry points
            archive.add(folder, f"{site.name}/{folder.name}")
    print(f".real/pack.tar.xz: {(REAL / 'pack.tar.xz').stat().st_size / 2**20:.1f} MiB")


def check(python: str, paths: list[Path], own: list[str], arguments: list[str], release: str = VLLM) -> int:
    here = Path(__file__).resolve().parent
    known = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (*paths, here, here.parent, here.parent / "docs", ROOT / "benchmarks"))),
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    if sys.version_info < (3, 12):  # the standard library's; setuptools' refuses where that is imported already
        known["SETUPTOOLS_USE_DISTUTILS"] = "stdlib"
    names = ("engine_checks.py", "layer_checks.py", "sglang_layer_checks.py")
    if release != VLLM:
        names = names[1:2]  # the others are of VLLM and SGLANG
    # A process each: they stand in for different parts of the engines.
    runs = [["-p", "vllm_own_tests", *own]] if own else [[str(here / name)] for name in names]
    base = [python, "-m", "pytest", "-q"]
    return max(subprocess.run([*base, *tests, *arguments], env=known, cwd=ROOT).returncode for tests in runs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", nargs="+", metavar="VERSION")
    parser.add_argument("--pack", action="store_true")
    parser.add_argument("--unpacked", type=Path, metavar="DIR")
    parser.add_argument("--release", default=VLLM)
    parser.add_argument("--own", nargs="+", metavar="FILE", default=[])
    options, rest = parser.parse_known_args()
    REAL.mkdir(exist_ok=True)
    if options.calls:
        return compare_calls(options.calls)
    if options.unpacked:
        for name in ("torch", "triton", "transformers"):
            print(name, importlib.metadata.version(name), flush=True)
        unpacked = [options.unpacked / name for name in (f"vllm-{VLLM}", "site312")]
        return check(sys.executable, [ROOT / "src", *unpacked], options.own, rest)
    if options.pack:
        pack()
        return 0
    engines = [fetched("vllm", options.release), fetched("sglang", SGLANG)]
    return check(str(environment()), engines, options.own, rest, options.release)


if __name__ == "__main__":
    sys.exit(main())
