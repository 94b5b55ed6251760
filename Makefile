# Commands that need more than one line. CONTRIBUTING.md lists the others.

CXX ?= g++
SANITIZED = build/sanitize

# Runs the kernel tests on an extension that is built with AddressSanitizer and
# UndefinedBehaviorSanitizer and whose scratch memory is filled with NaN. The installed extension is
# not changed. Compiled tests are left out: torch.compile generates code that is not ours.
.PHONY: sanitize
sanitize:
	rm -rf $(SANITIZED)
	NASLORA_SANITIZE=1 python setup.py -q build --build-base build/sanitize-objects --build-lib $(SANITIZED)
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so.6)" \
	ASAN_OPTIONS=detect_leaks=0 \
	UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=$(SANITIZED) \
	pytest -p no:cacheprovider -k "not compiled" tests/test_kernels_*.py

# Compiles the CUDA kernels for every architecture that nvcc knows and prints the registers and memory
# of each kernel. Fails on warnings and on register spills.
.PHONY: nvcc-check
nvcc-check:
	python -m bench.cuda_resources

# Compiles the Triton kernels for the oldest card and one of each later generation, without any;
# prints what each takes, and fails on registers that spill.
.PHONY: triton-check
triton-check:
	python -m bench.triton_resources

# Runs the tests of the CUDA kernels, emulated on the CPU, under AddressSanitizer and
# UndefinedBehaviorSanitizer. Shared memory is an allocation of exactly its size and holds NaN when a
# block begins.
.PHONY: cuda-sanitize
cuda-sanitize:
	NASLORA_CUDA_EMULATION=$$(python tests/cuda_emulation.py --sanitize) \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so.6)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	pytest -p no:cacheprovider -k "cuda and not compiled" tests/test_cuda_primitives.py tests/test_kernels_*.py

# On a machine with a GPU: builds what is not built, then everything of bench/gpu_check.py, whose
# options go into CHECK. Needs no network.
.PHONY: gpu-check
gpu-check:
	python setup.py -q build_ext --inplace
	python -m bench.gpu_check $(CHECK)
