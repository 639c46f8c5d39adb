"""What a layer for inference leaves out, and how the rest is stored. Data; build.py applies it.

Patterns are matched by fnmatch (`*` also crosses directories) against paths relative to the
folder that `pip install --target` filled. A pattern that matches nothing is harmless, so one list
serves every version of torch; whether too much was taken is decided by the smoke test.
"""

# First match decides. These stay although a pattern of PRUNE below matches them.
KEEP = [
    ("torch/bin/torch_shm_manager", "import torch refuses to run without it"),
    ("torch/testing/_internal/__init__.py", "package of the modules below"),
    ("torch/testing/_internal/common_dtype.py", "imported by torch.testing"),
    ("torch/testing/_internal/logging_tensor.py", "imported by torch.utils"),
    ("torch/testing/_internal/distributed/__init__.py", "package of the module below"),
    ("torch/testing/_internal/distributed/fake_pg.py", "imported by torch.distributed"),
]

# What pip and Python write beside the wheels' content, differently on every machine.
GENERATED = ["bin/*", "*.dist-info/RECORD", "*.pyc"]

PRUNE = [
    ("share/*", "manual pages"),
    ("include/*", "C headers"),
    (
        "*.dist-info/licenses/*/*/*",
        "licences of third parties' third parties; the wheel's own stay",
    ),
    ("*.dist-info/sboms/*", "software bills of materials"),
    ("*.pyi", "type stubs"),
    ("*/py.typed", "type stubs"),
    ("*.h", "C headers"),
    ("*.hpp", "C headers"),
    ("*.pxd", "Cython headers"),
    ("*.cmake", "build files"),
    ("*.a", "static libraries"),
    ("*.pth", "site customisation; a Lambda layer is no site directory"),
    ("isympy.py", "interactive shell"),
    ("setuptools/*", "builds C++ extensions"),
    ("setuptools-*", "builds C++ extensions"),
    ("_distutils_hack/*", "part of setuptools"),
    ("pkg_resources/*", "part of setuptools"),
    ("torch/bin/*", "test programs and protoc"),
    ("torch/include/*", "C++ headers"),
    ("torch/test/*", "C++ test programs"),
    ("torch/share/*", "CMake files"),
    ("torch/testing/_internal/*", "PyTorch's own test suite"),
    ("torch/_vendor/quack/*", "GPU kernels"),
    ("torch/_inductor/kernel/*", "generates code for a compiler that Lambda does not have"),
    ("torch/_inductor/autoheuristic/*", "tunes GPU kernels"),
    ("torch/_inductor/codegen/cutedsl/*", "GPU kernels"),
    ("torch/_inductor/codegen/cutlass/*", "GPU kernels"),
    ("torch/_inductor/codegen/rocm/ck_*", "GPU kernels"),
    ("torch/_inductor/fx_passes/serialized_patterns/*", "training"),
    ("torch/distributed/benchmarks/*", "training on several machines"),
    ("torch/distributed/elastic/*", "training on several machines"),
    ("torch/distributed/launcher/*", "training on several machines"),
    ("torch/distributed/pipelining/*", "training on several machines"),
    ("torch/distributed/_tools/*", "training on several machines"),
    ("torch/utils/benchmark/*", "PyTorch's own benchmarks"),
    ("torch/utils/hipify/*", "converts CUDA sources"),
    ("torch/utils/tensorboard/*", "training logs"),
    ("torch/ao/pruning/*", "training"),
    ("torch/lib/libaoti_custom_ops.so", "used by PyTorch's own tests"),
    ("torch/lib/libbackend_with_compiler.so", "used by PyTorch's own tests"),
    ("torch/lib/libjitbackend_test.so", "used by PyTorch's own tests"),
    ("torch/lib/libtorchbind_test.so", "used by PyTorch's own tests"),
    ("torch/lib/libshm/*", "sources"),
    ("torch/lib/libshm_windows/*", "sources"),
    ("torchgen/packaged/*", "templates that generate PyTorch's own sources"),
    ("numpy/*/tests/*", "tests"),
    ("numpy/tests/*", "tests"),
    ("numpy/f2py/*", "wraps Fortran with a compiler"),
    ("numpy/distutils/*", "compiles extensions"),
    ("numpy/_core/include/*", "C headers"),
    ("numpy/_core/lib/*", "static libraries"),
    ("numpy/random/lib/*", "static libraries"),
    ("numpy/random/_examples/*", "examples"),
    ("PIL/_avif.*", "AVIF, of which no model is fed; Pillow says that it cannot read it"),
    ("pillow.libs/libavif-*", "AVIF"),
    ("sympy/*/tests/*", "tests"),
    ("sympy/*/benchmarks/*", "tests"),
    ("sympy/physics/*", "not a part of algebra"),
    ("sympy/parsing/autolev/*", "parses another system's files"),
    ("sympy/parsing/latex/*", "parses LaTeX"),
    ("networkx/*/tests/*", "tests"),
    ("mpmath/tests/*", "tests"),
]

