"""What the assembler made of the sample kernels, held to a budget; and the reader of machine code itself."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ptxemu import nvcc_run, sass, triton_run
from ptxemu.budgets import Budget, load_budgets
from ptxemu.flow import Instruction, Label, Line, link, natural_loops, skippable

BUDGETS = load_budgets()


def triton_code(source: str, kernel: str, arch: str, **more: int) -> sass.Code:
    """A Triton sample's kernel at the size and dtype that its budget is for; more: Triton options."""
    pytest.importorskip("triton")
    from ptxemu.samples import flash_fwd, layer_norm_bwd

    if source == "flash_fwd.py":
        q, o = torch.empty(2, 1, 8, 1024, 64, dtype=torch.bfloat16)
        k, v = torch.empty(2, 1, 2, 1024, 64, dtype=torch.bfloat16)
        fn, args, options = flash_fwd.plan(
            *(q, k, v, o, torch.empty(1, 8, 1024)),
            causal=True,
            tma=kernel == "flash_fwd_tma_kernel",
            tiles=flash_fwd.Tiles(block_m=128, block_n=64, warps=8, stages=2),
        )
    else:
        way = kernel.removesuffix("_kernel")
        x, dy, dx = torch.empty(3, 64, 1024, dtype=torch.bfloat16)
        w, (mean, rstd) = x[0], torch.empty(2, 64)
        fn, args, options = layer_norm_bwd.plan(
            way, dx, dy, x, w, mean, rstd, torch.empty(2, 8, 1024)
        )
        options["enable_fp_fusion"] = False
    assert fn.__name__ == kernel
    target = int(arch) if arch.isdigit() else arch
    compiled = triton_run.compile_kernel(fn, *args, arch=target, **options, **more)
    if arch.startswith("gfx"):
        return sass.parse_gcn(compiled.amdgcn)[kernel]
    return sass.read_cubin(compiled.cubin)[kernel]


def code_of(kernel: str, arch: str) -> sass.Code:
    """The machine code of "file kernel"; skips where its compiler is missing."""
    source, name = kernel.split()
    try:
        if source.endswith(".py"):
            return triton_code(source, name, arch)
        return sass.read_cubin(nvcc_run.compile_cubin(nvcc_run.SAMPLES / source, arch))[name]
    except (nvcc_run.NvccNotFound, sass.ToolNotFound) as missing:
        pytest.skip(str(missing))


CASES = [
    pytest.param(
        kernel,
        arch,
        id=f"{kernel.replace(' ', ':')}-{arch}",
        marks=[pytest.mark.triton] if ".py " in kernel else [],
    )
    for kernel, arch in BUDGETS
]


@pytest.mark.parametrize(("kernel", "arch"), CASES)
def test_kernel_stays_in_its_budget(kernel: str, arch: str) -> None:
    faults = BUDGETS[kernel, arch].faults(code_of(kernel, arch))
    assert not faults, "\n".join(faults)


@pytest.mark.triton
def test_spills_break_the_budget() -> None:
    """The same kernel in half of its registers."""
    code = triton_code("flash_fwd.py", "flash_fwd_kernel", "80", maxnreg=96)
    faults = BUDGETS["flash_fwd.py flash_fwd_kernel", "80"].faults(code)
    assert [f.split()[1] for f in faults[:2]] == ["stack", "spills"], faults


# What `cuobjdump -res-usage` and `nvdisasm -c` print, shortened.
USAGE = """
Resource usage:
 Common:
  GLOBAL:0
 Function scale:
  REG:14 STACK:8 SHARED:16 LOCAL:0 CONSTANT[0]:552 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
SASS = """
//--------------------- .text.scale               --------------------------
scale:
.text.scale:
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;
        /*0010*/               @P0 EXIT ;
.L_x_0:
        /*0020*/                   LDSM.16.MT88.4 R4, [R2] ;
        /*0030*/                   STL [R1], R4 ;
        /*0040*/               @P2 BRA `(.L_x_3) ;
.L_x_1:
        /*0050*/                   HMMA.16816.F32.BF16 R4, R4, R8, R4 ;
        /*0060*/                   HMMA.16816.F32.BF16 R8, R4, R8, R4 ;
        /*0070*/                   BRA.U UP0, `(.L_x_0) ;
        /*0080*/                   EXIT ;
.L_x_3:
        /*0090*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R3 ;
        /*00a0*/              @!P0 BRA `(.L_x_3) ;
        /*00b0*/                   BRA `(.L_x_1) ;
