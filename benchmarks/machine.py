"""What this machine can do at most: matrix products, copies; and how much memory something takes at its peak."""

from __future__ import annotations

import platform
import re
import time
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


@cache
def product_rate(rows: int, inner: int, columns: int, dtype: torch.dtype, device: str = "cpu") -> float:
    """Floating-point operations per second of a [rows, inner] x [inner, columns] product, the best of half a second."""
    a = torch.randn(rows, inner, device=device).to(dtype)
    b = torch.randn(columns, inner, device=device).to(dtype).t()
    return 2 * rows * inner * columns / _best(lambda: torch.mm(a, b), device)


@cache
def copy_rate(size: int, device: str = "cpu") -> float:
    """Bytes per second, read plus written, of a copy of ``size`` bytes: the best of half a second."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / _best(lambda: target.copy_(source), device)


def _best(work: Callable[[], Any], device: str) -> float:
    work()
    times = []
    until = time.perf_counter() + 0.5
    while time.perf_counter() < until or len(times) < 3:
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times)


def synchronize(device: str) -> None:
    """Wait for everything queued on the device."""
    if device != "cpu":
        torch.cuda.synchronize()


def peak_memory(work: Callable[[], Any], device: str = "cpu") -> int:
    """Bytes by which the memory in use rises above its start while ``work`` runs.

    On the CPU by the kernel's high-water mark of the resident set, which is reset first; freed memory that the
    allocator keeps makes a later call look smaller, so measure in a process of its own.
    """
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    work()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def describe() -> dict[str, str]:
    """What the numbers were measured on."""
    model = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    found = {
        "processor": model[1].strip() if model else platform.processor(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        **{name: version(name) for name in ("polopt", "torch", "transformers", "trl")},
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found
