"""Large photos and odd ones: tiles, their size, free memory, and bfloat16."""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from posteriori import precision as precisions
from posteriori import tiling
from posteriori.backbones.photo import PhotoNet
from posteriori.conditioning import Conditioning
from posteriori.images import Photo
from posteriori.memory import free_memory, keep_freed_memory
from posteriori.operators.profiling import peak_memory
from posteriori.posterior import ExactPosterior
from posteriori.precision import ReducedPrecision, choose_precision, cpu_has_bfloat16
from posteriori.problems import TaskOptions, build_problem
from posteriori.restore import RestoreOptions, load_model, restore, write
from posteriori.tiling import TiledBackbone, tile_axis
from tiny_model import save_tiny_model, tiny_network


def randn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def problem(height: int, width: int, batch: int = 1) -> tuple[Tensor, Tensor, Conditioning]:
    x, linear = randn(batch, 3, height, width), randn(batch, 3, height, width, seed=1)
    conditioning = Conditioning(linear, linear.abs().clamp(0, 1), torch.full((batch,), 0.05))
    return x, torch.full((batch,), 0.3), conditioning


@pytest.mark.parametrize("size", [(37, 53), (16, 16), (32, 128), (300, 75)], ids=str)
def test_photos_of_any_shape(size: tuple[int, int], tmp_path: Path) -> None:
    """Sides that no stride divides, the smallest photo, panoramas: restored, in their own size, in both precisions."""
    name = str(save_tiny_model(tmp_path / "model"))
    task = TaskOptions("denoise", 0.05, degrade=True)
    pixels = randn(3, *size).clamp(-1, 1)
    means = []
    for precision in ("float32", "bfloat16"):
        denoiser = load_model(name, precision=precision)
        result = restore(build_problem(Photo(pixels), task), denoiser, task, RestoreOptions(samples=2, nfe=1))
        assert result.mean.shape == (1, 3, *size)
        assert result.report["precision"] == precision
        write(result, tmp_path / precision, {})
        assert result.picture(result.mean).size == size[::-1]
        means.append(result.mean)
    torch.testing.assert_close(means[0], means[1], rtol=0, atol=0.05)
    assert not torch.equal(means[0], means[1])


@pytest.mark.parametrize("size", [(140, 150), (60, 240)], ids=["photo", "panorama"])
def test_tiled_restoration_agrees_with_untiled(size: tuple[int, int], tmp_path: Path) -> None:
    """A photo too large for memory would be another photo: with the receptive radius as the halo, within 1e-3 (here
    rounding); the trained network's own error at the default halo is in docs/speed.md."""
    denoiser = load_model(str(save_tiny_model(tmp_path / "model")))
    network = denoiser.backbone.backbone
    assert isinstance(network, PhotoNet)
    task = TaskOptions("inpaint", 0.05, degrade=True)
    p = build_problem(Photo(randn(3, *size).clamp(-1, 1)), task)
    whole = ExactPosterior(denoiser, p.A, p.y, 0.05).mean()
    denoiser.backbone = TiledBackbone(network, core=32, halo=network.receptive_radius, blend=8)
    assert len(tile_axis(size[1], 32, network.receptive_radius, 8, network.stride)) > 1
    tiled = ExactPosterior(denoiser, p.A, p.y, 0.05).mean()
    assert float((tiled - whole).abs().max()) < 1e-5


def test_tiles_are_as_large_as_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles where none are needed double the work; a whole image where there is no room ends in a crash."""
    network = tiny_network()
    tiled = TiledBackbone(network)
    x = torch.empty(1, 3, 2000, 1000)
    needed = 2000 * 1000 * network.bytes_per_pixel()
    for free, expected in ((10**12, 2000), (4 * needed, 2000), (4 * needed - 4, 1024), (needed, 384), (0, 256)):
        monkeypatch.setattr(tiling, "free_memory", lambda device, free=free: free)
        assert tiled.largest_core(x) == expected
    monkeypatch.setattr(tiling, "free_memory", lambda device: 4 * needed)
    assert tiled.largest_core(torch.empty(2, 3, 2000, 1000)) == 512
    less = ReducedPrecision(network)
    assert less.bytes_per_pixel() < network.bytes_per_pixel()
    assert TiledBackbone(less).largest_core(torch.empty(2, 3, 2000, 1000)) >= 512
    assert TiledBackbone(network, core=100).core == 100
    with pytest.raises(ValueError, match="core"):
        TiledBackbone(network, core=0)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_stated_memory_is_what_it_takes(precision: str) -> None:
    """Too low a figure ends in a crash, one far too high in tiles that nobody needs."""
    network: torch.nn.Module = PhotoNet(channels=(32, 48, 64), blocks=(1, 1, 1), embedding=16)
    network = network if precision == "float32" else ReducedPrecision(network)
    arguments = problem(192, 192)
    with torch.no_grad():
        network(*arguments)
        taken = peak_memory(lambda: network(*arguments)) * 2**20 / 192**2
    stated = network.bytes_per_pixel()
    assert taken <= stated <= 2 * taken


def test_free_memory(tmp_path: Path) -> None:
    """A container's limit, which the machine's own figure does not know, or a system that says nothing."""
    proc, group = tmp_path / "proc", tmp_path / "group"
    for folder in (proc / "self", group / "memory"):
        folder.mkdir(parents=True)
    assert free_memory(proc=proc, cgroup=group) > 0  # a share of what there is
    (proc / "meminfo").write_text("MemTotal:       9000000 kB\nMemAvailable:   4000000 kB\n")
    assert free_memory(proc=proc, cgroup=group) == 4000000 * 1024
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("500000000\n")
    assert free_memory(proc=proc, cgroup=group) == 4000000 * 1024
    (group / "memory.max").write_text("2000000000\n")
    (group / "memory.stat").write_text("anon 3\ninactive_file 100000000\n")
    assert free_memory(proc=proc, cgroup=group) == 1600000000
    (group / "memory.current").write_text("2500000000\n")
    assert free_memory(proc=proc, cgroup=group) == 0
    (group / "memory.max").unlink()
    (group / "memory" / "memory.limit_in_bytes").write_text("1000\n")
    (group / "memory" / "memory.usage_in_bytes").write_text("400\n")
    assert free_memory(proc=proc, cgroup=group) == 600


def test_freed_memory_is_kept() -> None:
    """Every large tensor would be made of new pages: a third of a large photo's time. In a process of its own, which
    stays so; page faults are counted, not seconds."""
    if platform.libc_ver()[0] != "glibc":
        assert not keep_freed_memory()
        return
    code = """
