"""What a figure was measured on, and whether the machine was quiet enough for it to mean something."""

import functools
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# Whose versions decide a figure. A distribution that is absent is left out.
LIBRARIES = (
    "torch",
    "torchvision",
    "timm",
    "accelerate",
    "nvidia-dali-cuda130",
    "nvidia-dali-cuda120",
    "nvidia-nvimgcodec-cu13",
    "triton",
    "numpy",
    "numba",
    "pillow",
    "simplejpeg",
    "webdataset",
    "pyarrow",
    "duckdb",
    "xxhash",
    "lightly",
    "img2dataset",
    "ffcv",
)
# Bars in pairs/s were set on this card; they say nothing of another.
BAR_GPU = "H200"
PARTS = ("shards", "pipeline", "train", "bench")

# What of a GPU moves with its work: read, never set.
GPU_STATE = ("clocks.sm", "clocks.mem", "power.draw")

# A kernel whose time wanders by a tenth, or a neighbour on a tenth of the machine, moves ratios visibly.
MAX_SPREAD = 0.10
MAX_OTHERS_SHARE = 0.10


@functools.cache
def machine() -> dict[str, Any]:
    """The record of this machine and of the code measured. Holds no path and no host name."""
    return {
        "cpu": cpu_model(),
        "arch": platform.machine(),
        "cores": available_cores(),
        "cores_installed": os.cpu_count() or 1,
        "cpu_mhz": _cpu_mhz(),
        "memory_gib": memory_gib(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "libraries": library_versions(),
        "gpu": gpu(),
        "code": code_identity(),
    }


def cpu_model() -> str:
    """The CPU's own name for itself."""
    for line in _lines(Path("/proc/cpuinfo")):
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model"):
            return " ".join(value.split())
    return platform.processor() or platform.machine()


def available_cores() -> float:
    """Cores that this process can really use: its affinity, cut by the control group's quota."""
    cores = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    quota = cgroup_quota(Path("/sys/fs/cgroup"), _cgroup_path())
    return min(cores, quota) if quota is not None else cores


def cgroup_quota(root: Path, own: str) -> float | None:
    """Cores that the quota of control group `own`, or of any group above it, allows; None without one."""
    quotas = []
    for folder in (root / own, *(root / own).parents):
        if not folder.is_relative_to(root):
            break
        for line in _lines(folder / "cpu.max"):
            limit, period = line.split()
            if limit != "max":
                quotas.append(int(limit) / int(period))
    for line in _lines(root / "cpu" / "cpu.cfs_quota_us"):  # the first version of control groups
        period_lines = _lines(root / "cpu" / "cpu.cfs_period_us")
        if int(line) > 0 and period_lines:
            quotas.append(int(line) / int(period_lines[0]))
    return min(quotas, default=None)


def _cgroup_path() -> str:
    for line in _lines(Path("/proc/self/cgroup")):
        if line.startswith("0::"):
            return line.removeprefix("0::").lstrip("/")
    return ""


def memory_gib() -> float | None:
    """Memory of the machine, cut by the control group's limit."""
    sizes = [
        int(line.split()[1]) * 1024 for line in _lines(Path("/proc/meminfo")) if line.startswith("MemTotal:")
    ]
    own = Path("/sys/fs/cgroup") / _cgroup_path() / "memory.max"
    sizes += [int(line) for line in _lines(own) if line.isdigit()]
    return round(min(sizes) / 2**30, 1) if sizes else None


def _cpu_mhz() -> float | None:
    clocks = [
        float(line.partition(":")[2]) for line in _lines(Path("/proc/cpuinfo")) if line.startswith("cpu MHz")
    ]
    return round(max(clocks)) if clocks else None


def library_versions() -> dict[str, str]:
    """distribution -> installed version, of those that decide a figure."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def gpu() -> dict[str, Any] | None:
    """The first CUDA device: name, memory, SMs, driver, clocks and power as read; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "count": torch.cuda.device_count(),
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "sms": properties.multi_processor_count,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        **read_gpu("driver_version", *GPU_STATE, "clocks.max.sm", "power.limit"),
    }


