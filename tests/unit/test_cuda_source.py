"""The CUDA kernels compile for every architecture that is promised, within their budgets of registers and spills."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from actors.kernels import cuda, dispatch
from actors.kernels.cuda import (
    ENTRY,
    SOURCES,
    CudaLauncher,
    CudaUnavailable,
    compile_kernels,
    decode_kernel,
    encode_kernel,
)
from tests.kernel_cases import BLOCK_FORMS, CHUNK_FORMS

ARCHS = ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"]
# 256 threads of so many registers leave room for four CTAs on each multiprocessor.
MAX_REGISTERS = 64
# Stores and loads together; kernels spill at all on sm_100 and sm_120 only.
MAX_SPILL_BYTES = {"sm_100": 24, "sm_120": 24}
COMPILE_TIMEOUT_S = 110.0
_USAGE = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def kernel_names() -> set[str]:
    """Return the name of every kernel that `CudaKernels` may launch."""
    names = {encode_kernel(dtype, form) for form in BLOCK_FORMS for dtype in (torch.float32, torch.bfloat16)}
    names |= {
        decode_kernel(dtype, form, accumulate=False)
        for form in BLOCK_FORMS
        for dtype in (torch.float32, torch.bfloat16)
    }
    names |= {decode_kernel(torch.float32, form, accumulate=True) for form in BLOCK_FORMS}
    names |= {f"{what}_chunks_{form.k}_{form.bits}" for what in ("encode", "add") for form in CHUNK_FORMS}
    return names | {f"{what}_planes_{width}" for what in ("split", "merge") for width in (16, 32)}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("arch", ARCHS)
def test_kernels_keep_their_budget(tmp_path: Path, arch: str) -> None:
    options = ["-cubin", "-std=c++17", "--fmad=false", f"-arch={arch}", f"-I{SOURCES}", "-Xptxas", "-v"]
    done = subprocess.run(
        ["nvcc", *options, str(ENTRY), "-o", str(tmp_path / "kernels.cubin")],
        capture_output=True,
        text=True,
        timeout=COMPILE_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    usages = {usage["kernel"]: usage for usage in _USAGE.finditer(done.stderr)}
    assert set(usages) == kernel_names()
    for kernel, usage in usages.items():
        assert int(usage["registers"]) <= MAX_REGISTERS, kernel
        assert int(usage["stores"]) + int(usage["loads"]) <= MAX_SPILL_BYTES.get(arch, 0), kernel


def test_nvrtc_compiles_without_a_driver_and_the_cache_keeps_it(tmp_path: Path) -> None:
    pytest.importorskip("cuda.core.utils", reason="needs cuda-core, cuda-bindings and nvidia-cuda-nvrtc")
    compiled = compile_kernels("sm_90", tmp_path)
    assert all(name.encode() in compiled.code for name in kernel_names())
    assert compile_kernels("sm_90", tmp_path).code == compiled.code
    # A miss would have written it anew.
    (entry,) = (path for path in tmp_path.rglob("*") if path.is_file() and path.read_bytes() == compiled.code)
    made_at = entry.stat().st_mtime_ns
    compile_kernels("sm_90", tmp_path)
    assert entry.stat().st_mtime_ns == made_at


def test_an_unknown_architecture_says_what_to_do_and_an_unusable_cache_costs_a_compilation(tmp_path: Path) -> None:
    pytest.importorskip("cuda.core.utils", reason="needs cuda-core, cuda-bindings and nvidia-cuda-nvrtc")
    with pytest.raises(CudaUnavailable, match=r"sm_12345.*install cuda-core"):
        compile_kernels("sm_12345", tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="cannot be used .*set ISTHMUS_CACHE"):
        compiled = compile_kernels("sm_90", tmp_path / "file")
    assert b"encode_8_float32" in compiled.code


def test_a_machine_without_cuda_core_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.core.utils", None)
    with pytest.raises(CudaUnavailable, match="install cuda-core"):
        CudaLauncher()


def test_where_the_driver_refuses_the_kernels_codecs_run_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refused(Exception):
        pass

    def refuse(kernel: str) -> None:
        raise Refused("CUDA_ERROR_NO_BINARY_FOR_GPU")

    device = SimpleNamespace(set_current=lambda: None)
    monkeypatch.setitem(sys.modules, "cuda.core", SimpleNamespace(Device=lambda index: device))
    monkeypatch.setattr(cuda, "_require_cuda_core", lambda: None)
    monkeypatch.setattr(cuda, "_build_errors", lambda: (Refused,))
    monkeypatch.setattr(cuda, "compile_kernels", lambda arch, cache: SimpleNamespace(get_kernel=refuse))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    with pytest.warns(UserWarning, match=r"run on the CPU: the driver cannot load .*NO_BINARY.*update the driver"):
        kernels = dispatch._cuda_kernels.__wrapped__()
    assert kernels.name.endswith("by way of the host")
