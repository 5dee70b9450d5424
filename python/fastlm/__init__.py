"""fastlm: efficient language models on one CPU box or one GPU.

Importing the package loads the compiled operators: afterwards `torch.ops.fastlm.*` exists, is differentiable, and works under
`torch.compile`, `torch.export` and autocast. The typed functions are in `fastlm.ops`, their readable definitions in
`fastlm.reference`.
"""

from fastlm import _library

_library.load()

from fastlm import _registration, ops  # noqa: E402  (the library comes first)
from fastlm._library import build_info, cpu_capability  # noqa: E402

_registration.attach()

__version__: str = str(build_info()["version"])
__all__ = ["__version__", "build_info", "cpu_capability", "ops"]