# Debug symbols are dropped from torch's own libraries. Those that numpy and Pillow bundle were
# rewritten by auditwheel: stripping them breaks them.
STRIP = ["torch/*.so", "torch/*.so.*", "torch/bin/torch_shm_manager"]

# Stored as zstd frames and unpacked at the cold start: (library, module that needs it). Importing
# the module waits for the library.
COMPRESS = [("torch/lib/libtorch_cpu.so", "torch._C")]

# What a library may need from the system: the manylinux policies' list as far as Amazon Linux's
# images for Lambda have it. Everything else has to be in the layer.
SYSTEM_LIBRARIES = [
    "ld-linux-*.so.*",
    "libc.so.6",
    "libdl.so.2",
    "libgcc_s.so.1",
    "libm.so.6",
    "libpthread.so.0",
    "libresolv.so.2",
    "librt.so.1",
    "libstdc++.so.6",
    "libutil.so.1",
    "libz.so.1",
]

# Pure Python that `import torch` leaves alone and inference hardly ever needs (torch.compile,
# torch.export, ONNX export, symbolic shapes): kept in one zip, a quarter of the size, from which
# Python imports when asked.
ARCHIVE = [
    "sympy/*",
    "networkx/*",
    "mpmath/*",
    "jinja2/*",
    "fsspec/*",
    "torch/_dynamo/*",
    "torch/_inductor/*",
    "torch/_numpy/*",
    "torch/onnx/*",
]

# Kept as source only: not imported by `import torch`, so that bytecode would only cost bytes.
# The smoke test counts the modules that were imported without bytecode.
NO_BYTECODE = [
    "torch/distributed/*/*",
    "torch/ao/ns/*",
    "torch/ao/quantization/fx/*",
    "torch/ao/quantization/pt2e/*",
    "torch/ao/quantization/backend_config/*",
    "torch/_functorch/_activation_checkpointing/*",
    "torch/_functorch/_aot_autograd/*",
    "torch/_export/serde/*",
    "torch/_export/passes/*",
    "numpy/ma/*",
    "numpy/polynomial/*",
    "numpy/testing/*",
]
BYTECODE_ALL_THE_SAME = [
    "torch/ao/ns/__init__.py",
    "torch/ao/ns/fx/__init__.py",
    "torch/ao/ns/fx/ns_types.py",
    "torch/ao/ns/fx/utils.py",
    "torch/ao/quantization/pt2e/__init__.py",
    "torch/ao/quantization/pt2e/_numeric_debugger.py",
    "torch/ao/quantization/pt2e/export_utils.py",
    "torch/ao/quantization/pt2e/graph_utils.py",
    "torch/distributed/_local_tensor/*",
    "torch/distributed/_pycute/*",
    "torch/distributed/algorithms/__init__.py",
    "torch/distributed/algorithms/join.py",
    "torch/distributed/autograd/*",
    "torch/distributed/rpc/*",
    "torch/distributed/tensor/*",
    "torch/_functorch/_aot_autograd/__init__.py",
    "torch/_functorch/_aot_autograd/descriptors.py",
    "torch/_functorch/_aot_autograd/utils.py",
]
