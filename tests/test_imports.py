"""The import table: which file may import which, so that everything points one way.

tables <- derivation <- engines <- namespaces <- public functions <- command line
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mlp_backprop

ROOT = Path(mlp_backprop.__file__).parent

# Module: what it imports of this package; what it imports of other libraries.
IMPORTS = {
    # Tables and derivation: mathematics, given its namespace.
    "types": ("", ""),
    "activations": ("types", ""),
    "losses": ("activations types", ""),
    "backprop": ("activations losses types", ""),
    "jets": ("activations backprop types", ""),
    "tangents": ("backprop losses types", ""),
    "hessians": ("backprop tangents types", ""),
    "blocks": ("types", ""),
    # Engines.
    "engines": ("", ""),
    "engines.schedule": ("backprop", ""),
    "engines.threads": ("", "threadpoolctl"),
    "engines.numpy_tiles": ("backprop engines.schedule engines.threads types", "numpy"),
    "engines.numba_formulas": ("activations", "numba numpy"),
    "engines.numba_kernels": ("engines.numba_formulas types", "numba numpy"),
    "engines.numba_engine": (
        "backprop engines.numba_formulas engines.numba_kernels engines.numpy_tiles "
        "engines.threads types",
        "numba numpy",
    ),
    "engines.numpy_products": (
        "backprop blocks engines.numpy_tiles engines.schedule engines.threads tangents types",
        "numpy",
    ),
    "engines.cuda_build": ("", "cupy"),
    "engines.cublaslt": ("", "cuda"),
    "engines.cuda_arrays": ("types", "cupy numpy"),
    "engines.cuda_tiny": ("backprop engines.cuda_arrays engines.cuda_build types", "cupy numpy"),
    "engines.cuda_warp_tiles": (
        "backprop engines.cuda_arrays engines.cuda_build types",
        "cupy numpy",
    ),
    "engines.cuda_layer_shapes": ("backprop engines.cublaslt engines.cuda_tiny", "numpy"),
    "engines.cuda_layer_calls": (
        "engines.cublaslt engines.cuda_arrays engines.cuda_layer_shapes types",
        "cupy",
    ),
    "engines.cuda_layers": (
        "backprop engines.cublaslt engines.cuda_arrays engines.cuda_build "
        "engines.cuda_layer_calls engines.cuda_layer_shapes types",
        "cupy",
    ),
    "engines.cupy_engine": (
        "backprop blocks engines.cuda_arrays engines.cuda_layers engines.cuda_tiny "
        "engines.cuda_warp_tiles types",
        "cupy",
    ),
    # Libraries and arguments.
    "namespaces": (
        "backprop engines.cupy_engine engines.numba_engine engines.numpy_tiles types",
        "array_api_compat numpy",
    ),
    "arguments": ("namespaces types", "numpy"),
    "validation": ("activations arguments backprop losses namespaces types", ""),
    # Public functions.
    "gradients": ("backprop namespaces types validation", "numpy"),
    "prepared": ("arguments backprop gradients namespaces types validation", "numpy"),
    "parameters": ("arguments types", "numpy"),
    "vectors": ("arguments types", ""),
    "per_sample": ("arguments backprop blocks gradients namespaces types validation", "numpy"),
    "inputs": ("arguments backprop blocks gradients jets types validation", ""),
    "residuals": (
        "activations arguments backprop blocks gradients inputs jets losses types validation",
        "",
    ),
    "products": (
        "backprop blocks engines.numpy_products gradients losses tangents types validation",
        "numpy",
    ),
    "curvature": (
        "arguments backprop blocks gradients hessians namespaces products tangents types "
        "validation vectors",
        "numpy scipy",
    ),
    "torch_reference": ("types", "torch"),
    "family": (
        "arguments backprop curvature gradients inputs namespaces per_sample products residuals "
        "types validation vectors",
        "numpy",
    ),
    "checking": (
        "arguments backprop family gradients namespaces torch_reference types validation",
        "numpy",
    ),
    "freed_memory": ("", "numpy"),
    "mlp_backprop": (
        "checking curvature freed_memory gradients inputs namespaces parameters per_sample "
        "prepared products residuals types vectors",
        "",
    ),
    # Benchmarks.
    "environment": (
        "mlp_backprop engines.numba_engine engines.threads namespaces",
        "numpy threadpoolctl",
    ),
    "bench_memory": ("", ""),
    "bench_contenders": (
        "backprop gradients mlp_backprop torch_reference types validation",
        "autograd jax numpy sklearn torch",
    ),
    "bench_results": ("bench_contenders bench_memory engines.threads environment", ""),
    "bench_charts": ("bench_results", "matplotlib"),
    "bench": (
        "arguments backprop bench_contenders bench_memory bench_results gradients parameters "
        "types validation",
        "numpy",
    ),
    # Command line.
    "verification": (
        "checking gradients namespaces parameters torch_reference types",
        "numpy sklearn",
    ),
    "report": ("bench_results environment verification", "numpy rich"),
    "cli": ("bench bench_charts mlp_backprop environment report verification", "numpy"),
    "__main__": ("cli", ""),
}

# Where an optional library is imported. Those without a file are loaded by name, in namespaces.
ONLY_IN = {
    "array_api_compat": {"namespaces"},
    "autograd": {"bench_contenders"},
    "cuda": {"engines.cublaslt"},
    "cupy": {
        "engines.cuda_arrays",
        "engines.cuda_build",
        "engines.cuda_layer_calls",
        "engines.cuda_layers",
        "engines.cuda_tiny",
        "engines.cuda_warp_tiles",
        "engines.cupy_engine",
    },
    "jax": {"bench_contenders"},
    "matplotlib": {"bench_charts"},
    "numba": {"engines.numba_engine", "engines.numba_formulas", "engines.numba_kernels"},
    "rich": {"report"},
    "scipy": {"curvature"},
    "sklearn": {"bench_contenders", "verification"},
    "threadpoolctl": {"engines.threads", "environment"},
    "torch": {"bench_contenders", "torch_reference"},
}


def dotted(path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


FILES = {dotted(path): path for path in sorted(ROOT.rglob("*.py"))}
MODULES = {name.removeprefix("mlp_backprop."): path for name, path in FILES.items()}


def imported(path):
    """Dotted names of all that a file imports, in functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_of(name):
    """'mlp_backprop.types.Layer' -> 'types'."""
    while name not in FILES:
        name = name.rpartition(".")[0]
    return name.removeprefix("mlp_backprop.")


