"""Counts from listings of machine code: ``bench/gpu/machine_code.py``."""

import pytest

from bench.gpu.machine_code import Round, costliest_round


def listing(*instructions):
    """What cuobjdump prints of instructions, 16 bytes each; the encoding is not read."""
    return "\n".join(
        f"        /*{16 * i:04x}*/                   {instruction} ;  /* 0x000fe200078e00ff */"
        for i, instruction in enumerate(instructions)
    )


HMMA = "HMMA.16816.F32.BF16 R4, R8, R12, R4"
SHORT = "HMMA.1688.F32.TF32 R4, R8, R12, R4"
WIDE = "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24, gsb0"
STORE = "@P0 STG.E desc[UR4][R2.64], R5"
CASES = {
    # The branch at the end of every kernel jumps to itself.
    "no loop": (("MOV R1, c[0x0][0x28]", "EXIT", "BRA 0x20"), 4, None),
    "a forward branch is no loop": (("@P0 BRA 0x20", HMMA, "EXIT"), 4, None),
    "no-operations are not issued": (
        ("MOV R1, R2", "FADD R3, R3, R4", "NOP", STORE, "@!P0 BRA 0x10", "EXIT"),
        4,
        Round(3, 0, 0),
    ),
    "eight warps on four schedulers": (
        (HMMA, SHORT, "MUFU.EX2 R5, R5", "@P1 BRA 0x0"),
        8,
        Round(8, 16, 8 * (16 * 8 * 16 + 16 * 8 * 8)),
    ),
    "four warps share a wide product": (
        (WIDE, "UIADD3 UR4, UR4, 0x1, URZ", "@!UP0 BRA 0x0"),
        4,
        Round(3, 0, 64 * 128 * 16),
    ),
    "the innermost loop": (
        (WIDE, HMMA, "@P0 BRA 0x10", "@P1 BRA 0x0"),
        4,
        Round(2, 0, 4 * 16 * 8 * 16),
    ),
    "products before length": (
        (HMMA, "@P0 BRA 0x0", "FADD R3, R3, R4", "FADD R3, R3, R4", "@P0 BRA 0x20"),
        4,
        Round(2, 0, 4 * 16 * 8 * 16),
    ),
    "without products the longest": (
        ("FADD R3, R3, R4", "@P0 BRA 0x0", "MUFU.RCP R3, R3", "FADD R3, R3, R4", "@P0 BRA 0x20"),
        4,
        Round(3, 8, 0),
    ),
}


@pytest.mark.parametrize(("instructions", "warps", "expected"), CASES.values(), ids=CASES)
def test_costliest_round(instructions, warps, expected):
    assert costliest_round(listing(*instructions), warps) == expected
