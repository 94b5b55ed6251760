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


def test_loads_in_flight_end_at_their_first_use():
    (code,) = sass.kernels(STREAMING)
    assert (code.symbol, code.instructions, code.generic) == ("_Z8a_kernelv", 10, 0)
    (loop,) = code.loops
    assert loop == sass.Loop(7, 4, 3, 0, 0, 1, 0)


def test_a_branch_between_loads_ends_their_flight():
    (code,) = sass.kernels(
        listing(
            LOAD.format(4), "@P0 BRA 0x30", LOAD.format(8), LOAD.format(12), "@P1 BRA 0x0", "EXIT"
        )
    )
    assert code.loops[0].in_flight == 1  # the last load is where the first branch goes to


def test_only_innermost_loops_count():
    (code,) = sass.kernels(
        listing("NOP", "STS.128 [R1], R4", "@P0 BRA 0x10", "LDG.E R4, [R2]", "@P1 BRA 0x0", "EXIT")
    )
    (loop,) = code.loops
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


def test_table_of_machine_code_gives_ranges():
    rows = cuda_resources.machine_code([kernel(STREAMING)]).splitlines()
    assert rows[2] == "| a | sm_90 | 0 | 3 | 2 | – | 19 |"