import resource, torch
from posteriori.memory import keep_freed_memory
x = torch.ones(2**24)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        y = x * 2
        del y
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first = faults()
assert keep_freed_memory()
for _ in range(3):  # the heap may grow once more, until the first blocks lie beside each other
    faults()
print(first, faults())
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    before, after = map(int, out.split())
    assert after < before / 10


def test_bfloat16_is_for_processors_that_have_it(tmp_path: Path) -> None:
    """Emulated it is slower than float32; and a network nobody measured it on must not lose digits unasked."""
    info = tmp_path / "cpuinfo"
    assert not cpu_has_bfloat16(info)
    info.write_text("flags : fpu avx512f avx512bw\n")
    assert not cpu_has_bfloat16(info)
    info.write_text("flags : fpu avx512_bf16 clzero\n")
    assert cpu_has_bfloat16(info)
    assert choose_precision(torch.nn.Conv2d(1, 1, 1)) == "float32"
    assert choose_precision(tiny_network(), "cuda") == "float32"


@pytest.mark.parametrize(
    ("has", "single", "half", "chosen"),
    [
        (True, 2.0, 1.0, "bfloat16"),
        (True, 1.0, 2.0, "float32"),
        (True, 1.05, 1.0, "float32"),
        (False, 2.0, 1.0, "float32"),
    ],
)
def test_bfloat16_is_for_processors_that_are_quicker_in_it(
    has: bool, single: float, half: float, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processors with half as many units for it as for float32 would be slowed down to half their speed."""
    times = {torch.float32: single, torch.bfloat16: half}
    monkeypatch.setattr(precisions, "cpu_has_bfloat16", lambda: has)
    monkeypatch.setattr(precisions, "_seconds", lambda dtype: times[dtype])
    precisions._bfloat16_speedup.cache_clear()
    try:
        assert choose_precision(tiny_network()) == chosen
    finally:
        precisions._bfloat16_speedup.cache_clear()


def test_bfloat16_is_tried_out_in_little_time() -> None:
    """What saves time must not take it: loading a model waits for this. And it is what a convolution of the network's
    size takes, not the first call's preparations."""
    precisions._bfloat16_speedup.cache_clear()
    began = time.perf_counter()
    speedup = precisions._bfloat16_speedup()
    assert time.perf_counter() - began < 2  # 25 ms, were nothing else running; emulated bfloat16 is slower
    assert 0.001 < speedup < 100
    assert precisions._bfloat16_speedup() == speedup


def test_reduced_precision_is_the_network_rounded() -> None:
    """Solves, noise levels or a whole layer in half precision would be off by far more than its 8 bits; gradients,
    which some methods are made of, stay exact."""
    network = tiny_network().requires_grad_(False)
    reduced = ReducedPrecision(network)
    arguments = problem(40, 32, batch=2)
    with torch.no_grad():
        exact, rounded = network(*arguments), reduced(*arguments)
    assert rounded.dtype == torch.float32
    error = float((rounded - exact).square().mean().sqrt() / exact.square().mean().sqrt())
    assert 1e-4 < error < 0.02
    x = arguments[0].requires_grad_()
    assert torch.equal(reduced(x, *arguments[1:]), network(x, *arguments[1:]))
    assert [n for n, _ in reduced.named_parameters()] == [f"backbone.{n}" for n, _ in network.named_parameters()]
    assert all(p.dtype == torch.float32 for p in reduced.parameters())


def test_no_gradient_changes_nothing() -> None:
    """Without gradients memory is used again in place: an activation needed later must not be overwritten."""
    network = tiny_network()
    arguments = problem(24, 40)
    expected = network(*arguments).detach()
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(network(*arguments), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(arguments[0], problem(24, 40)[0])
