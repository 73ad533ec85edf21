"""The import table: which room and which file may import which, so that all points one way."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mlp_backprop

ROOT = Path(mlp_backprop.__file__).parent

# The rooms of the house, and the files at its root, in the order in which they may import; those in
# one line do not know each other.
ROOMS = """
types
activations
losses
backprop
maths edge
nets engines
derivatives
training
checks
mlp_backprop
bench
programs
__main__
"""

# Module: what it imports of this package; what it imports of other libraries.
IMPORTS = {
    # types
    "types": ("", ""),
    # activations
    "activations": ("types", ""),
    # losses
    "losses": ("activations types", ""),
    # backprop
    "backprop": ("activations losses types", ""),
    # maths
    "maths": ("", ""),
    "maths.jets": ("activations backprop types", ""),
    "maths.optimizers": ("types", ""),
    "maths.row_blocks": ("types", ""),
    "maths.runs": ("backprop types", ""),
    "maths.samples": ("backprop types", ""),
    "maths.tangents": ("backprop losses types", ""),
    "maths.hessians": ("backprop maths.tangents types", ""),
    # edge
    "edge": ("", ""),
    "edge.backends": ("types", "array_api_compat numpy"),
    "edge.arguments": ("edge.backends types", "numpy"),
    "edge.calls": ("edge.backends", "numpy"),
    "edge.kinds": ("backprop edge.backends types", "numpy"),
    "edge.numbers": ("edge.arguments", "numpy"),
    "edge.rules": ("activations backprop edge.arguments edge.backends losses types", ""),
    "edge.members": ("edge.arguments edge.rules losses types", ""),
    "edge.validation": (
        "backprop edge.arguments edge.backends edge.kinds edge.members edge.rules types",
        "numpy",
    ),
    # nets
    "nets": ("types", ""),
    "nets.members": ("edge.arguments edge.members edge.rules types", ""),
    "nets.initial": ("edge.arguments nets.members types", "numpy"),
    "nets.vectors": ("edge.arguments types", "numpy"),
    # engines
    "engines": ("", ""),
    "engines.compiled": ("", ""),
    "engines.compiled.formulas": ("activations", "numba numpy"),
    "engines.compiled.schedule": ("types", ""),
    "engines.compiled.third_derivatives": ("activations engines.compiled.formulas", ""),
    "engines.compiled.vectors": ("", "llvmlite numba"),
    "engines.compiled.layout": ("engines.compiled.formulas engines.compiled.vectors types", ""),
    "engines.compiled.products": (
        "engines.compiled.formulas engines.compiled.vectors",
        "llvmlite numba numpy",
    ),
    "engines.compiled.rows": (
        "engines.compiled.formulas engines.compiled.third_derivatives engines.compiled.vectors",
        "numba numpy",
    ),
    "engines.compiled.curvatures": (
        "engines.compiled.formulas engines.compiled.rows losses",
        "numba",
    ),
    "engines.compiled.optimizers": (
        "engines.compiled.formulas engines.compiled.rows engines.compiled.vectors",
        "numpy",
    ),
    "engines.compiled.parts": (
        "engines.compiled.curvatures engines.compiled.formulas engines.compiled.optimizers "
        "engines.compiled.products engines.compiled.rows types",
        "numba numpy",
    ),
    "engines.compiled.jobs": (
        "backprop engines.compiled.formulas engines.compiled.layout engines.compiled.parts "
        "engines.compiled.rows engines.compiled.vectors types",
        "numba numpy",
    ),
    "engines.compiled.records": (
        "engines.compiled.formulas engines.compiled.jobs engines.compiled.vectors",
        "numba numpy",
    ),
    "engines.compiled.tiles": (
        "engines.compiled.formulas engines.compiled.layout engines.compiled.products "
        "engines.compiled.rows engines.compiled.vectors",
        "numpy",
    ),
    "engines.compiled.kernels": (
        "engines.compiled.formulas engines.compiled.jobs engines.compiled.parts "
        "engines.compiled.rows engines.compiled.tiles engines.compiled.vectors types",
        "numba numpy",
    ),
    "engines.cuda": ("", ""),
    "engines.cuda.arrays": ("backprop types", "cupy numpy"),
    "engines.cuda.build": ("", "cupy"),
    "engines.cuda.cublaslt": ("", "cuda"),
    "engines.cuda.launches": ("types", "cupy"),
    "engines.cuda.tiny": (
        "backprop engines.cuda.arrays engines.cuda.build engines.cuda.launches types",
        "cupy numpy",
    ),
    "engines.cuda.layer_shapes": ("backprop engines.cuda.cublaslt engines.cuda.tiny", "numpy"),
    "engines.cuda.layer_calls": (
        "engines.cuda.arrays engines.cuda.cublaslt engines.cuda.layer_shapes types",
        "cupy",
    ),
    "engines.cuda.layers": (
        "backprop engines.cuda.arrays engines.cuda.build engines.cuda.cublaslt "
        "engines.cuda.launches engines.cuda.layer_calls engines.cuda.layer_shapes types",
        "cupy",
    ),
    "engines.cuda.warp_tiles": (
        "backprop engines.cuda.arrays engines.cuda.build engines.cuda.launches types",
        "cupy numpy",
    ),
    "engines.cuda.engine": (
        "backprop engines.cuda.arrays engines.cuda.layers engines.cuda.tiny "
        "engines.cuda.warp_tiles maths.row_blocks types",
        "cupy numpy",
    ),
    "engines.memory": ("", "numpy"),
    "engines.orders": ("maths.runs types", "numpy"),
    "engines.schedule": ("backprop", ""),
    "engines.threads": ("", "threadpoolctl"),
    "engines.compiled.team": ("engines.compiled.parts engines.threads", "llvmlite numba"),
    "engines.compiled.passes": (
        "backprop edge.arguments edge.rules engines.compiled.jobs engines.compiled.kernels "
        "engines.compiled.layout engines.compiled.parts engines.compiled.schedule "
        "engines.compiled.team engines.memory engines.threads types",
        "numpy",
    ),
    "engines.compiled.hessians": (
        "backprop engines.compiled.curvatures engines.compiled.formulas "
        "engines.compiled.jobs engines.compiled.kernels engines.compiled.parts "
        "engines.compiled.passes engines.compiled.products engines.compiled.rows "
        "engines.compiled.tiles engines.compiled.vectors types",
        "numpy",
    ),
    "engines.compiled.jets": (
        "backprop engines.compiled.formulas engines.compiled.jobs engines.compiled.kernels "
        "engines.compiled.parts engines.compiled.passes engines.compiled.products "
        "engines.compiled.rows engines.compiled.tiles engines.compiled.vectors types",
        "numba numpy",
    ),
    "engines.shared_products": ("engines.schedule engines.threads types", "numpy"),
    "engines.numpy_tiles": (
        "backprop engines.schedule engines.shared_products engines.threads types",
        "numpy",
    ),
    "engines.compiled.engine": (
        "backprop edge.arguments edge.rules engines.compiled.jobs engines.compiled.kernels "
        "engines.compiled.layout engines.compiled.parts engines.compiled.rows "
        "engines.compiled.schedule engines.compiled.team engines.numpy_tiles "
        "engines.threads types",
        "numpy",
    ),
    "engines.compiled.first_order": (
        "backprop engines.compiled.engine engines.compiled.formulas "
        "engines.compiled.kernels engines.compiled.layout engines.compiled.passes "
        "engines.compiled.products engines.compiled.rows engines.compiled.tiles "
        "engines.compiled.vectors types",
        "numpy",
    ),
    "engines.compiled.jet_grads": (
        "backprop engines.compiled.engine engines.compiled.formulas engines.compiled.jets "
        "engines.compiled.jobs engines.compiled.kernels engines.compiled.layout "
        "engines.compiled.parts engines.compiled.passes engines.compiled.products "
        "engines.compiled.rows engines.compiled.tiles engines.compiled.vectors types",
        "numpy",
    ),
    "engines.compiled.per_output": (
        "backprop engines.compiled.first_order engines.compiled.formulas "
        "engines.compiled.kernels engines.compiled.passes engines.compiled.products "
        "engines.compiled.rows engines.compiled.tiles engines.compiled.vectors types",
        "numpy",
    ),
    "engines.compiled.second_order": (
        "backprop engines.compiled.curvatures engines.compiled.engine "
        "engines.compiled.formulas engines.compiled.jobs engines.compiled.kernels "
        "engines.compiled.parts engines.compiled.passes engines.compiled.products "
        "engines.compiled.rows engines.compiled.tiles engines.compiled.vectors "
        "maths.tangents types",
        "numba numpy",
    ),
    "engines.compiled.step_parts": (
        "engines.compiled.first_order engines.compiled.formulas engines.compiled.jobs "
        "engines.compiled.layout engines.compiled.records engines.compiled.rows "
        "engines.compiled.tiles engines.compiled.vectors maths.runs types",
        "numba numpy",
    ),
    "engines.compiled.steps": (
        "engines.compiled.formulas engines.compiled.jobs engines.compiled.records "
        "engines.compiled.rows engines.compiled.step_parts engines.compiled.team "
        "engines.compiled.tiles engines.compiled.vectors maths.runs types",
        "numba",
    ),
    "engines.compiled.drawing": (
        "engines.compiled.parts engines.compiled.records engines.compiled.steps "
        "engines.orders maths.runs types",
        "numpy",
    ),
    "engines.compiled.training": (
        "engines.compiled.drawing engines.compiled.engine engines.compiled.jobs "
        "engines.compiled.layout engines.compiled.optimizers engines.compiled.parts "
        "engines.compiled.records engines.compiled.schedule engines.compiled.step_parts "
        "engines.compiled.steps engines.compiled.team engines.threads maths.runs types",
        "numpy",
    ),
    "engines.numpy_products": (
        "backprop engines.numpy_tiles engines.schedule engines.shared_products "
        "engines.threads maths.row_blocks maths.tangents types",
        "numpy",
    ),
    "engines.choice": (
        "backprop edge.backends edge.kinds edge.rules engines.compiled.engine "
        "engines.compiled.first_order engines.compiled.hessians engines.compiled.jet_grads "
        "engines.compiled.jets engines.compiled.per_output engines.compiled.second_order "
        "engines.compiled.training engines.cuda.engine engines.memory "
        "engines.numpy_products engines.numpy_tiles engines.schedule engines.threads "
        "maths.row_blocks maths.runs maths.samples maths.tangents types",
        "numpy",
    ),
    "engines.members": ("backprop engines.choice types", "numpy"),
    # derivatives
    "derivatives": ("", ""),
    "derivatives.gradients": (
        "backprop edge.calls edge.kinds edge.validation engines.choice engines.members types",
        "",
    ),
    "derivatives.inputs": (
        "backprop edge.arguments edge.calls edge.validation engines.choice maths.jets "
        "maths.row_blocks types",
        "",
    ),
    "derivatives.per_sample": (
        "backprop edge.arguments edge.calls edge.validation engines.choice engines.members "
        "maths.row_blocks maths.samples types",
        "",
    ),
    "derivatives.prepared": (
        "backprop edge.arguments edge.backends edge.calls edge.kinds edge.rules "
        "edge.validation engines.choice types",
        "numpy",
    ),
    "derivatives.products": (
        "backprop edge.calls edge.validation engines.choice losses maths.row_blocks "
        "maths.tangents types",
        "",
    ),
    "derivatives.curvature": (
        "backprop derivatives.products edge.arguments edge.backends edge.calls "
        "edge.validation engines.choice maths.hessians maths.row_blocks maths.tangents "
        "nets.vectors types",
        "numpy scipy",
    ),
    "derivatives.residuals": (
        "activations backprop derivatives.inputs edge.arguments edge.calls edge.validation "
        "engines.choice losses maths.jets maths.row_blocks types",
        "",
    ),
    # training
    "training": ("", ""),
    "training.arguments": ("edge.arguments edge.kinds edge.numbers types", "numpy"),
    "training.batches": ("edge.backends engines.orders maths.runs types", "numpy"),
    "training.ensembles": (
        "backprop edge.calls edge.rules edge.validation engines.members types",
        "",
    ),
    "training.optimizers": (
        "edge.arguments edge.calls edge.numbers maths.optimizers nets.vectors "
        "training.arguments types",
        "numpy",
    ),
    "training.passes": (
        "backprop edge.backends engines.choice maths.runs nets.vectors types",
        "numpy",
    ),
    "training.lbfgs": (
        "edge.backends edge.calls maths.optimizers maths.runs nets.vectors training.batches "
        "training.passes types",
        "numpy scipy",
    ),
    "training.progress": ("", "rich"),
    "training.reference": (
        "edge.backends edge.calls maths.runs nets.vectors training.batches training.passes types",
        "numpy",
    ),
    "training.results": ("maths.runs types", "numpy"),
    "training.pictures": ("training.results types", "matplotlib numpy"),
    "training.schedules": ("edge.numbers types", "numpy"),
    "training.checked": (
        "backprop edge.arguments edge.backends edge.numbers edge.validation engines.orders "
        "maths.optimizers maths.runs nets.vectors training.lbfgs training.optimizers "
        "training.schedules types",
        "numpy",
    ),
    "training.states": ("edge.backends edge.calls maths.runs training.passes types", "numpy"),
    "training.train": (
        "edge.arguments edge.backends edge.numbers engines.choice maths.runs nets.vectors "
        "training.checked training.lbfgs training.progress training.reference "
        "training.results training.states types",
        "numpy",
    ),
    # checks
    "checks": ("", ""),
    "checks.derivatives": (
        "backprop derivatives.curvature derivatives.gradients derivatives.inputs "
        "derivatives.per_sample derivatives.products derivatives.residuals edge.arguments "
        "edge.backends edge.validation nets.vectors types",
        "numpy",
    ),
    "checks.torch_reference": ("types", "torch"),
    "checks.checking": (
        "backprop checks.derivatives checks.torch_reference derivatives.gradients "
        "edge.arguments edge.backends edge.calls edge.validation types",
        "numpy",
    ),
    # mlp_backprop
    "mlp_backprop": (
        "checks.checking derivatives.curvature derivatives.gradients derivatives.inputs "
        "derivatives.per_sample derivatives.prepared derivatives.products "
        "derivatives.residuals edge.backends engines.memory nets.initial nets.members "
        "nets.vectors training.ensembles training.optimizers training.pictures "
        "training.results training.schedules training.train types",
        "",
    ),
    # bench
    "bench": ("", ""),
    "bench.contenders": (
        "checks.torch_reference derivatives.gradients edge.validation engines.choice "
        "mlp_backprop types",
        "autograd jax numpy sklearn torch",
    ),
    "bench.environment": ("edge.backends engines.threads mlp_backprop", "numpy threadpoolctl"),
    "bench.memory": ("", ""),
    "bench.problems": ("", ""),
    "bench.results": (
        "bench.contenders bench.environment bench.memory bench.problems engines.threads",
        "",
    ),
    "bench.charts": ("bench.contenders bench.problems bench.results", "matplotlib"),
    "bench.grid": (
        "backprop bench.contenders bench.memory bench.problems bench.results edge.arguments "
        "edge.calls edge.validation nets.initial types",
        "numpy",
    ),
    "bench.tables": ("bench.contenders bench.problems bench.results", ""),
    # programs
    "programs": ("", ""),
    "programs.examples": ("nets.initial types", "numpy sklearn"),
    "programs.info": ("bench.environment", ""),
    "programs.verification": (
        "checks.checking checks.torch_reference derivatives.gradients edge.backends "
        "edge.rules programs.examples types",
        "numpy",
    ),
    "programs.screens": (
        "bench.results bench.tables edge.backends programs.verification",
        "numpy rich",
    ),
    "programs.cli": (
        "bench.charts bench.environment bench.grid edge.backends mlp_backprop programs.info "
        "programs.screens programs.verification",
        "numpy",
    ),
    # __main__
    "__main__": ("programs.cli", ""),
}

# Where an optional library is imported. Those without a file are loaded by name.
ONLY_IN = {
    "array_api_compat": {"edge.backends"},
    "autograd": {"bench.contenders"},
    "cuda": {"engines.cuda.cublaslt"},
    "cupy": {
        "engines.cuda.arrays",
        "engines.cuda.build",
        "engines.cuda.engine",
        "engines.cuda.launches",
        "engines.cuda.layer_calls",
        "engines.cuda.layers",
        "engines.cuda.tiny",
        "engines.cuda.warp_tiles",
    },
    "jax": {"bench.contenders"},
    "matplotlib": {"bench.charts", "training.pictures"},
    "llvmlite": {
        "engines.compiled.products",
        "engines.compiled.team",
        "engines.compiled.vectors",
    },
    "numba": {
        "engines.compiled.curvatures",
        "engines.compiled.formulas",
        "engines.compiled.jets",
        "engines.compiled.jobs",
        "engines.compiled.kernels",
        "engines.compiled.parts",
        "engines.compiled.products",
        "engines.compiled.records",
        "engines.compiled.rows",
        "engines.compiled.second_order",
        "engines.compiled.step_parts",
        "engines.compiled.steps",
        "engines.compiled.team",
        "engines.compiled.vectors",
    },
    "rich": {"programs.screens", "training.progress"},
    "scipy": {"derivatives.curvature", "training.lbfgs"},
    "sklearn": {"bench.contenders", "programs.examples"},
    "threadpoolctl": {"engines.threads", "bench.environment"},
    "torch": {"bench.contenders", "checks.torch_reference"},
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


def test_rooms_point_one_way():
    """Each file imports from its own room, or from those in the lines above it."""
    level = {room: k for k, line in enumerate(ROOMS.split("\n")) for room in line.split()}
    assert {name.partition(".")[0] for name in IMPORTS} == set(level)
    for name, (project, _) in IMPORTS.items():
        room = name.partition(".")[0]
        for other in {module.partition(".")[0] for module in project.split()} - {room}:
            assert level[other] < level[room], f"{name} imports from {other}"


def test_the_root_holds_the_derivation_alone():
    assert {path.stem for path in ROOT.glob("*.py")} == {
        *("types", "activations", "losses", "backprop"),
        *("__init__", "__main__"),
    }


def test_the_mathematics_imports_no_library():
    for name, (_, libraries) in IMPORTS.items():
        if name in {"types", "activations", "losses", "backprop"} or name.startswith("maths"):
            assert libraries == "", name


@pytest.mark.parametrize("library", ONLY_IN)
def test_an_optional_library_is_imported_where_the_table_says(library):
    files = {name for name, (_, libraries) in IMPORTS.items() if library in libraries.split()}
    assert files == ONLY_IN[library]


def test_libraries_are_loaded_by_name_in_one_file():
    loads = {name for name, path in MODULES.items() if "import_module" in path.read_text("utf-8")}
    assert loads == {"edge.backends"}


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
