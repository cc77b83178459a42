"""Bugs in the CUDA C++ sample for sm_90: flash_fwd_sm90.cu, with TMA, wgmma and warps of different roles."""

from __future__ import annotations

from ptxemu.mutations import mutant

_FLASH, _WGMMA, _SM90 = "flash_fwd_sm90.cu", "wgmma.cuh", "primitives_sm90.cuh"
_KERNEL = "flash sm90"

PRODUCTS = [
    mutant("scores are read before their product is done", _KERNEL, _FLASH,
           "    wgmma_wait<1>();\n", "", "async-unwaited"),
    mutant("accumulator is read one group too early", _KERNEL, _FLASH,
           "    wgmma_wait<0>();\n    pin(o);\n    shared.v.release(i - 1);",
           "    wgmma_wait<1>();\n    pin(o);\n    shared.v.release(i - 1);", "async-unwaited"),
    mutant("last product is not waited for", _KERNEL, _FLASH,
           "    start_values(walk.tiles - 1);\n    wgmma_wait<0>();\n", "    start_values(walk.tiles - 1);\n", "async-unwaited"),
    mutant("no fence before the product with the keys", _KERNEL, _FLASH,
           "    pin(s);\n    wgmma_fence();\n", "    pin(s);\n", "async-unwaited"),
    mutant("no fence before the product with the values", _KERNEL, _FLASH,
           "    pin(o);\n    wgmma_fence();\n", "    pin(o);\n", "async-unwaited"),
    mutant("product with the keys is not committed", _KERNEL, _FLASH,
           "step > 0, T());\n    wgmma_commit();\n", "step > 0, T());\n", "async-unwaited"),
    mutant("scores of the tile before are added", _KERNEL, _FLASH, "k + 2 * step, step > 0, T()", "k + 2 * step, 1, T()", "numerics"),
    mutant("descriptor steps by elements, not by 16 bytes", _KERNEL, _FLASH,
           "k + 2 * step, step > 0", "k + 16 * step, step > 0", "numerics"),
    mutant("descriptor names the swizzle of 64 bytes", _KERNEL, _WGMMA,
           "         uint64_t(1) << 62;", "         uint64_t(2) << 62;", "numerics"),
    mutant("descriptor with the stride of half a group", _KERNEL, _WGMMA, "uint64_t(1024 >> 4) << 32", "uint64_t(512 >> 4) << 32", "numerics"),
    mutant("left operand is taken for rows of 16 keys", _KERNEL, _FLASH, "v + 128 * j", "v + 64 * j", "numerics"),
    mutant("values are not transposed by the product", _KERNEL, _WGMMA, "%36, 1, 1, 1, 1;", "%36, 1, 1, 1, 0;", "numerics"),
]  # fmt: skip

PIPELINE = [
    mutant("producer does not wait for an empty stage", _KERNEL, _FLASH,
           "    mbarrier_wait(shared_address(&empty[i % 2]), i / 2 % 2 ^ 1);\n", "", "race async-unwaited"),
    mutant("producer waits for the wrong phase", _KERNEL, _FLASH, "i / 2 % 2 ^ 1);", "i / 2 % 2);", "deadlock"),
    mutant("consumer waits for the wrong phase", _KERNEL, _FLASH,
           "mbarrier_wait(shared_address(&full[i % 2]), i / 2 % 2);", "mbarrier_wait(shared_address(&full[i % 2]), i % 2);",
           "async-unwaited deadlock"),
    mutant("consumer does not wait for its tile", _KERNEL, _FLASH,
           "    mbarrier_wait(shared_address(&full[i % 2]), i / 2 % 2);\n", "", "async-unwaited"),
    mutant("phase changes with every copy", _KERNEL, _FLASH, "i / 2 % 2 ^ 1);", "i % 2 ^ 1);", "deadlock race async-unwaited"),
    mutant("barrier expects half of the bytes", _KERNEL, _FLASH,
           "mbarrier_arrive_expect(barrier, BLOCK_N * ROW);", "mbarrier_arrive_expect(barrier, BLOCK_N * ROW / 2);",
           "async-unwaited deadlock invalid"),
    mutant("barrier expects more bytes than come", _KERNEL, _FLASH,
           "mbarrier_arrive_expect(barrier, BLOCK_N * ROW);", "mbarrier_arrive_expect(barrier, BLOCK_N * ROW + 16);", "deadlock"),
    mutant("barrier for one consumer too many", _KERNEL, _FLASH, "4 * CONSUMERS);", "4 * CONSUMERS + 1);", "deadlock"),
    mutant("barrier for one warp of a consumer", _KERNEL, _FLASH, "4 * CONSUMERS);", "CONSUMERS);", "race async-unwaited deadlock"),
    mutant("stage of the keys is never released", _KERNEL, _FLASH, "    shared.k.release(i);\n", "", "deadlock"),
    mutant("stage of the values is released while it is read", _KERNEL, _FLASH,
           "    wgmma_wait<0>();\n    pin(o);\n    shared.v.release(i - 1);\n", "    shared.v.release(i - 1);\n    wgmma_wait<0>();\n    pin(o);\n",
           "race async-unwaited"),
    mutant("queries are not waited for", _KERNEL, _FLASH,
           "  mbarrier_wait(shared_address(&shared.q_full), 0);\n", "", "async-unwaited"),
    mutant("barriers are used before they are initialised", _KERNEL, _FLASH,
           "  __syncthreads();\n  const Walk walk(p);", "  const Walk walk(p);", "invalid race uninitialised"),
    mutant("output leaves before all warps have written it", _KERNEL, _FLASH,
           "  async_fence();\n  named_barrier(group, 128);\n", "  async_fence();\n", "race async-unwaited"),
    mutant("output is written over queries in use", _KERNEL, _FLASH,
           "  named_barrier(group, 128);  // all four warps have used q\n", "", "",
           "PTX does not say which warp of a warpgroup reads which rows of the left operand; each is taken to read its own 16"),
    mutant("output is not fenced for the copy engine", _KERNEL, _FLASH, "  async_fence();\n  named", "  named", "async-unwaited"),
    mutant("block exits before its output has been read", _KERNEL, _FLASH, "    bulk_wait_read<0>();\n", "", "async-unwaited"),
    mutant("output is not committed", _KERNEL, _FLASH, "    bulk_commit();\n    bulk_wait_read", "    bulk_wait_read", "async-unwaited"),
    mutant("swizzle of the output differs from its map", _KERNEL, _FLASH, "((chunk ^ (line & 7)) << 4)", "(chunk << 4)",
           "numerics conflicts"),
    mutant("both consumers share a barrier", _KERNEL, _FLASH,
           "  async_fence();\n  named_barrier(group, 128);\n", "  async_fence();\n  named_barrier(1, 128);\n", "race deadlock async-unwaited invalid"),
    mutant("tile of the wrong keys", _KERNEL, _FLASH, "return (tiles - 1 - i) * BLOCK_N;", "return i * BLOCK_N;", "numerics"),
    mutant("barriers are not made visible to the copy engine", _KERNEL, _SM90,
           'asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");', "", "",
           "fences order what different hardware sees when; the emulator executes in one order, in which all is visible"),
]  # fmt: skip

MUTANTS = PRODUCTS + PIPELINE