def test_the_table_lists_the_modules_that_exist():
    assert set(IMPORTS) == set(MODULES)


@pytest.mark.parametrize("name", IMPORTS)
def test_imports_are_those_of_the_table(name):
    names = list(imported(MODULES[name]))
    ours = {module_of(n) for n in names if n.startswith("mlp_backprop")}
    theirs = {n.partition(".")[0] for n in names} - sys.stdlib_module_names - {"mlp_backprop"}
    project, libraries = IMPORTS[name]
    assert ours == set(project.split())
    assert theirs == set(libraries.split())


def test_the_table_points_one_way():
    """Each row imports only from rows above it."""
    above = set()
    for name, (project, _) in IMPORTS.items():
        assert set(project.split()) <= above
        above.add(name)


def test_the_mathematics_imports_no_library():
    names = "types activations losses backprop jets tangents hessians blocks"
    assert not any(IMPORTS[name][1] for name in names.split())


@pytest.mark.parametrize("library", ONLY_IN)
def test_an_optional_library_is_imported_where_the_table_says(library):
    files = {name for name, (_, libraries) in IMPORTS.items() if library in libraries.split()}
    assert files == ONLY_IN[library]


def test_libraries_are_loaded_by_name_in_one_file():
    loads = {name for name, path in MODULES.items() if "import_module" in path.read_text("utf-8")}
    assert loads == {"namespaces"}


LOADED = """
import sys

import mlp_backprop

print(mlp_backprop.compute_grads([([[1, 2]], [3])], [[4, 5]], [[6]]).loss)
print(*{name.partition(".")[0] for name in sys.modules} & set(sys.argv[1:]))
"""


def test_the_package_loads_no_optional_library():
    """Neither when imported nor when called with lists and NumPy arrays."""
    command = [sys.executable, "-c", LOADED, *ONLY_IN, "array_api_strict"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "121.0\n\n"
