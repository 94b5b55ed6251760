"""The emulation of CUDA blocks that the kernel tests run on: it detects wrong kernels."""

import subprocess

import cuda_emulation
import pytest

compiler = cuda_emulation.compiler()
pytestmark = pytest.mark.skipif(compiler is None, reason="no C++ compiler to build kernels with")

# One kernel per way to use barriers and memory. The first argument chooses the kernel.
PROGRAM = r"""
#include "emulation.h"
#include <string>

using emulation::shared_memory;

void sums_a_block() {  // 0 + 1 + ... + 95, over warps by shuffles, then over the block
  int sum = threadIdx.x;
  for (int lanes = 16; lanes; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
  int* sums = reinterpret_cast<int*>(shared_memory());
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 95) printf("%u: %d\n", blockIdx.x, sums[0] + sums[1] + sums[2]);
}
void one_thread_ends_while_others_wait() {
  if (threadIdx.x == 40) return;
  __syncthreads();
}
void one_thread_skips_the_barrier() {
  if (threadIdx.x != 40) __syncthreads();
  __syncthreads();
}
void a_lane_skips_the_shuffle() {
  if (threadIdx.x != 40) __shfl_xor_sync(0xffffffffu, 1, 1);
}
void reads_memory_never_written() {
  if (threadIdx.x == 0) printf("%f\n", *reinterpret_cast<float*>(shared_memory()));
}
void writes_beyond_its_memory() { shared_memory()[threadIdx.x] = 1; }

int main(int, char** argv) {
  const std::vector<std::pair<std::string, void (*)()>> kernels = {
      {"sums", sums_a_block},
      {"ends later", one_thread_ends_while_others_wait},
      {"skips", one_thread_skips_the_barrier},
      {"lane", a_lane_skips_the_shuffle},
      {"unwritten", reads_memory_never_written},
      {"beyond", writes_beyond_its_memory},
  };
  for (const auto& [name, kernel] : kernels)
    if (name == argv[1]) return emulation::launch(argv[1], kernel, dim3(2), 96, 16);
  return -1;
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emulation")
    (folder / "program.cpp").write_text(PROGRAM)
    flags = [*cuda_emulation.FLAGS, "-fsanitize=address", f"-I{cuda_emulation.ROOT}/csrc/cuda"]
    subprocess.run([compiler, *flags, "program.cpp", "-o", "program"], cwd=folder, check=True)
    return folder / "program"


def run(program, kernel):
    return subprocess.run([program, kernel], capture_output=True, text=True)


def test_threads_meet_at_barriers_and_shuffles(program):
    result = run(program, "sums")
    assert (result.returncode, result.stdout) == (0, "0: 4560\n1: 4560\n")


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("ends later", "ends while others wait at a barrier"),
        ("skips", "other threads wait at another barrier"),
        ("lane", "ends while others wait at a barrier"),
    ],
)
def test_wrong_use_of_barriers_ends_with_a_message(kernel, message, program):
    result = run(program, kernel)
    assert result.returncode < 0  # aborted
    assert message in result.stderr
    assert "block (0, 0), thread" in result.stderr


def test_shared_memory_begins_as_nan(program):
    assert "nan" in run(program, "unwritten").stdout


def test_sanitizer_detects_the_end_of_shared_memory(program):
    result = run(program, "beyond")
    assert result.returncode
    assert "heap-buffer-overflow" in result.stderr