def read_gpu(*fields: str) -> dict[str, str]:
    """What the driver says of the first device, by field with _ for its points; {} where it says nothing."""
    query = _output(
        ["nvidia-smi", "--id=0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    )
    names = [field.replace(".", "_") for field in fields]
    return dict(zip(names, query.split(", "), strict=False)) if query else {}


def is_bar_gpu() -> bool:
    """Whether this machine's card is the one that bars in pairs/s were set on."""
    found = gpu()
    return found is not None and BAR_GPU in found["name"]


def code_identity() -> dict[str, Any]:
    """Which code ran: version, commit where there is a checkout, and a hash of the sources themselves."""
    import xxhash

    from linerate import __file__ as linerate_file
    from linerate import __version__

    package = Path(__file__).resolve().parent.parent
    digest = xxhash.xxh3_64()
    for part in PARTS:
        for path in sorted((package / part).rglob("*.py")):
            digest.update(path.relative_to(package).as_posix().encode())
            digest.update(path.read_bytes())
    # A wheel may lie inside somebody else's checkout, whose commit says nothing about it.
    tracked = _output(["git", "-C", str(package), "ls-files", "--", "bench/machine.py"])
    commit = _output(["git", "-C", str(package), "rev-parse", "--short=12", "HEAD"]) if tracked else ""
    changed = _output(["git", "-C", str(package), "status", "--porcelain", "--", *PARTS]) if commit else ""
    return {
        "version": __version__,
        # Of the package that was imported: src/linerate in a checkout, site-packages/linerate of a wheel.
        "path": "/".join(Path(linerate_file).parent.parts[-2:]),
        "commit": commit or None,
        "dirty": bool(changed) if commit else None,
        "sources_xxh3": digest.hexdigest(),
    }


@dataclass(frozen=True)
class Probe:
    """How long a fixed kernel took now, and how much CPU time the whole machine and we have used so far."""

    seconds: tuple[float, ...]
    busy_s: float | None
    own_s: float
    at_s: float


def probe(repeats: int = 25) -> Probe:
    """Time a kernel of about a millisecond that fits the first-level cache."""
    numbers = np.linspace(1.0, 2.0, 2048)
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        for _ in range(100):
            numbers = np.sqrt(numbers * 1.0001 + 0.5)
        seconds.append(time.perf_counter() - start)
    return Probe(tuple(seconds[1:]), _busy_s(), _own_s(), time.monotonic())


def noise(before: Probe, after: Probe) -> dict[str, Any]:
    """The machine's unrest between two probes, with the verdict `noisy`.

    spread: (p90 - p10) / median over both probes. others_cores: cores kept busy meanwhile by processes that
    are not ours (a peer's worker and a loader's are), None where the system does not tell.
    """
    seconds = np.array(before.seconds + after.seconds)
    low, median, high = np.quantile(seconds, [0.1, 0.5, 0.9])
    spread = float((high - low) / median)
    elapsed = after.at_s - before.at_s
    others = None
    if before.busy_s is not None and after.busy_s is not None and elapsed > 0:
        others = max(0.0, (after.busy_s - before.busy_s) - (after.own_s - before.own_s)) / elapsed
    crowded = others is not None and others > MAX_OTHERS_SHARE * (os.cpu_count() or 1)
    torch = sys.modules.get("torch")
    on_gpu = torch is not None and torch.cuda.is_initialized()
    return {
        "spread": round(spread, 4),
        "kernel_ms_before": round(1e3 * float(np.median(before.seconds)), 4),
        "kernel_ms_after": round(1e3 * float(np.median(after.seconds)), 4),
        "others_cores": None if others is None else round(others, 3),
        "noisy": spread > MAX_SPREAD or crowded,
        # Before they fall again: the clocks and the power of the work that was just measured.
        **(read_gpu(*GPU_STATE) if on_gpu else {}),
    }


def _own_s() -> float:
    """CPU seconds that this process has used, with its children, those that have ended and those that run."""
    own = os.times()
    children: dict[int, list[tuple[int, int]]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        for line in _lines(stat):  # none where it has ended meanwhile
            _state, parent, *rest = line.rpartition(")")[2].split()
            ticks = sum(int(field) for field in rest[9:13])
            children.setdefault(int(parent), []).append((int(stat.parent.name), ticks))
    used, left = 0.0, [os.getpid()]
    while left:
        for process, ticks_used in children.get(left.pop(), []):
            used += ticks_used / os.sysconf("SC_CLK_TCK")
            left.append(process)
    return own.user + own.system + own.children_user + own.children_system + used


def _busy_s() -> float | None:
    """CPU seconds that all processes of the machine have used, all cores together."""
    for line in _lines(Path("/proc/stat")):
        if line.startswith("cpu "):
            user, nice, system, _idle, _wait, irq, softirq, steal = (int(x) for x in line.split()[1:9])
            return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
