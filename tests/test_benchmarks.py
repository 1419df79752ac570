"""The benchmarks run, count right, and their page is the one that their results make."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import ahead, page
from benchmarks.measure import processor
from benchmarks.peaks import Peak, called_bytes, count_flops
from benchmarks.projection import Assumptions, Step, project
from cnnjax.cli import guarded
from cnnjax.config import ModelConfig
from cnnjax.errors import InputError
from cnnjax.networks import make_model
from cnnjax.ops import ffi

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"


def process(name: str, *flags: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"benchmarks.{name}", *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def test_a_projection_is_that_worked_out_by_hand() -> None:
    step = Step(ms=2.0, batch=32, size=64, parameters=1_000_000, norms=10)
    given = Assumptions(per_machine=8, inner_gb_s=100, outer_gb_s=10, inner_us=1, outer_us=5)
    alone = project(step, given, 1)
    assert (alone["step_ms"], alone["efficiency"], alone["most"]) == (2.0, 1.0, "compute")
    two = project(step, given, 16)
    # 4 MB: a ring of 8 devices, then an eighth of it between two machines; 14 and 2 turns.
    ring = 2 * 4e6 * 7 / 8 / 100e9 + 2 * 4e6 / 8 / 2 / 10e9
    assert two["gradients_ms"] == pytest.approx(1e3 * (ring + 14e-6 + 10e-6))
    assert two["batch_norm_ms"] == pytest.approx(1e3 * 40 * 2 * (3 * 1e-6 + 5e-6))
    pixels = 32 * 16 * 64 * 64
    moved = pixels * 7 / 8 / 100e9 + pixels / 8 / 2 / 10e9
    assert two["images_ms"] == pytest.approx(1e3 * (moved + 7e-6 + 5e-6))
    assert two["step_ms"] == pytest.approx(sum(two[f"{p}_ms"] for p in PARTS))
    streamed = project(step, replace(given, read_images_s=64_000), 16)
    assert (streamed["images_ms"], streamed["reading_ms"]) == (0, 32 * 8 / 64_000 * 1e3 - 2)
    assert streamed["most"] in PARTS


PARTS = ("compute", "gradients", "batch_norm", "images", "reading")


@pytest.mark.parametrize("batch", [2, 32])
def test_flops_are_those_counted_by_hand(monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    """Also where oneDNN would pool in the same call, as it does from some size on."""
    monkeypatch.setattr(ffi, "available", lambda: True)
    forward, train = count_flops(make_model(ModelConfig("baseline")), batch, size=64)
    first = 2 * 62 * 62 * 32 * 9
    rest = 2 * 29 * 29 * 32 * 9 * 32 + 2 * 6272 * 128 + 2 * 128
    assert forward == batch * (first + rest)
    assert train == batch * (2 * first + 3 * rest)
    peak = Peak(flops=1e12, bandwidth=1e9, source="measured")
    assert peak.bound(2e12, 1e6) == 2.0  # by operations
    assert peak.bound(1e9, 3e9) == 3.0  # by memory


def test_flops_of_local_contrast_count_forward_alone() -> None:
    network = ModelConfig("resnet", width=4, stages=1, standardize=True)
    plain = count_flops(make_model(network), 2, size=32)
    both = count_flops(make_model(replace(network, local_contrast=True)), 2, size=32)
    means, stem = 2 * 2 * 2 * 32**3, 2 * 16 * 16 * 4 * 9  # two means, each of two products
    assert both[0] - plain[0] == 2 * (means + stem)
    assert both[1] - plain[1] == 2 * (means + 2 * stem)


CALLS = """\
ENTRY %main (x: f32[2,8,8,1], k: bf16[3,3,1,4]) -> f32[2,8,8,4] {
  %x = f32[2,8,8,1]{3,2,1,0} parameter(0)
  %k = bf16[3,3,1,4]{3,2,1,0} parameter(1)
  %conv.1 = (f32[2,8,8,4]{3,2,1,0}, u8[2,8,8,4]{3,2,1,0}, u8[4096]{0}) custom-call(%x, %k), \
custom_call_target="convolve", operand_layout_constraints={f32[2,8,8,1]{3,2,1,0}}
  ROOT %y = f32[2,8,8,4]{3,2,1,0} get-tuple-element(%conv.1), index=0
}
"""


def test_bytes_of_calls_are_those_of_their_arrays() -> None:
    assert called_bytes(CALLS) == 4 * 2 * 8 * 8 + 2 * 3 * 3 * 4 + (4 + 1) * 2 * 8 * 8 * 4
    assert called_bytes(HLO) == 0


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fpu avx2 avx512f amx_tile", "Some CPU, AMX"),
        ("fpu avx2 avx512f", "Some CPU, AVX-512"),
        ("fpu avx avx2", "Some CPU, AVX2"),
        ("fpu", "Some CPU"),
    ],
)
def test_processors_of_one_name_are_told_apart(tmp_path: Path, flags: str, expected: str) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: {flags}\n\n" * 2)
    assert processor(cpuinfo) == expected
    assert processor(tmp_path / "none")


@pytest.mark.slow
def test_step_time_writes_its_rows(tmp_path: Path) -> None:
    flags = ["--networks", "baseline", "--batches", "2", "4", "--sizes", "16", "--rounds", "1"]
    flags += ["--steps", "1", "--device", "cpu"]
    out, plot = tmp_path / "rows.json", tmp_path / "plot.svg"
    done = process("step_time", *flags, "--json", out, "--plot", plot)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert {(row["step"], row["batch"]) for row in found["rows"]} == {
        (step, batch) for step in ("train", "eval") for batch in (2, 4)
    }
    for row in found["rows"]:
        assert row["images_per_second"] == pytest.approx(row["batch"] / row["median_ms"] * 1e3)
        assert row["compile_seconds"] > 0
        assert row["of_bound"] == pytest.approx(row["bound_ms"] / row["median_ms"])
    assert found["circumstances"]["platform"] == "cpu"
    assert plot.read_text().startswith("<?xml")


@pytest.mark.slow
def test_a_peer_is_proven_to_be_the_same_network_and_timed(tmp_path: Path) -> None:
    """Though another fails."""
    flags = ["--peers", "torch", "numpy", "--networks", "resnet", "--batches", "4", "--size", "32"]
    flags += ["--width", "4", "--rounds", "2", "--steps", "1", "--environments", str(tmp_path)]
    out = tmp_path / "rows.json"
    python = tmp_path / "torch" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho 'no CUDA here' >&2\nexit 1\n")
    python.chmod(0o755)
    done = process("peers", *flags, "--device", "cpu", "--json", out)
    assert done.returncode == 0, done.stderr
    assert "left out: torch eager stopped: no CUDA here" in done.stderr
    found = json.loads(out.read_text())
    assert {row["peer"] for row in found["left_out"]} == {
        f"torch {form}" for form in ("eager", "eager channels_last", "compiled")
    }
    (row,), (proof,) = found["rows"], found["proofs"]
    assert (row["network"], row["peer"], row["precision"]) == ("resnet", "numpy", "float32")
    assert 0 < row["ratio_min"] <= row["ratio"] <= row["ratio_max"]
    assert 0 < proof["logits"] < 1e-4
    assert proof["losses"] < 1e-3


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("step_time", "--device gpu", "--device.platform gpu: JAX finds no such device"),
        ("step_time", "--rounds 0", "--rounds must be at least 1, got 0"),
        ("peers.__main__", "--batches 0", "--batches must be numbers of at least 1"),
        ("input", "--data nowhere", "nowhere does not exist"),
        ("page", "--keep x.json", "--keep x.json: write FILE=SECTION"),
        ("ahead", "--batches 6", "--batches must be multiples of 4, the largest number of devices"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    flags: str,
    message: str,
) -> None:
    monkeypatch.setattr(sys, "argv", [name, *flags.split()])
    assert guarded(importlib.import_module(f"benchmarks.{name}").main) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert message in told
    assert len(told.splitlines()) == 1


def test_the_page_is_made_of_the_results(tmp_path: Path) -> None:
    assert page.page(tmp_path) == (BENCHMARKS / "README.md").read_text("utf-8")
    assert {path.name for path in tmp_path.iterdir()} == {
        path.name for path in (BENCHMARKS / "results").glob("*.svg")
    }


def test_what_is_unknown_is_left_empty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As the peak of an accelerator for float32 in full, and the bound that follows of it."""
    kept = json.loads((BENCHMARKS / "results" / "amd-epyc-avx2.json").read_text("utf-8"))
    section = kept["step_time"]
    row = section["rows"][0] | {"network": "unknown", "mfu": None, "of_bound": None}
    section["rows"].append(row)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "gpu.json").write_text(json.dumps({"step_time": section}))
    monkeypatch.setattr(page, "RESULTS", tmp_path / "results")
    (line,) = (one for one in page.page(tmp_path).splitlines() if "| unknown |" in one)
    *_, mfu, of_the_roofline, mib, _ = line.split("|")
    assert mfu.strip() == of_the_roofline.strip() == ""
    assert mib.strip()


