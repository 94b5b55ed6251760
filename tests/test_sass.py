"""What ``bench.gpu.sass`` reads from machine code, and the limits of ``make nvcc-check`` on it."""

from bench.gpu import cuda_resources, sass
from bench.gpu.resources import Usage


def listing(*instructions):
    """As cuobjdump prints a kernel, with sixteen bytes an instruction."""
    lines = [
        f"        /*{16 * i:04x}*/  {text} ;  /* 0x0 */" for i, text in enumerate(instructions)
    ]
    return "\n".join(["\t\tFunction : _Z8a_kernelv", *lines])


LOAD, USE = "LDG.E.128 R{}, desc[UR4][R2.64]", "FFMA R40, R{}, R41, R40"
# Two loads, a use of the first, two more loads: three are under way together. 0x10 is the loop.
STREAMING = listing(
    "MOV R1, R2",
    LOAD.format(4),
    LOAD.format(8),
    USE.format(5),
    LOAD.format(12),
    LOAD.format(16),
    "ISETP.NE.AND P0, PT, R3, RZ, PT",
    "@P0 BRA 0x10",
    "EXIT",
    "BRA 0x90",
)


def test_loops_and_their_loads_in_flight():
    """A load's flight ends at its first use, or at a branch. Only innermost loops count."""
    (code,) = sass.kernels(STREAMING)
    assert (code.symbol, code.instructions, code.generic) == ("_Z8a_kernelv", 10, 0)
    assert code.loops == (sass.Loop(7, 4, 3, 0, 0, 1, 0),)
    loads = [LOAD.format(register) for register in (4, 8, 12)]
    branch = listing(loads[0], "@P0 BRA 0x30", *loads[1:], "@P1 BRA 0x0", "EXIT")
    assert sass.kernels(branch)[0].loops[0].in_flight == 1  # the first branch goes to the last load
    inner = ("NOP", "STS.128 [R1], R4", "@P0 BRA 0x10")
    (loop,) = sass.kernels(listing(*inner, "LDG.E R4, [R2]", "@P1 BRA 0x0", "EXIT"))[0].loops
    assert (loop.instructions, loop.staged) == (2, 4)


def kernel(text, name="a<float>"):
    return cuda_resources.Kernel(Usage(name, "sm_90", 100, 0, 0, 0), sass.kernels(text)[0])


def test_machine_code_beyond_the_limits_is_told():
    copies = [line for i in range(4) for line in (f"LDG.E R{i}, [R8]", f"STS [R9], R{i}")]
    lean = listing(*copies, "@P0 BRA 0x0", "EXIT")
    assert cuda_resources.problems([kernel(lean)]) == []
    slow = listing(*copies, *["IADD3 R8, R8, R9, RZ"] * 80, "ST.E [R8], R1", "@P0 BRA 0x0", "EXIT")
    assert cuda_resources.problems([kernel(slow), kernel(STREAMING, "b<float>")]) == [
        "a<float>, sm_90: 1 loads and stores of unknown memory",
        "a<float>, sm_90: 22.5 instructions a staged element",
        "b<float>, sm_90: 3 loads of 16 bytes in flight, of a loop with 4 and 7 instructions",
    ]

    rows = cuda_resources.machine_code([kernel(STREAMING)]).splitlines()
    assert rows[2] == "| a | sm_90 | 0 | 3 | 2 | – | 19 |"
