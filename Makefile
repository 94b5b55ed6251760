# The few commands that need more than one line. Everything else: CONTRIBUTING.md.

CXX ?= g++
SANITIZED = build/sanitize

# The kernel tests on an extension built with AddressSanitizer and UndefinedBehaviorSanitizer, its
# scratch memory filled with NaN. Leaves the installed extension alone. What torch.compile generates
# is not ours to sanitize.
.PHONY: sanitize
sanitize:
	rm -rf $(SANITIZED)
	NASLORA_SANITIZE=1 python setup.py -q build --build-base build/sanitize-objects --build-lib $(SANITIZED)
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so.6)" \
	ASAN_OPTIONS=detect_leaks=0 \
	UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=$(SANITIZED) \
	pytest -p no:cacheprovider -k "not compiled" tests/test_kernels_*.py

# On a machine with a GPU: builds what is not built, then everything of bench/gpu_check.py, whose
# options go into CHECK. Needs no network.
.PHONY: gpu-check
gpu-check:
	python setup.py -q build_ext --inplace
	python -m bench.gpu_check $(CHECK)