HLO = """\
%fused_one (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %b = f32[4]{0} multiply(%a, %a)
  %c = f32[4]{0} add(%b, %a)
  ROOT %d = f32[4]{0} exponential(%c)
}

%body (s: (s32[], f32[4])) -> (s32[], f32[4]) {
  %s = (s32[], f32[4]{0}) parameter(0)
  %x = f32[4]{0} get-tuple-element(%s), index=1
  %copy.1 = f32[4]{0} copy(%x)
  %fusion.2 = (f32[4]{0}, f32[4]{0}) fusion(%copy.1), kind=kLoop, calls=%fused_one
  ROOT %t = (s32[], f32[4]{0}) tuple(%s, %fusion.2)
}

ENTRY %main (p: f32[4]) -> f32[4] {
  ROOT %w = (s32[], f32[4]{0}) while(%p), condition=%cond, body=%body
}
"""


def test_launches_are_those_of_the_loops_body() -> None:
    assert ahead.launches(HLO) == 2  # the copy and the fusion, but not what is fused


@pytest.mark.skipif(importlib.util.find_spec("jax_plugins") is not None, reason="CUDA is here")
def test_ahead_says_what_it_needs() -> None:
    with pytest.raises(InputError, match=r'pip install "jax\[cuda13\]"') as told:
        ahead.mesh_of("h100", 1)
    assert "\n" not in str(told.value)