.L_x_4:
        /*00c0*/                   BRA `(.L_x_4);
//--------------------- .nv.shared.scale          --------------------------
"""
GCN = """
scale:                                  ; @scale
; %bb.0:
	s_load_dword s25, s[0:1], 0x68
.LBB0_1:                                ; =>This Inner Loop Header
	v_mfma_f32_32x32x8_bf16 v[0:15], v[0:1], v[2:3], v[0:15]
	s_cbranch_scc0 .LBB0_1
	s_endpgm
.Lfunc_end0:
	.amdgpu_metadata
amdhsa.kernels:
  - .agpr_count:     16
    .args:
      - .offset:         0
        .size:           8
    .group_segment_fixed_size: 512
    .name:           scale
    .private_segment_fixed_size: 24
    .sgpr_count:     32
    .sgpr_spill_count: 2
    .vgpr_count:     48
    .vgpr_spill_count: 1
amdhsa.target:   amdgcn-amd-amdhsa--gfx942
"""


def test_sass_is_read() -> None:
    code = sass.parse_sass(USAGE, SASS)["scale"]
    assert (code.registers, code.stack, code.shared) == (14, 8, 16)
    assert (code.spill_stores, code.spill_loads, code.body.issue) == (1, 0, 13)
    # The rarely taken wait at the end belongs to the loop, but is not the main one.
    assert code.main_loop.issue == 9
    assert code.main_loop.count("LDSM") == 1
    assert code.main_loop.count("LDS", "LD") == 0
    assert code.main_loop.per_mma("LDSM") == 0.5


def test_gcn_is_read() -> None:
    code = sass.parse_gcn(GCN)["scale"]
    assert (code.registers, code.accumulators, code.scalars) == (48, 16, 32)
    assert (code.stack, code.shared, code.vgpr_spills, code.sgpr_spills) == (24, 512, 1, 2)
    assert code.body.issue == 4
    assert code.main_loop.opcodes == {"v_mfma_f32_32x32x8_bf16": 1, "s_cbranch_scc0": 1}


def test_missing_code_is_an_error() -> None:
    with pytest.raises(ValueError, match="other: no code of that name"):
        sass.parse_sass(USAGE.replace("scale", "other"), SASS)


def chain(*edges: tuple[int, ...], ends: tuple[int, ...] = ()) -> tuple[Instruction, ...]:
    """Instruction i may jump to edges[i]; those in `ends` do not go on to the next."""
    return tuple(Instruction(f"op{i}", to, i not in ends) for i, to in enumerate(edges))


def test_loops_of_control_flow() -> None:
    nested = chain((), (), (1,), (0,))
    assert natural_loops(nested) == [{1, 2}, {0, 1, 2, 3}]
    # 3 is out of the way of 0 1 2, and jumps back: no loop.
    assert natural_loops(chain((), (3,), (), (2,), ends=(2, 3))) == []
    # Two ways into a cycle: neither instruction is passed on all ways, so it is no natural loop.
    assert natural_loops(chain((2,), (), (1,))) == []
    assert natural_loops(()) == []


def test_what_a_round_may_pass_by() -> None:
    code = chain((), (1,), (4,), (), (0,))  # a wait for itself, a jump over 3, and the round's end
    assert natural_loops(code) == [{1}, {0, 1, 2, 3, 4}]
    assert skippable(code, natural_loops(code)[1]) == [range(3, 4)]
    assert skippable(code, natural_loops(code)[0]) == []
    # Either of two ways may be passed by, whichever ends the round.
    code = chain((), (3,), (0,), (0,), ends=(2,))
    assert skippable(code, natural_loops(code)[-1]) == [range(2, 3), range(3, 4)]
    assert skippable(code, frozenset()) == []


def test_labels_are_linked() -> None:
    lines: list[Label | Line] = [
        Label("a"),
        Line("x"),
        Line("j", ("a", "b", "elsewhere"), False),
        Label("b"),
    ]
    assert link(lines) == (Instruction("x"), Instruction("j", (0, 2), False))
    assert natural_loops(link(lines)) == [{0, 1}]


def test_longest_loop_without_tensor_cores() -> None:
    code = sass.parse_sass(USAGE, SASS.replace("HMMA", "FFMA"))["scale"]
    # The wait is the inner of two loops: it is what remains when nothing tells the work.
    assert code.main_loop.opcodes == {"SYNCS.PHASECHK.TRANS64.TRYWAIT": 1, "BRA": 1}


def test_budget_names_what_is_over() -> None:
    code = sass.parse_sass(USAGE, SASS)["scale"]
    good = Budget(14, 8, 1, {"EXIT": (2, 2)}, {"LDSM": (1, 1), "issue/mma": (0, 4.5)})
    assert good.faults(code) == []
    bad = replace(good, registers=13, spills=0, loop={"LDSM/mma": (0.6, 1), "issue": (0, 8)})
    assert bad.faults(code) == [
        "scale: registers 14, budget 0 to 13",
        "scale: spills 1, budget 0 to 0",
        "scale: loop LDSM/mma 0.5, budget 0.6 to 1",
        "scale: loop issue 9, budget 0 to 8",
    ]


def test_lost_ldmatrix_breaks_every_tensor_core_budget() -> None:
    for (kernel, arch), budget in BUDGETS.items():
        if "HMMA" in budget.loop:
            opcodes = {name: int(span[0]) for name, span in budget.loop.items() if "/" not in name}
            lost = opcodes.pop("LDSM")
            code = sass.Sass(kernel, 1, 0, 0, loop_of(opcodes | {"LDS.U16": lost}))
            assert [f for f in budget.faults(code) if "LDSM 0" in f], (kernel, arch)


def loop_of(opcodes: dict[str, int]) -> tuple[Instruction, ...]:
    """A loop of these instructions."""
    names = list(Counter(opcodes).elements())
    return (*(Instruction(name) for name in names), Instruction("BRA", (0,)))


def test_command_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "scale.s"
    path.write_text(GCN)
    assert sass.main([str(path)]) == 0
    printed = capsys.readouterr().out
    assert "scale: 48 registers, stack 24 B" in printed
    assert "v_mfma_f32_32x32x8_bf16" in printed
    assert sass.main([]) == 2


def test_missing_tool_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sass.shutil, "which", lambda name: None)
    with pytest.raises(sass.ToolNotFound, match="nvtool: neither in Triton"):
        sass.find_tool("nvtool")


def test_bad_cubin_is_refused() -> None:
    try:
        sass.find_tool("cuobjdump")
    except sass.ToolNotFound as missing:
        pytest.skip(str(missing))
    with pytest.raises(ValueError, match="cuobjdump"):
        sass.read_cubin(b"no cubin")
