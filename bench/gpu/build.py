"""Builds the extensions in place, for ``bench.gpu_check``.

    python -m bench.gpu.build

Any version of setuptools serves, because pyproject.toml is not read. On a machine with a GPU the
CUDA extension is built for this GPU alone, unless TORCH_CUDA_ARCH_LIST says otherwise.
"""

import os

import torch

from bench.gpu.cuda_resources import load_setup


def main() -> None:
    """Builds what can be built; setup.py prints a line about what cannot."""
    from setuptools import Distribution

    if torch.cuda.is_available():
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", capability)
    setup = load_setup()
    builder = setup.BuildKernels(Distribution({"ext_modules": setup.extensions()}))
    builder.inplace = True
    builder.ensure_finalized()
    builder.run()


if __name__ == "__main__":
    main()
