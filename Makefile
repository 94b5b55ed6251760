# Commands that need more than one line. CONTRIBUTING.md lists the others.

CPP_FILES = $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

# Fails if a formatter would change a file, and if the linter or the type checker finds an error.
.PHONY: lint
lint:
	ruff check .
	ruff format --check .
	clang-format --dry-run -Werror $(CPP_FILES)
	mdformat --check *.md docs naslora/weights bench/experiments
	mypy

# Builds the site of docs/. Fails on a link that leads nowhere, and on a page that is not listed.
.PHONY: site
site:
	properdocs build --strict --quiet --site-dir build/site

# Formats every file.
.PHONY: format
format:
	ruff check --fix .
	ruff format .
	clang-format -i $(CPP_FILES)
	mdformat *.md docs naslora/weights bench/experiments

CXX ?= g++
SANITIZED = build/sanitize

# The kernel tests on an extension built with AddressSanitizer and UndefinedBehaviorSanitizer. Its
# scratch memory is filled with NaN. The installed extension stays as it is. Tests of compiled code
# are left out, because torch.compile generates code of its own. pythonpath replaces that of
# pyproject.toml, by which the installed extension of this folder would come first.
.PHONY: sanitize
sanitize:
	rm -rf $(SANITIZED)
	NASLORA_SANITIZE=1 python setup.py -q build --build-base build/sanitize-objects --build-lib $(SANITIZED)
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so.6)" \
	ASAN_OPTIONS=detect_leaks=0 \
	UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=$(SANITIZED) \
	pytest -p no:cacheprovider -o pythonpath=$(SANITIZED) -m "" -k "not compiled" \
	    tests/test_kernels_*.py tests/reliability/test_kernel_fuzz.py

# Compiles the CUDA kernels for every architecture that nvcc knows. Prints the registers and the
# shared memory of each kernel. Fails on warnings and on registers that spill.
.PHONY: nvcc-check
nvcc-check:
	python -m bench.gpu.cuda_resources

# Compiles the Triton kernels for the oldest card and one of each later generation, by the Triton
# that is installed and by the oldest that pyproject.toml allows. Needs no GPU. Prints the registers
# and the shared memory of each kernel. Fails on registers that spill.
OLDEST_TRITON = 3.6
TRITON_FOLDER = build/triton-$(OLDEST_TRITON)
.PHONY: triton-check
triton-check:
	python -m bench.gpu.triton_resources
	test -d $(TRITON_FOLDER) || pip install -q --no-deps --target $(TRITON_FOLDER) 'triton==$(OLDEST_TRITON).*'
	PYTHONPATH=$(TRITON_FOLDER) python -m bench.gpu.triton_resources

# The CUDA kernels, emulated on the CPU, under AddressSanitizer and UndefinedBehaviorSanitizer. The
# shared memory is an allocation of exactly its size. It is filled with NaN when a block starts.
.PHONY: cuda-sanitize
cuda-sanitize:
	NASLORA_CUDA_EMULATION=$$(python tests/cuda_emulation.py --sanitize) \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so.6)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	pytest -p no:cacheprovider -k "cuda and not compiled" tests/test_cuda_primitives.py tests/test_kernels_*.py

# On a machine with a GPU: bench/gpu_check.py with the options in CHECK. Needs no network, and no
# package but torch, Triton and pytest.
.PHONY: gpu-check
gpu-check:
	python -m bench.gpu_check $(CHECK)

# All of tests/reliability, then what plain pytest leaves out of the other tests: at most an hour on
# two cores. CAMPAIGN adds options of pytest. Then CI, with both cores busy, half an hour.
LONG = OMP_NUM_THREADS=1 pytest -rP --tb=short --timeout=1800
.PHONY: campaign
campaign:
	$(LONG) -m "campaign or not campaign" tests/reliability tests/test_run.py $(CAMPAIGN)
	$(LONG) -m campaign --ignore=tests/reliability --deselect=tests/test_run.py tests $(CAMPAIGN)
	bash .ci/run --busy
